"""The shipped configurations of accelerate hold what they promise, as accelerate itself reads them."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import StateDictType

import vreflection_training


FOLDER = Path(vreflection_training.__file__).parent / "accelerate"
VARIABLES = ("ACCELERATE_", "FSDP_")
ENGINES = {
    "single_gpu": (DistributedType.NO, 1),
    "ddp_8gpu": (DistributedType.MULTI_GPU, 8),
    "zero2": (DistributedType.DEEPSPEED, 8),
    "zero3": (DistributedType.DEEPSPEED, 8),
    "zero3_offload": (DistributedType.DEEPSPEED, 8),
    "fsdp2": (DistributedType.FSDP, 8),
}


def load(name: str) -> ClusterConfig:
    return load_config_from_file(str(FOLDER / f"{name}.yaml"))


def engine_environment(config: ClusterConfig) -> dict[str, str]:
    """The variables that `accelerate launch` hands to the processes for the engine of a file."""
    flags = ["--mixed_precision", config.mixed_precision, "--dynamo_backend", "no"]
    for key, value in {**config.deepspeed_config, **config.fsdp_config}.items():
        flags += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    args = launch_command_parser().parse_args([*flags, "script.py"])
    args.use_fsdp = config.distributed_type == DistributedType.FSDP
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    args.num_processes, args.num_machines, args.main_process_port = config.num_processes, 1, None
    prepare = prepare_multi_gpu_env if args.use_fsdp else lambda args: prepare_deepspeed_cmd_env(args)[1]
    return {key: value for key, value in prepare(args).items() if key.startswith(VARIABLES)}


@pytest.fixture
def environment(monkeypatch):
    """Lets accelerate's plugins read a file's values, and nothing of this machine's."""
    for key in list(os.environ):
        if key.startswith(VARIABLES):
            monkeypatch.delenv(key)

    def set_environment(name: str):
        for key, value in engine_environment(load(name)).items():
            monkeypatch.setenv(key, value)

    return set_environment


def test_the_table_names_every_file():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_processes_and_precision(name):
    config = load(name)
    assert (config.distributed_type, config.num_processes) == ENGINES[name]
    assert config.mixed_precision == "bf16" and config.num_machines == 1 and not config.use_cpu


@pytest.mark.parametrize("name", ENGINES)
def test_every_key_is_an_option_of_accelerate_launch(name):
    # accelerate copies unknown keys into its arguments without a word.
    config = load(name)
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.deepspeed_config, *config.fsdp_config} <= known


@pytest.mark.parametrize(
    "name, stage, device", [("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu")]
)
def test_deepspeed(name, stage, device, environment):
    environment(name)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16")
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == device
    # Stage 3 loads in parts, and its final checkpoint holds weights.
    assert plugin.zero3_init_flag is (stage == 3)
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    # The recipe's values hold: the Trainer fills in what is "auto", and only that.
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert plugin.deepspeed_config.get(key, "auto") == "auto"
    assert plugin.deepspeed_config["bf16"]["enabled"]


def test_fsdp2(environment):
    environment("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.activation_checkpointing is False  # the recipe's gradient_checkpointing does it
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    # What the run's end needs: the same plugin turned to one whole checkpoint.
    plugin.set_state_dict_type("FULL_STATE_DICT")
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT


def test_fsdp2_wraps_layers_and_leaves_the_small_modules_to_the_root(environment, model):
    environment("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    wrapped = {
        name
        for name, module in model.named_modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    }
    assert wrapped == {
        *(f"model.language_model.layers.{number}" for number in range(4)),
        *(f"model.visual.blocks.{number}" for number in range(5)),
    }
