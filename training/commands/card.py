"""`vreflection card`: the model card of a checkpoint."""

import argparse

from .arguments import checkpoint_path, quiet_transformers


def add_parser(commands) -> None:
    """Adds `vreflection card`."""
    parser = commands.add_parser(
        "card",
        help="write a checkpoint's model card",
        description="Writes README.md and .eval_results/ into a checkpoint's folder, from the checkpoint itself, from what "
        "its training left there, and from result files. What was there under these names is replaced.",
    )
    parser.add_argument("checkpoint", type=checkpoint_path, metavar="CKPT", help="the checkpoint's folder")
    parser.add_argument(
        "--repo", metavar="ID", help="the Hub id that it will have (default: the folder's name is shown)"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="result files of vreflection evaluate, of these weights",
    )
    parser.add_argument("--study", metavar="FILE", help="tables.md of experiments/study")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the base model, where training didn't record it")
    parser.add_argument("--license", metavar="ID", help="by default publish takes the base model's, from the Hub")
    parser.add_argument("--license-name", metavar="NAME", help="with --license other, its name")
    parser.add_argument("--license-link", metavar="URL", help="with --license other, where its text is")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="ID",
        help="Hub ids of data, besides the recorded ones; local data are named as such",
    )
    parser.add_argument("--tags", nargs="+", default=[], metavar="TAG", help="more tags")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection card`."""
    quiet_transformers()
    from vreflection_hub_card.card import check_card, write_card

    path = write_card(
        options.checkpoint,
        options.repo,
        options.results,
        base_model=options.base_model,
        license=options.license,
        license_name=options.license_name,
        license_link=options.license_link,
        datasets=options.datasets,
        tags=options.tags,
        study=options.study,
    )
    check_card(options.checkpoint)
    print(path)
