"""Two processes on the CPU (gloo) against one: DDP and FSDP2 for real, and DeepSpeed where it is installed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_helpers import moved
from safetensors.torch import load_file

from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.loading import build_tiny


pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("distributed_worker.py")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO = {"DS_ACCELERATOR": "cpu"}
SAME = ("loss", "loss_ce", "loss_bcm", "loss_feat", "loss_attn", "latent_distance", "num_tokens", "latent_spread")


# SGD, so that an error in a gradient isn't scaled away.
SGD = {"optim": "sgd", "learning_rate": 0.05, "gradient_checkpointing": False, "max_grad_norm": 1e9}
PACKED = {"stage": "1", "sample_packing": True, "max_length": 400, "packing_lookahead": 2}
# Weights that answer scenes, and stay as they are.
ANSWERS = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 4, "predict_with_generate": True}
RUNS = {
    "stage 1, packed": PACKED,
    "stage 2": {"stage": "2"},
    # So DDP wants a gradient of every parameter in every step, and in the last two none reaches BCM.
    "path": {"latent_inputs": "dac", "dac_inputs_share": 0.5, "ddp_find_unused_parameters": False},
    "sft": {"stage": "sft", "freeze_vision": False},
    "path, qwen3_vl": {"sample_every": 2},
}


def zero(stage):
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        ),
    }


def model_of(name):
    return "qwen3_vl" if "qwen3_vl" in name else "qwen2_5_vl"


def start(folder, stage_1, processes, environment=None, deepspeed=None):
    """Trains all runs, one after the other, in some processes."""
    common = {"save_strategy": "no", "per_device_train_batch_size": 2 // processes, "deepspeed": deepspeed, **SGD}
    specs = [
        {
            "checkpoint": str(stage_1[model_of(name)]),
            "options": {"output_dir": str(folder / name), **common, **options},
        }
        for name, options in RUNS.items()
    ]
    saving = {"output_dir": str(folder / "resumed"), "save_strategy": "steps", "save_steps": 2}
    broken = {"checkpoint": str(stage_1["qwen2_5_vl"]), "options": {**common, **PACKED, **saving}}
    resume = str(folder / "resumed" / "checkpoint-2")
    specs += [broken, {**broken, "resume": resume}]
    if environment is None:  # DDP, or one process
        specs.append(
            {"checkpoint": str(EMBEDDED), "options": {**common, **ANSWERS, "output_dir": str(folder / "answers")}}
        )
        rewarded = {"stage": "grpo", "num_generations": 2, "max_completion_length": 20, "latent_sigma": 0.5}
        rewarded |= {"output_dir": str(folder / "grpo"), **common}
        rewarded["per_device_train_batch_size"] = 4 // processes
        specs.append({"checkpoint": str(stage_1["qwen2_5_vl"]), "options": rewarded})
    (folder / "specs.json").write_text(json.dumps(specs))
    launcher = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *launcher, str(WORKER), str(folder / "specs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """For each backbone a checkpoint with a BCM that counts as trained."""
    folders = {}
    for name in ("qwen2_5_vl", "qwen3_vl"):
        model, processor = build_tiny(0, name, dtype=torch.float32)
        with torch.no_grad():
            model.model.bcm.norm.bias.fill_(0.01)
        folders[name] = tmp_path_factory.mktemp(name)
        for part in (model, processor):
            part.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def alone(tmp_path_factory, stage_1):
    return start(tmp_path_factory.mktemp("alone"), stage_1, 1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((None, None), id="ddp"),
        pytest.param((FSDP2, None), id="fsdp2"),
        pytest.param((ZERO, 2), id="zero2"),
        pytest.param((ZERO, 3), id="zero3"),
    ],
)
def together(request, tmp_path_factory, stage_1):
    environment, stage = request.param
    if stage is not None:
        pytest.importorskip("deepspeed")
    deepspeed = None if stage is None else zero(stage)
    folder = start(tmp_path_factory.mktemp("together"), stage_1, 2, environment, deepspeed)
    return folder, {"lm_head.weight"} if stage == 2 else set()  # ZeRO-2 saves tied weights twice


def result(folder):
    history = json.loads((folder / "history.json").read_text())
    return load_file(folder / "model.safetensors"), [log for log in history if "loss" in log]


def assert_same(one, two, twice):
    (expected, curve), (got, other_curve) = one, two
    assert len(curve) == len(other_curve) == 4
    for step, other_step in zip(curve, other_curve):
        for name in SAME:
            assert (name in step) == (name in other_step), name
            if name in step:
                assert other_step[name] == pytest.approx(step[name], rel=2e-4, abs=1e-6), name
    assert expected.keys() == got.keys() - twice
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(alone, together, name):
    """Steps in which one rank has no box, or no picture, included: nobody waits for ever."""
    folder, twice = together
    assert_same(result(alone / name), result(folder / name), twice)


def test_sample_pictures_are_drawn_while_the_other_process_waits_or_takes_part(together):
    folder, _ = together
    drawn = sorted(path.name for path in (folder / "path, qwen3_vl" / "samples").iterdir())
    assert drawn == [f"step-{step}-row-{row}.png" for step in (2, 4) for row in (1, 2)]
    config = json.loads((folder / "path, qwen3_vl" / "config.json").read_text())
    assert config["architectures"] == ["VReflectionQwen3VLForConditionalGeneration"]


def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one(together):
    folder, _ = together
    (expected, curve), (got, resumed) = result(folder / "stage 1, packed"), result(folder / "resumed")
    assert [step["loss"] for step in curve] == [step["loss"] for step in resumed]
    assert not moved(expected, got)


def test_two_processes_learn_by_reward_as_one_does(alone, together):
    folder, _ = together
    if not (folder / "grpo").is_dir():
        pytest.skip("FSDP and DeepSpeed")
    (expected, (step,)), (got, (other_step,)) = result(alone / "grpo"), result(folder / "grpo")
    for name in ("reward", "reflections", "grad_norm", "num_tokens"):
        assert other_step[name] == pytest.approx(step[name], rel=1e-3), name
    assert step["grad_norm"] > 0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_ask_each_row_once(alone, together):
    folder, _ = together
    if not (folder / "answers").is_dir():
        pytest.skip("FSDP and DeepSpeed")
    evaluations = []
    for run in (alone, folder):
        history = json.loads((run / "answers" / "history.json").read_text())
        (log,) = [log for log in history if "eval_loss" in log]
        evaluations.append({name: share for name, share in log.items() if "exact_match" in name})
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 3
    assert (
        evaluations[0]["eval_exact_match"] == 0.6
    )  # three scenes of five rows, of which one process asks two of three
