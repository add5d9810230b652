"""From a recipe and the options after it to a trainer: YAML files, their parser, and what they name."""

import os
from dataclasses import fields
from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, TrlParser

from vreflection_hub_card.errors import InputError, reading
from vreflection_hub_card.inference.checkpoints import set_pixel_limits

from .grpo_config import VReflectionGRPOConfig
from .recipe_files import RECIPES, find_file
from .recipe_yaml import check_recipe, read_yaml
from .script_arguments import VReflectionGRPOScriptArguments, VReflectionScriptArguments
from .sft_config import VReflectionSFTConfig
from .stages import REWARD_STAGE


Config = VReflectionSFTConfig | VReflectionGRPOConfig
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def read_recipe(arguments: list[str], **kwargs) -> tuple:
    """What trl's parser makes of a recipe and the options after it.

    Raises:
        InputError: No such recipe, a wrong value, settings that contradict each other.
    """
    recipe = find_file(arguments[0], RECIPES, "recipe")
    content = read_yaml(recipe)
    if stage_of(content, arguments[1:]) == REWARD_STAGE:
        own = VReflectionGRPOScriptArguments, ModelConfig, VReflectionGRPOConfig
    else:
        own = VReflectionScriptArguments, ModelConfig, VReflectionSFTConfig
    parser = RecipeParser(own, prog="vreflection train RECIPE")
    check_recipe(recipe, content, parser.dataclass_types)
    with reading(recipe, "can't be used"):
        return parser.parse_args_and_config(["--config", str(recipe), *arguments[1:]], **kwargs)


def stage_of(recipe: dict, options: list[str]) -> str | None:
    """The stage that a recipe's content and the options after it name, which decides what else they may hold."""
    given = [following for option, following in zip(options, options[1:]) if option == "--stage"]
    given += [option.removeprefix("--stage=") for option in options if option.startswith("--stage=")]
    return (given or [recipe.get("stage")])[-1]


class RecipeParser(TrlParser):
    """trl's parser, whose errors are of one line."""

    def set_defaults_with_config(self, **config) -> list[str]:
        """Takes numbers as the command line has them: only texts are converted to the type of their field."""
        numbers = {key: str(value) for key, value in config.items() if type(value) in (int, float)}
        return super().set_defaults_with_config(**config | numbers)

    def error(self, message: str):
        """Raises instead of printing all options."""
        raise InputError(message)


def parse(arguments: list[str]) -> tuple[VReflectionScriptArguments, ModelConfig, Config]:
    """Reads a recipe and the options after it; raises an InputError as [`read_recipe`], or where no run can start."""
    script, model_args, args = read_recipe(arguments)
    if (script.from_scratch is None) == (model_args.model_name_or_path is None):
        raise InputError("Set either `model_name_or_path` or `from_scratch`.")
    if not model_args.use_peft:
        for option in fields(model_args):
            given, default = getattr(model_args, option.name), getattr(ModelConfig, option.name, None)
            if option.name.startswith(("lora_", "use_rslora", "use_dora")) and given != default:
                raise InputError(
                    f"`{option.name}` is for adapters: set `use_peft: true`, or leave it out, got {given!r}."
                )
    for name in ("eval_on_start", "predict_with_generate"):
        if getattr(args, name, False) and script.eval_datasets is None:
            raise InputError(f"`{name}` needs `eval_datasets`: give these, too, or set it to false.")
    if args.model_init_kwargs is not None:
        raise InputError("`model_init_kwargs` would be ignored: set `model_options` instead.")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise InputError(f"{launched} processes were launched, and each would train alone: is there a usable GPU?")
    if (args.eval_strategy == "no") != (script.eval_datasets is None):
        raise InputError(
            "An evaluation needs both, when and on what: set `eval_strategy` and `eval_datasets`, or neither of them; got "
            f"{args.eval_strategy.value!r} and {script.eval_datasets!r}."
        )
    if script.save_dtype not in (None, *SAVE_DTYPES):
        raise InputError(f"`save_dtype` must be one of {', '.join(SAVE_DTYPES)}, got {script.save_dtype!r}.")
    if script.save_dtype is not None and (launched > 1 or model_args.load_in_4bit or model_args.load_in_8bit):
        raise InputError("`save_dtype` converts in one process, and no quantized model: leave it out.")
    check_reporting(args.report_to)
    return script, model_args, args


