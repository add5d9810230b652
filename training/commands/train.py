"""`vreflection train`: runs a stage from a recipe; the command line overrides the file."""

import argparse
import sys

from vreflection_hub_card.errors import InputError, first_line, reading

from ..entry import INTERRUPTED
from ..recipe_files import ACCELERATE_CONFIGS, RECIPES, find_file, shipped


def add_parser(commands) -> None:
    """Adds `vreflection train`."""
    parser = commands.add_parser(
        "train",
        help="train from a recipe",
        usage="vreflection train RECIPE [--accelerate_config NAME] [--option value ...]",
        description="Trains what a recipe names. Options override its keys: those of VReflectionSFTConfig (of "
        "VReflectionGRPOConfig in stage grpo), of trl's ModelConfig and of VReflectionScriptArguments. Recipes that come with the package: "
        f"{shipped(RECIPES)}.",
        epilog=f"--accelerate_config starts several processes through `accelerate launch`, whose options go with it: "
        f"{shipped(ACCELERATE_CONFIGS)}, or a file.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe of the package")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`vreflection train`."""
    find_file(options.recipe, RECIPES, "recipe")
    arguments = [options.recipe, *options.options]
    if "--accelerate_config" in arguments:
        return launch(arguments)

    from vreflection_hub_card.publishing.hub_errors import TransportError, explain_hub_error
    from vreflection_hub_card.rows import BadRow

    from ..recipe import build_trainer, parse, train
    from ..run.checkpoint_folders import CheckpointError

    script, model_args, args = parse(arguments)
    try:
        trainer = build_trainer(script, model_args, args)
    except (ValueError, ImportError) as error:  # a model, data set or engine that can't be used
        raise InputError(str(error)) from error
    except TransportError as error:
        raise InputError(f"{options.recipe}: {explain_hub_error(error)}; nothing was trained") from error
    except OSError:
        raise
    except Exception as error:  # whatever a library makes of a value that it can't use
        raise InputError(f"{options.recipe}: no trainer can be built from it ({first_line(error)})") from error
    code = 0
    try:
        finished = train(trainer, script)
    except KeyboardInterrupt:
        if trainer.preemption.requested is None:
            raise
        finished, code = False, INTERRUPTED
    except (BadRow, CheckpointError, FloatingPointError, OSError) as error:
        # From a worker of the data loader an error comes with its traceback as the message; its last line is the error.
        print(f"vreflection: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    if not finished and trainer.is_world_process_zero():
        print(
            f"vreflection: ended by {trainer.preemption.requested.name} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, with a checkpoint; continue with --resume_from_checkpoint true",
            file=sys.stderr,
        )
    return code


def launch(arguments: list[str]) -> int:
    """Starts one process per GPU through `accelerate launch`, with what the recipe's parser doesn't know."""
    at = arguments.index("--accelerate_config")
    if at + 1 == len(arguments):
        raise InputError(f"Give a name or a file after --accelerate_config: {shipped(ACCELERATE_CONFIGS)}.")
    engine = find_file(arguments[at + 1], ACCELERATE_CONFIGS, "configuration of accelerate")
    arguments = arguments[:at] + arguments[at + 2 :]

    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    from ..recipe import read_recipe

    with reading(engine, "no configuration of accelerate"):
        load_config_from_file(str(engine))
    *_, for_accelerate = read_recipe(arguments, return_remaining_strings=True, separate_remaining_strings=True)
    own, unknown = [], list(for_accelerate)  # those that the parser left over, in the order in which they came
    for word in arguments:
        unknown.pop(0) if unknown and word == unknown[0] else own.append(word)
    command = ["--config_file", str(engine), *for_accelerate, "-m", "vreflection_training", *own]
    launch_command(launch_command_parser().parse_args(command))
    return 0
