"""`vreflection merge`: makes a plain checkpoint of an adapter."""

import argparse

from vreflection_hub_card.errors import reading


def add_parser(commands) -> None:
    """Adds `vreflection merge`."""
    parser = commands.add_parser(
        "merge",
        help="merge a LoRA adapter into its base",
        description="Writes a checkpoint in which the adapter is merged into the weights that it was trained on.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="the folder of a finished training with `use_peft`")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection merge`."""
    with reading(options.adapter, "can't be merged"):
        from ..adapters import merge_adapter

        merge_adapter(options.adapter, options.output)
