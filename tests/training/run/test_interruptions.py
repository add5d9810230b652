"""Killed, preempted and out of disk: what is left, and what a resumed run makes of it."""

import copy
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from run_helpers import Rows, moved, on_both_backbones
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTTrainer

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_training import VReflectionSFTConfig, VReflectionSFTTrainer
from vreflection_training.cli import main_train
from vreflection_training.data.numbered_rows import number_rows
from vreflection_training.recipe import train
from vreflection_training.run.checkpoint_folders import MARKER, find_checkpoint, whole_checkpoints
from vreflection_training.run.settings import describe_rows


SCENES = [dict(row) for row in glyphsearch_dataset("train", 24)]
for number, scene in enumerate(SCENES):  # of different lengths, so that packs depend on the order
    scene["messages"][0]["content"][1]["text"] += " red" * (number * 5 % 13)


def stream():
    return IterableDataset.from_generator(lambda: iter(SCENES))


@on_both_backbones
@pytest.mark.parametrize(
    "dataset, options",
    [
        (Rows(SCENES), {"sample_packing": True, "max_length": 260, "train_sampling_strategy": "random"}),
        pytest.param(
            Rows(SCENES),
            {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            stream(), {"sample_packing": True, "max_length": 260, "packing_lookahead": 5}, marks=pytest.mark.slow
        ),
    ],
    ids=["packs", "accumulated", "packs of a stream"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_trainer, checkpoint, model, tmp_path, dataset, options
):
    """The order of the data, the Bernoulli draws and the packs included; every step is logged."""
    other = copy.deepcopy(model)
    options = {"stage": "1", "max_steps": 5, "per_device_train_batch_size": 1, **options}
    straight = make_trainer(dataset, output_dir=str(tmp_path / "a"), **options)
    straight.train()
    saving = {"output_dir": str(tmp_path / "b"), "save_strategy": "steps", "save_steps": 1}
    make_trainer(dataset, trained=other, **options, **saving).train()
    fresh = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    resumed = make_trainer(dataset, trained=fresh, **options, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert not moved(model.state_dict(), fresh.state_dict())
    curves = [
        [
            {key: value for key, value in log.items() if key not in ("tokens_per_second", "latent_spread")}
            for log in run.state.log_history
            if "loss" in log
        ]
        for run in (straight, resumed)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 5
    assert curves[0][-1]["num_tokens"] > 0


RECIPE = """
from_scratch: qwen2_5_vl
dataset_name: glyphsearch
dataset_options: {{difficulty: mixed, split: train, count: 64}}
stage: 1
output_dir: {folder}
sample_packing: true
max_length: 700
per_device_train_batch_size: 1
max_steps: 12
learning_rate: 5.0e-4
save_steps: 2
save_total_limit: 2
logging_steps: 1
gradient_checkpointing: false
bf16: false
use_cpu: true
report_to: none
sample_every: 0
disable_tqdm: true
dataloader_pin_memory: false
"""


def write_recipe(folder):
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def start(recipe, *options):
    command = [sys.executable, "-m", "vreflection_training", str(recipe), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


def losses(folder):
    history = json.loads((Path(find_checkpoint(str(folder), True)) / "trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


@pytest.mark.slow
def test_killed_then_preempted_then_finished_equals_uninterrupted(tmp_path):
    assert main_train([str(write_recipe(tmp_path / "straight"))]) == 0

    broken = tmp_path / "broken"
    recipe = write_recipe(broken)
    process = start(recipe)
    wait_for(broken / "checkpoint-6" / MARKER, process)
    process.kill()
    process.wait()
    whole = [Path(path).name for path in whole_checkpoints(broken)]
    assert whole[:2] == ["checkpoint-2", "checkpoint-4"]  # nothing older went before the newer was whole

    process = start(recipe, "--resume_from_checkpoint", "true", "--dataloader_num_workers", "2")
    wait_for(broken / "checkpoint-8", process)
    os.killpg(process.pid, signal.SIGTERM)  # as schedulers do: the data loader's workers get it too
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    step = int(re.search(r"ended by SIGTERM after step (\d+) of 12", said).group(1))
    assert 8 <= step < 12 and not (broken / "model.safetensors").exists()
    assert Path(find_checkpoint(str(broken), True)).name == f"checkpoint-{step}"

    assert main_train([str(recipe), "--resume_from_checkpoint", "true"]) == 0
    straight, pieced = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "broken"))
    assert not moved(straight, pieced)
    assert losses(tmp_path / "straight") == losses(broken) and len(losses(broken)) == 12
    assert len(whole_checkpoints(broken)) == 2  # save_total_limit


@pytest.mark.slow
def test_a_run_that_fails_ends_with_its_workers(tmp_path):
    """Python ends workers by SIGTERM, which they ignore while the run goes on, and then waits for them."""
    recipe = write_recipe(tmp_path / "failing")
    code = """
import sys
from vreflection_training import cli, sft_trainer

class Failing(sft_trainer.VReflectionSFTTrainer):
    def compute_loss(self, *args, **kwargs):
        raise ValueError("on purpose")

sft_trainer.VReflectionSFTTrainer = Failing
sys.exit(cli.main_train(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, str(recipe), "--dataloader_num_workers", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode and "on purpose" in ran.stderr


def saving(folder, **options):
    return {
        "stage": "1",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": str(folder),
        **options,
    }


def test_a_checkpoint_that_was_being_written_is_never_resumed_from(make_trainer, tmp_path):
    make_trainer(**saving(tmp_path)).train()
    (tmp_path / "checkpoint-4" / MARKER).touch()
    trainer = make_trainer(**saving(tmp_path))
    with pytest.raises(ValueError, match="checkpoint-4 was being written when its run ended"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert find_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-2")
    trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-4" / MARKER).exists()  # written anew
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "rng_state_1.pth").touch()  # a rank died before another had begun
    assert find_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-4")


def test_resuming_from_nothing_says_so(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="No whole checkpoint to resume from in"):
        make_trainer(**saving(tmp_path / "new")).train(resume_from_checkpoint=True)
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="weights is no checkpoint of a run: it has no trainer_state.json"):
        make_trainer(**saving(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "weights"))


def test_a_stage_is_not_resumed_from_another(make_trainer, tmp_path):
    make_trainer(**saving(tmp_path / "one")).train()
    trainer = make_trainer(**saving(tmp_path / "two", stage="2"))
    message = "belongs to stage '1', and this run is stage '2'.*--model_name_or_path .*checkpoint-4"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    (tmp_path / "one" / "checkpoint-4" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="vreflection merge .*checkpoint-4 MERGED`, and start with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learning_rate": 1e-4}, "`learning_rate` was 0.001 and is 0.0001"),
        ({"weight_decay": 0.1}, "`weight_decay` was 0.0 and is 0.1"),
        ({"per_device_train_batch_size": 1}, "`samples a step` was 2 and is 1"),
        ({"seed": 7}, "`seed` was 42 and is 7"),
        ({"bf16": True}, "`bf16` was False and is True"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` was None and is 5.0"),
        ({"alignment": "symmetric"}, "`alignment` was 'stochastic' and is 'symmetric'"),
        ({"dataset": Rows(SCENES[:8])}, "`training rows` was '8 rows, .*' and is '8 rows"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings_or_rows(make_trainer, finished_run, change, message):
    with pytest.raises(ValueError, match=message + ".*Set them back to resume, or begin a new run from its weights"):
        make_trainer(**{**saving(finished_run), **change}).train(resume_from_checkpoint=True)


def test_a_run_is_not_resumed_with_other_pictures_or_another_model(make_trainer, finished_run):
    trainer = make_trainer(**saving(finished_run))
    before = copy.copy(trainer.processing_class.image_processor.size), trainer.model.config.region_pooling
    try:
        trainer.processing_class.image_processor.size.longest_edge -= 1
        trainer.model.config.region_pooling = "roi_align"
        with pytest.raises(ValueError, match="`region_pooling` was 'patch' and is 'roi_align', .*`max_pixels` was"):
            trainer.train(resume_from_checkpoint=True)
    finally:
        trainer.processing_class.image_processor.size, trainer.model.config.region_pooling = before


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, checkpoint, processor):
    """The folder of a run of three steps, whose epoch has four, with checkpoints at 2 and 3."""
    folder = tmp_path_factory.mktemp("finished")
    options = {
        **saving(folder, max_steps=3),
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        **{"train_sampling_strategy": "sequential", "bf16": False, "use_cpu": True, "gradient_checkpointing": False},
        **{"disable_tqdm": True, "dataloader_pin_memory": False, "max_grad_norm": 1e9, "report_to": "none"},
    }
    model = VReflectionForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    VReflectionSFTTrainer(
        model,
        VReflectionSFTConfig(**options),
        processing_class=processor,
        train_dataset=glyphsearch_dataset("train", 8),
    ).train()
    return folder


def test_a_run_that_stopped_at_a_bad_row_may_go_on_without_it(make_trainer, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    trainer = make_trainer(**saving(tmp_path, on_bad_row="skip"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_finished_run_that_is_resumed_trains_no_step_more(make_trainer, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    trainer = make_trainer(**saving(tmp_path, max_steps=3))
    trainer.train(resume_from_checkpoint=True)
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert trainer.state.global_step == 3
    assert not moved(last, {name: value for name, value in trainer.model.state_dict().items() if name in last})


@pytest.mark.parametrize(
    "name, damage",
    [
        ("optimizer.pt", "holds no optimiser state"),
        ("scheduler.pt", "holds no scheduler state"),
        ("rng_state.pth", "holds no random state"),
        ("model.safetensors", "holds no weights"),
        ("optimizer.pt cut", "optimizer.pt is damaged"),
        ("model.safetensors cut", "model.safetensors is damaged"),
        ("trainer_state.json cut", "trainer_state.json is damaged"),
        ("config.json cut", "config.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(finished_run, tmp_path, caplog, name, damage):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    name, _, cut = name.partition(" ")
    broken = tmp_path / "checkpoint-3" / name
    os.truncate(broken, broken.stat().st_size // 2) if cut else broken.unlink()
    assert find_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"{damage}.*resume from another checkpoint, or begin a new run"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-3"))
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=f"No whole checkpoint .*{damage}"):
        find_checkpoint(str(tmp_path), True)


def test_a_checkpoint_is_whole_only_when_it_is_on_the_disk(make_trainer, tmp_path, monkeypatch):
    """Until every file of the new one is synced it is marked, and the older one stays."""
    synced, fsync = [], os.fsync

    def record(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path, (tmp_path / "checkpoint-4" / MARKER).exists(), (tmp_path / "checkpoint-2").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    make_trainer(**saving(tmp_path, save_total_limit=1)).train()
    files = {path for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()}
    assert files <= {path for path, marked, older in synced if marked and older}
    assert (tmp_path / "checkpoint-4", False, True) in synced  # without its marker
    assert not (tmp_path / "checkpoint-2").exists()


def test_two_runs_do_not_share_a_folder(make_trainer, tmp_path):
    holder = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", holder, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is writing there"):
            make_trainer(**saving(tmp_path)).train()
        other.kill()
    make_trainer(**saving(tmp_path, max_steps=1)).train()


@pytest.mark.parametrize("step", [1, 4])
def test_a_gradient_that_is_not_finite_ends_the_run_and_is_not_saved(make_trainer, model, tmp_path, step):
    trainer = make_trainer(**saving(tmp_path, save_steps=1))
    weight = model.lm_head.weight
    weight.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == step - 1 else grad)
    with pytest.raises(FloatingPointError, match=f"The gradient of step {step} is not finite"):
        trainer.train()
    assert len(whole_checkpoints(tmp_path)) == step - 1 and torch.isfinite(weight).all()


def test_weights_that_are_not_finite_are_not_saved(make_trainer, model, tmp_path):
    trainer = make_trainer(**saving(tmp_path))
    trainer.train()
    torch.nn.init.constant_(model.model.bcm.norm.bias, math.inf)
    with pytest.raises(FloatingPointError, match="bcm.norm.bias is not finite"):
        trainer.save_model()
    trainer.state.global_step = 5
    with pytest.raises(FloatingPointError, match="bcm.norm.bias is not finite"):
        trainer._save_checkpoint(model, None)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "checkpoint-5").exists()


def test_a_process_that_does_not_save_leaves_the_folder_alone(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**saving(tmp_path))
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(type(trainer.args), "should_save", False)  # as on a second process
    trainer.save_model()
    assert set(tmp_path.iterdir()) == before


def test_ctrl_c_writes_a_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(**saving(tmp_path))
    trainer.add_callback(Ended(at_step=1, number=signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [Path(path).name for path in whole_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_without_room_is_found_before_the_first_step(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_trainer(**saving(tmp_path / "file")).train()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**20))
    trainer = make_trainer(**saving(tmp_path / "full"))
    with pytest.raises(
        OSError, match=r"full has no room for a checkpoint: about 0.0 GiB are needed, and 0.0 GiB free"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_run_can_go_on_after_a_preemption(make_trainer, tmp_path):
    trainer = make_trainer(**saving(tmp_path))
    trainer.add_callback(Ended(at_step=1, number=signal.SIGTERM))
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.preemption.requested == signal.SIGTERM
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and not trainer.preemption.requested


def test_a_preempted_run_that_saves_weights_alone_can_go_on(make_trainer, tmp_path):
    trainer = make_trainer(**saving(tmp_path, save_only_model=True))
    trainer.add_callback(Ended(at_step=1, number=signal.SIGTERM))
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert [folder.name for folder in tmp_path.glob("checkpoint-*") if (folder / "optimizer.pt").exists()] == [
        "checkpoint-1"
    ]


def test_of_two_runs_in_a_folder_the_checkpoint_to_go_on_with_is_named(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    for state in tmp_path.glob("checkpoint-*/trainer_state.json"):  # as times of whole seconds may be
        os.utime(state, (1e9, 1e9))
    assert find_checkpoint(str(tmp_path), True) == str(tmp_path / "checkpoint-3")
    os.utime(tmp_path / "checkpoint-2" / "trainer_state.json")
    with pytest.raises(ValueError, match=r"checkpoint-2 was written after .*checkpoint-3.*two runs"):
        find_checkpoint(str(tmp_path), True)
    assert find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_completes_the_run(make_trainer, tmp_path, number):
    trainer = make_trainer(**saving(tmp_path, save_strategy="no"))
    trainer.add_callback(Ended(at_step=4, number=number))
    assert train(trainer, SimpleNamespace(save_dtype=None))
    assert trainer.state.global_step == 4 and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_resumes_after_its_first_pass(make_trainer, checkpoint, model, tmp_path, workers):
    """It begins anew, and a resumed run goes on in the middle of that."""
    other = copy.deepcopy(model)
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "train_sampling_strategy": "random"}
    options["dataloader_num_workers"] = workers  # of which a stream of one shard uses one

    def rows():
        return IterableDataset.from_generator(lambda: iter(SCENES[:8])).shuffle(seed=3, buffer_size=8)

    def seen(trainer):
        batches = []
        record = trainer.record
        trainer.record = lambda batch, *args, **kwargs: (
            batches.append(batch["sample_ids"]) or record(batch, *args, **kwargs)
        )
        return batches

    straight = make_trainer(rows(), output_dir=str(tmp_path / "a"), **options)
    all_batches = seen(straight)
    straight.train()
    saved = {"output_dir": str(tmp_path / "b"), "save_strategy": "steps", "save_steps": 3}
    make_trainer(rows(), trained=other, **options, **saved).train()
    fresh = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    resumed = make_trainer(rows(), trained=fresh, **options, **saved)
    last_batches = seen(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert last_batches == all_batches[3:] and not moved(model.state_dict(), fresh.state_dict())
    passes = [sum(all_batches[start : start + 2], []) for start in (0, 2, 4)]
    assert [sorted(ids) for ids in passes] == 3 * [sorted(row["id"] for row in SCENES[:8])]


def test_a_checkpoint_is_pushed_when_it_is_whole(make_trainer, tmp_path, monkeypatch):
    pushed = []

    def push(trainer, folder):
        pushed.append((Path(folder).name, (Path(folder) / MARKER).exists()))

    monkeypatch.setattr(SFTTrainer, "_push_from_checkpoint", push)
    trainer = make_trainer(**saving(tmp_path))
    trainer.args.push_to_hub = True
    trainer.hub_model_id, trainer.push_in_progress = "me/it", None
    monkeypatch.setattr(SFTTrainer, "_finish_current_push", lambda trainer: None)
    trainer.train()
    assert pushed == [("checkpoint-2", False), ("checkpoint-4", False)]


class Ended(TrainerCallback):
    """Sends the signal once."""

    def __init__(self, at_step, number):
        self.at_step, self.number = at_step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step - 1:
            os.kill(os.getpid(), self.number)


def test_a_full_disk_leaves_the_previous_checkpoint(make_trainer, tmp_path):
    """A limit on the size of files stands for a full disk: writing fails in the same place."""
    trainer = make_trainer(**saving(tmp_path, save_total_limit=1))
    trainer.add_callback(FullDisk(at_step=3))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 couldn't be written .*GiB are free.*checkpoint-2 is whole"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [Path(path).name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-4").exists()
    make_trainer(**saving(tmp_path)).train(resume_from_checkpoint=True)


class FullDisk(TrainerCallback):
    """Lets no file grow beyond a megabyte from a step on, until the run has ended."""

    def __init__(self, at_step):
        self.at_step = at_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_no_older_checkpoint_goes_before_the_newer_is_whole(make_trainer, tmp_path, monkeypatch):
    """Dies when everything is written, but other ranks may not have finished."""
    trainer = make_trainer(**saving(tmp_path, save_total_limit=1))

    waits = []

    def die():
        waits.append(trainer.state.global_step)
        if waits.count(4) == 2:  # before writing, and after it
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [Path(path).name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    monkeypatch.undo()
    make_trainer(**saving(tmp_path, save_total_limit=1)).train(resume_from_checkpoint=True)
    assert [Path(path).name for path in whole_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_bad_rows_are_skipped_and_named_at_the_end(make_trainer, tmp_path, caplog):
    bad = copy.deepcopy(SCENES[1])
    bad["id"], bad["images"] = "bad", [str(tmp_path / "missing.png")]
    data = Rows([SCENES[0], bad, SCENES[2], SCENES[3]])
    with pytest.raises(ValueError, match="Sample bad: .*missing.png: no such file"):
        make_trainer(data, stage="1").train()
    for packing in (False, True):
        trainer = make_trainer(data, stage="1", on_bad_row="skip", sample_packing=packing, max_steps=4)
        trainer.train()  # more than one epoch
        (message,) = trainer.progress.skipped
        assert "missing.png" in message
        assert trainer.progress.report().startswith("1 rows were skipped; the first of them:\n- Sample bad: ")
        assert trainer.state.log_history[-2]["skipped_rows"] == 1
    alone = make_trainer(data, stage="1", on_bad_row="skip", per_device_train_batch_size=1, max_steps=6)
    alone.train()
    assert alone.state.global_step == 6 and len(alone.progress.skipped) == 1
    assert [log["num_tokens"] for log in alone.state.log_history if "loss" in log][1] > 0


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("packing", [False, True])
def test_skipped_rows_without_an_id_are_called_by_their_numbers(make_trainer, tmp_path, kind, packing):
    missing = str(tmp_path / "missing.png")
    rows = [{"question": "Who?", "answer": str(number)} for number in range(4)]
    rows[1] |= {"question": "<image>", "image": missing}
    rows[3] |= {"question": "<image>", "image": missing}
    rows = [{"image": None, **row} for row in rows]
    trainer = make_trainer(
        kind(rows), stage="1", on_bad_row="skip", sample_packing=packing, max_steps=6, train_sampling_strategy="random"
    )
    trainer.train()
    assert sorted(message.split(":")[0] for message in trainer.progress.skipped) == ["Sample row 1", "Sample row 3"]


@pytest.mark.parametrize("packing", [False, True])
def test_pictures_that_datasets_cannot_decode_are_skipped_by_name(make_trainer, packing):
    """Also where a column has `id`s for some rows alone."""
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, "PNG")
    pictures = [whole.getvalue(), whole.getvalue()[:60], b"no picture", whole.getvalue()]
    columns = {"id": ["a", "b", None, None], "question": ["Who?"] * 4, "answer": list("ABCD")}
    rows = Dataset.from_dict({**columns, "image": [{"bytes": one, "path": None} for one in pictures]})
    rows = rows.cast_column("image", datasets.Image())
    options = {"stage": "1", "sample_packing": packing, "max_steps": 2}
    trainer = make_trainer(rows, on_bad_row="skip", **options)
    trainer.train()
    names = sorted(message.split(":")[0] for message in trainer.progress.skipped)
    assert names == ["Sample b", "Sample row 2"]
    with pytest.raises(ValueError, match="Sample (b|row 2): it can't be decoded"):
        make_trainer(rows, **options).train()


def test_skipped_rows_do_not_count_in_the_evaluation(make_trainer, tmp_path):
    bad = [{**SCENES[0], "id": name, "images": [str(tmp_path / "missing.png")]} for name in "ab"]
    options = {"stage": "1", "on_bad_row": "skip", "per_device_eval_batch_size": 1}
    losses = [
        make_trainer(eval_dataset={"held_out": Rows(SCENES[:2] + more)}, **options).evaluate() for more in ([], bad)
    ]
    assert losses[0]["eval_held_out_loss"] == pytest.approx(losses[1]["eval_held_out_loss"], rel=1e-6)
    assert losses[0]["eval_held_out_loss_ce"] > 0
    assert "eval_loss" not in make_trainer(eval_dataset=Rows(bad), **options).evaluate()


def test_the_numbers_of_rows_are_no_other_data():
    rows = [{"question": "Who?", "answer": "I"}, {"question": "What?", "answer": "That"}]
    assert describe_rows(number_rows(rows)) == describe_rows(rows) != describe_rows(rows[::-1])


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_without_one_good_row_fails(make_trainer, tmp_path, packing):
    data = Rows([{**SCENES[0], "id": str(number), "images": [str(tmp_path / "missing.png")]} for number in range(4)])
    with pytest.raises(ValueError, match="Of 4 rows none can be|No row can be trained on"):
        make_trainer(data, stage="1", on_bad_row="skip", sample_packing=packing).train()