def check_reporting(report_to: list[str]) -> None:
    """Checks that what a run reports to is installed, and that wandb needs to ask for no key; without the network.

    Raises:
        InputError: The name in `report_to`, and what to do.
    """
    available = get_available_reporting_integrations()
    for name in report_to:
        if name not in (*available, "all", "none"):
            raise InputError(
                f"`report_to`: {name!r} is not installed or unknown; there are {', '.join(available) or 'none'}."
            )
    if "wandb" in report_to and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        if wandb.api.api_key is None:
            raise InputError(
                "`report_to`: wandb has no login: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline."
            )


def build_processor(script: VReflectionScriptArguments, model_args: ModelConfig):
    """Loads the processor alone, with the recipe's pixel limits."""
    from .loading import build_tiny, load_processor

    if script.from_scratch:
        processor = build_tiny(0, script.from_scratch)[1]
    else:
        options = script.model_options or {}
        processor = load_processor(model_args.model_name_or_path, model_args.model_revision, **options)
    set_pixel_limits(processor.image_processor, script.min_pixels, script.max_pixels)
    return processor


def build_trainer(script: VReflectionScriptArguments, model_args: ModelConfig, args: Config):
    """Loads what a recipe names and puts its trainer together."""
    from .data.sources import load_rows
    from .loading import build_tiny, load_model_and_processor

    set_seed(args.seed)
    options = {"dtype": model_args.dtype or "float32", "attn_implementation": model_args.attn_implementation}
    peft_config = None
    if model_args.use_peft:
        from trl import get_peft_config

        from .adapters import get_quantization_config

        peft_config = get_peft_config(model_args)
        options["quantization_config"] = get_quantization_config(model_args)
    elif model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("A quantized model trains with adapters only: set `use_peft: true`.")
    options = {key: value for key, value in options.items() if value is not None} | (script.model_options or {})
    if script.from_scratch:
        model, processor = build_tiny(args.seed, script.from_scratch, **options)
    else:
        options["revision"] = model_args.model_revision
        model, processor = load_model_and_processor(model_args.model_name_or_path, **options)
    set_pixel_limits(processor.image_processor, script.min_pixels, script.max_pixels)
    shuffled = args.shuffle_dataset if args.stage == REWARD_STAGE else args.train_sampling_strategy != "sequential"
    shuffle_buffer = script.shuffle_buffer if shuffled else None
    rows = load_rows(script.sources, streaming=script.streaming, seed=args.seed, shuffle_buffer=shuffle_buffer)
    given = {
        "processing_class": processor,
        "train_dataset": rows,
        "eval_dataset": script.eval_datasets
        and load_rows(script.eval_datasets, streaming=script.streaming, seed=args.seed),
        "peft_config": peft_config,
        "sources": script.sources,
        "from_scratch": script.from_scratch is not None,
    }
    if args.stage == REWARD_STAGE:
        from .grpo_trainer import VReflectionGRPOTrainer
        from .rewards import REWARDS

        return VReflectionGRPOTrainer(model, [REWARDS[name] for name in script.reward_funcs], args, **given)

    from .sft_trainer import VReflectionSFTTrainer

    return VReflectionSFTTrainer(model, args, **given)


def train(trainer, script: VReflectionScriptArguments) -> bool:
    """Runs one stage and saves the checkpoint in the trainer's `output_dir`; false if the run was ended before its time."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.preemption.requested is not None:
        return False
    if script.save_dtype is not None:
        trainer.model.to(getattr(torch, script.save_dtype))
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        # A finished checkpoint holds no pickle.
        (Path(args.output_dir) / "training_args.bin").unlink(missing_ok=True)
    return True
