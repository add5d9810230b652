"""`vreflection check`: reads all data of a recipe without a model, and reports."""

import argparse

from vreflection_hub_card.errors import InputError, first_line

from ..recipe_files import RECIPES, find_file, shipped


# Of rows that are trained on by reward, one at a time: nothing limits their lengths, and these are called long.
UNPACKED = {"max_length": None, "long_length": 4096}


def add_parser(commands) -> None:
    """Adds `vreflection check`."""
    parser = commands.add_parser(
        "check",
        help="read all data of a recipe before training on it",
        usage="vreflection check RECIPE [--decode] [--histogram FILE] [--option value ...]",
        description="Reads all data of a recipe without a model: missing pictures, wrong boxes, lengths of samples and "
        f"paths, how full the packs get. Exits with 1 where rows can't be trained on. Recipes that come with the package: {shipped(RECIPES)}.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe of the package")
    # Parsed in `run`, for they may stand among the recipe's own options.
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`vreflection check`."""
    find_file(options.recipe, RECIPES, "recipe")
    own = argparse.ArgumentParser(prog="vreflection check", add_help=False)
    own.add_argument("--decode", action="store_true", help="read the pixels of every picture, not only its header")
    own.add_argument("--histogram", metavar="FILE", help="draw the lengths")
    known, arguments = own.parse_known_args(options.options)

    from ..data.data_report import DataReport, format_report, report_data
    from ..data.sources import load_rows
    from ..recipe import build_processor, parse
    from ..stages import REWARD_STAGE, STAGES

    script, model_args, args = parse([options.recipe, *arguments, "--use_cpu", "true"])  # no model is run

    def read(sources: list[dict], packed: bool, batch_size: int) -> DataReport:
        return report_data(
            load_rows(sources, streaming=script.streaming, seed=args.seed),
            build_processor(script, model_args),
            UNPACKED if args.stage == REWARD_STAGE else args.packing_rule,
            packed=packed,
            reflect=STAGES[args.stage].reflects,
            decode=known.decode,
            batch_size=batch_size,
            num_proc=getattr(args, "dataset_num_proc", None),
            seed=getattr(args, "packing_seed", None),
        )

    try:
        report = read(script.sources, getattr(args, "sample_packing", False), args.per_device_train_batch_size)
        bad_rows = report.bad_rows
        print(format_report(report))
        if script.eval_datasets is not None:
            evaluated = read(script.eval_datasets, False, args.per_device_eval_batch_size)
            bad_rows += evaluated.bad_rows
            print(f"\nRows of the evaluation:\n{format_report(evaluated)}")
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    except OSError:
        raise
    except Exception as error:  # whatever a library makes of a value that it can't use
        raise InputError(f"{options.recipe}: can't be checked ({first_line(error)})") from error
    if known.histogram is not None:
        report.save_histogram(known.histogram)
    return 1 if bad_rows and getattr(args, "on_bad_row", "error") == "error" else 0
