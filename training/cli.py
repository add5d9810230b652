"""`vreflection-train RECIPE.yaml`: runs a stage from a recipe; the command line overrides the file."""

import argparse
import os
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import set_seed
from transformers.image_utils import SizeDict
from trl import ModelConfig, TrlParser

from .configs import VReflectionScriptArguments, VReflectionSFTConfig


RECIPES = Path(__file__).parent / "recipes"
ACCELERATE_CONFIGS = Path(__file__).parent / "accelerate"
USAGE = """\
usage: vreflection-train RECIPE [--option value ...]                            train, in this process
       vreflection-train RECIPE --accelerate_config NAME [--option value ...]   train, on several GPUs
       vreflection-train check RECIPE [--decode] [--histogram FILE] [--option value ...]
                                                                                read all data, without a model
       vreflection-train merge ADAPTER OUTPUT                                   make a plain checkpoint of a LoRA adapter
       vreflection-train cost --output FILE                                     measure speed and memory of training
       vreflection-train study [--form quick|full] [--hours H]                  the paper's ablations with the tiny model

Recipes that come with the package: {recipes}.
Configurations of accelerate that come with the package: {engines}; options of `accelerate launch` go with them."""


def shipped(folder: Path) -> str:
    """Names of the YAML files that come with the package."""
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))


