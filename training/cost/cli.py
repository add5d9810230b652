"""`vreflection-train cost`: what reflections cost in training, in time and memory, beside trl's plain fine-tuning.

All arms train the same weights on the same samples in one run, in turns. Each step runs in the arm's own `train()`; a step
is forward, backward, clipping and the optimiser, without reading and collating data.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from datasets import disable_progress_bars

from vreflection_hub_card.efficiency.shapes import SHAPES
from vreflection_hub_card.evaluation.report import fill_block

from .measure import measure
from .report import render


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `vreflection-train cost`."""
    parser = argparse.ArgumentParser(
        prog="vreflection-train cost",
        description=(
            "Measures training steps of trl's plain fine-tuning, of ours, of stage 1 and of stage 2 with each "
            "`latent_inputs`, on random weights and samples: tokens per second and peak memory; and packing against padding."
        ),
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="the backbone (default: small, for a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="timed rounds (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
    parser.add_argument(
        "--render",
        nargs=2,
        type=Path,
        metavar=("FILE", "DOCUMENT"),
        help="measure nothing; put the tables of a result file between <!-- cost --> and <!-- /cost --> of a document",
    )
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.render is None):
        parser.error("give either --output or --render")
    disable_progress_bars()  # of measuring rows, between our own
    try:
        if options.render is not None:
            file, document = options.render
            document.write_text(fill_block(document.read_text(), "cost", render(json.loads(file.read_text()))))
            return 0
        result = measure(SHAPES[options.shape], options.device, options.repeats, options.seed)
    except (ValueError, OSError) as error:
        print(f"vreflection-train cost: {error}", file=sys.stderr)
        return 2
    words = sys.argv[1:] if arguments is None else arguments
    result = {"command": shlex.join(["vreflection-train", "cost", *words]), **result}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    for goal in result["goals"]:
        print(f"{'met' if goal['met'] else 'NOT MET':8} {goal['goal']}: {goal['value']:.3f} (goal {goal['bound']})")
    return 0
