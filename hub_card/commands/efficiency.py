"""`vreflection efficiency`: what reflections cost in decoding."""

import argparse
import json
import shlex
from pathlib import Path

import torch

from ..checkpoints import checkpoint_folder, load_checkpoint
from ..efficiency.bench import Pair, random_model
from ..efficiency.loading import measure_loading
from ..efficiency.measure import BATCH_SIZES, measure
from ..efficiency.report import render
from ..efficiency.shapes import SHAPES
from ..errors import InputError
from ..evaluation.report import fill_block
from .arguments import check_writable, positive, writing


OUTPUT = Path("efficiency.json")


def add_parser(commands) -> None:
    """Adds `vreflection efficiency`."""
    parser = commands.add_parser(
        "efficiency",
        help="measure speed and memory of decoding against the stock Qwen2.5-VL",
        description="Times prefill, text steps and latent steps of a checkpoint, or of random weights, and of the stock class "
        "over the same weights, in turns; writes a result file and prints a table.",
    )
    parser.add_argument(
        "model", nargs="?", help="a folder or a Hub id (default: the checkpoint embedded in the package)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a checkpoint")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=positive, default=7, help="default: %(default)s")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=list(BATCH_SIZES), help="default: 1 8 32")
    parser.add_argument("--latent-steps", type=positive, default=8, help="default: %(default)s")
    parser.add_argument("--picture-side", type=positive, default=12, help="in tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="a Markdown file that gets the table between <!-- efficiency -->"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection efficiency`."""
    if options.shape and options.model:
        raise InputError(f"--shape {options.shape} has random weights: leave {options.model} out")
    check_writable(options.output)
    if options.document is not None:
        fill(options.document, "")  # before the long work
    if options.shape:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = random_model(SHAPES[options.shape], options.seed, device)
        source, loading = SHAPES[options.shape].note, None
    else:
        folder = checkpoint_folder(options.model)
        model, _ = load_checkpoint(folder, options.device)
        source, loading = f"the checkpoint {folder.resolve().name}", measure_loading(folder)
    pair = Pair(model, side=options.picture_side, seed=options.seed)
    result = {
        "command": command(options),
        "source": source,
        "loading": loading,
        **measure(pair, options.rounds, tuple(options.batch_sizes), options.latent_steps),
    }
    table = render(result)
    with writing(options.output):
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.document is not None:
        with writing(options.document):
            options.document.write_text(fill(options.document, table))
    print(table)


def fill(document: Path, table: str) -> str:
    """The document with the table between its markers.

    Raises:
        InputError: A document that can't be read, or without markers.
    """
    try:
        return fill_block(document.read_text(encoding="utf-8"), "efficiency", table)
    except (OSError, ValueError) as error:
        raise InputError(f"{document}: {error}") from error


def command(options: argparse.Namespace) -> str:
    """The command as it can be repeated, without local paths."""
    words = ["vreflection", "efficiency"]
    words += ["--shape", options.shape] if options.shape else []
    words += [Path(options.model).name] if options.model else []
    words += ["--rounds", str(options.rounds), "--batch-sizes", *map(str, options.batch_sizes)]
    words += ["--latent-steps", str(options.latent_steps), "--picture-side", str(options.picture_side)]
    return shlex.join([*words, "--seed", str(options.seed)])