def find_file(name: str, folder: Path, what: str) -> Path:
    """A YAML file: a path, or the name of one that comes with the package."""
    for path in (Path(name), folder / f"{name}.yaml", folder / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No {what} {name!r}. With the package come: {shipped(folder)}.")


def parse(arguments: list[str]) -> tuple[VReflectionScriptArguments, ModelConfig, VReflectionSFTConfig]:
    """Reads a recipe and the options after it."""
    script, model_args, args = _parser().parse_args_and_config(_with_recipe(arguments))
    if script.from_scratch == (model_args.model_name_or_path is not None):
        raise ValueError("Set either `model_name_or_path` or `from_scratch: true`.")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != args.world_size:
        raise ValueError(f"{launched} processes were launched, and each would train alone: is there a usable GPU?")
    if script.save_dtype is not None and (launched > 1 or model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError("`save_dtype` converts in one process, and no quantized model: leave it out.")
    return script, model_args, args


def _parser() -> TrlParser:
    return TrlParser((VReflectionScriptArguments, ModelConfig, VReflectionSFTConfig), prog="vreflection-train")


def _with_recipe(arguments: list[str]) -> list[str]:
    return ["--config", str(find_file(arguments[0], RECIPES, "recipe")), *arguments[1:]]


def build_processor(script: VReflectionScriptArguments, model_args: ModelConfig):
    """Loads the processor alone, with the recipe's pixel limits."""
    from .loading import build_tiny, load_processor

    if script.from_scratch:
        processor = build_tiny(0)[1]
    else:
        options = script.model_options or {}
        processor = load_processor(model_args.model_name_or_path, model_args.model_revision, **options)
    return limit_pixels(processor, script)


def limit_pixels(processor, script: VReflectionScriptArguments):
    """Writes the recipe's pixel limits into the processor, so that they hold wherever it is used."""
    before = processor.image_processor.size
    least = before["shortest_edge"] if script.min_pixels is None else script.min_pixels
    most = before["longest_edge"] if script.max_pixels is None else script.max_pixels
    if not 0 < least <= most:
        raise ValueError(f"`min_pixels` must be above 0 and not above `max_pixels`, got {least} and {most}.")
    processor.image_processor.size = SizeDict(shortest_edge=least, longest_edge=most)
    return processor


def build_trainer(script: VReflectionScriptArguments, model_args: ModelConfig, args: VReflectionSFTConfig):
    """Loads what a recipe names and puts its trainer together."""
    from .data.sources import load_rows
    from .loading import build_tiny, load_model_and_processor
    from .trainer import VReflectionSFTTrainer

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
        model, processor = build_tiny(args.seed, **options)
    else:
        options["revision"] = model_args.model_revision
        model, processor = load_model_and_processor(model_args.model_name_or_path, **options)
    if script.latent_feedback is not None:
        model.generation_config.latent_feedback = script.latent_feedback
    limit_pixels(processor, script)
    shuffle_buffer = None if args.train_sampling_strategy == "sequential" else script.shuffle_buffer
    rows = load_rows(script.sources, streaming=script.streaming, seed=args.seed, shuffle_buffer=shuffle_buffer)
    return VReflectionSFTTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=rows,
        peft_config=peft_config,
        sources=script.sources,
        from_scratch=script.from_scratch,
    )


def train(trainer, script: VReflectionScriptArguments) -> bool:
    """Runs one stage and saves the checkpoint in the trainer's `output_dir`; false if the run was ended before its time."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.preemption.requested:
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


def launch(arguments: list[str]) -> int:
    """Starts one process per GPU through `accelerate launch`, with what the recipe's parser doesn't know."""
    at = arguments.index("--accelerate_config")
    if at + 1 == len(arguments):
        raise ValueError(f"Give a name or a file after --accelerate_config: {shipped(ACCELERATE_CONFIGS)}.")
    engine = find_file(arguments[at + 1], ACCELERATE_CONFIGS, "configuration of accelerate")
    arguments = arguments[:at] + arguments[at + 2 :]
    *_, for_accelerate = _parser().parse_args_and_config(
        _with_recipe(arguments), return_remaining_strings=True, separate_remaining_strings=True
    )
    own, unknown = [], list(for_accelerate)  # those that the parser left over, in the order in which they came
    for word in arguments:
        unknown.pop(0) if unknown and word == unknown[0] else own.append(word)
    command = ["--config_file", str(engine), *for_accelerate, "-m", "vreflection_training", *own]
    launch_command(launch_command_parser().parse_args(command))
    return 0


def check(arguments: list[str]) -> int:
    """Reads all data of a recipe without a model, and reports."""
    from .data.check import check as check_rows
    from .data.check import format_report
    from .data.sources import load_rows

    parser = argparse.ArgumentParser(prog="vreflection-train check", add_help=False)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--histogram")
    options, arguments = parser.parse_known_args(arguments)
    script, model_args, args = parse([*arguments, "--use_cpu", "true"])  # no model is run: any machine will do
    rows = load_rows(script.sources, streaming=script.streaming, seed=args.seed)
    report = check_rows(rows, build_processor(script, model_args), args, decode=options.decode)
    print(format_report(report))
    if options.histogram is not None:
        report.save_histogram(options.histogram)
    return 1 if report.bad_rows and args.on_bad_row == "error" else 0


def merge(arguments: list[str]) -> int:
    """Makes a plain checkpoint of an adapter."""
    from .adapters import merge_adapter

    if len(arguments) != 2:
        raise ValueError("usage: vreflection-train merge ADAPTER OUTPUT")
    merge_adapter(*arguments)
    return 0


def cost(arguments: list[str]) -> int:
    """Measures what reflections cost in training."""
    from .cost.cli import main as measure_cost

    return measure_cost(arguments)


def study(arguments: list[str]) -> int:
    """Runs the ablations with the tiny model."""
    from .study.cli import main as run_study

    return run_study(arguments)


def run(trainer, script: VReflectionScriptArguments) -> int:
    """Trains; whatever a person can mend is one line."""
    from .checkpoints import CheckpointError
    from .data.rows import BadRow

    try:
        finished = train(trainer, script)
    except (BadRow, CheckpointError, FloatingPointError, OSError) as error:
        # From a worker of the data loader an error comes with its traceback as the message; its last line says it.
        print(f"vreflection-train: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    if not finished and trainer.is_world_process_zero():
        print(
            f"vreflection-train: ended by SIGTERM after step {trainer.state.global_step} of {trainer.state.max_steps}, with a "
            "checkpoint; go on with --resume_from_checkpoint true",
            file=sys.stderr,
        )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `vreflection-train`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(recipes=shipped(RECIPES), engines=shipped(ACCELERATE_CONFIGS)))
        return 0
    try:
        if (command := {"check": check, "merge": merge, "cost": cost, "study": study}.get(arguments[0])) is not None:
            return command(arguments[1:])
        if "--accelerate_config" in arguments:
            return launch(arguments)
        script, model_args, args = parse(arguments)
        trainer = build_trainer(script, model_args, args)
    except (ValueError, OSError, ImportError) as error:  # a recipe, model, data set or engine that won't do
        print(f"vreflection-train: {error}", file=sys.stderr)
        return 2
    return run(trainer, script)
