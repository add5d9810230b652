"""`vreflection convert`: other layouts of the same weights into ours."""

import argparse
import sys
from pathlib import Path

from .arguments import quiet_transformers


def add_parser(commands) -> None:
    """Adds `vreflection convert`."""
    parser = commands.add_parser(
        "convert",
        help="turn the authors' checkpoint, or a stock backbone, into one that loads here",
        description="Turns a checkpoint of the authors' released layout, one of LVR's or a stock Qwen2.5-VL or Qwen3-VL into a "
        "V-Reflection checkpoint, with its token names and its decoding code. At most one file of weights is in memory.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or a Hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write, which must not exist or be empty")
    parser.add_argument(
        "--inference-only",
        action="store_true",
        help="leave out what only training and heatmaps need: BCM, and DAC unless the checkpoint decodes by it",
    )
    parser.add_argument("--revision", help="a branch, tag or commit of a Hub id")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection convert`."""
    quiet_transformers()
    from vreflection_hub_card.conversion.converter import LayoutError, convert
    from vreflection_hub_card.conversion.folders import check_free
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder

    check_free(options.out)
    source = checkpoint_folder(options.source, options.revision)
    try:
        done = convert(source, options.out, options.inference_only)
    except LayoutError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        raise
    modules = [name.upper() for name in ("bcm", "dac") if getattr(done.config, f"has_{name}")]
    found = f"with {' and '.join(modules)}" if modules else "without BCM and DAC"
    print(f"{options.out}: {done.weights} weights, {done.size / 2**20:,.0f} MiB in {done.files} files, {found}.")
