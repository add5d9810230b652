"""`vreflection efficiency`: what reflecting costs, beside the stock Qwen2.5-VL."""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

from ..checkpoints import checkpoint_folder, find_device, load_checkpoint
from ..efficiency.measure import ATTENTIONS, BATCH_SIZES, CACHES, checkpoint_subject, measure, shape_subject
from ..efficiency.report import render
from ..efficiency.shapes import SHAPES
from ..errors import InputError
from .arguments import check_writable, natural, positive, writing


OUTPUT = Path("efficiency.json")


def add_parser(commands) -> None:
    """Adds `vreflection efficiency`."""
    parser = commands.add_parser(
        "efficiency",
        help="measure time and memory beside the stock Qwen2.5-VL",
        description="Measures a checkpoint, or random weights of a shape, beside the stock Qwen2.5-VL on the same weights, "
        "in turns in one process: parameters, memory, prefill, text and latent steps, answers a second, loading. Writes a "
        "JSON file and prints its tables. With OMP_NUM_THREADS=1 on a CPU it measures the processor's time, which a busy "
        "machine disturbs less.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder or a Hub id (default: the embedded checkpoint)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a checkpoint")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help=f"default: {OUTPUT}")
    parser.add_argument("--repeats", type=positive, default=9, metavar="N", help="timed rounds (default: 9)")
    parser.add_argument(
        "--text-steps", type=positive, default=16, metavar="N", help="of an answer, after its reflection (default: 16)"
    )
    parser.add_argument(
        "--side",
        type=positive,
        metavar="N",
        help="side of the pictures in merged patches (default: the shape's; for a checkpoint, as the scenes are drawn)",
    )
    parser.add_argument(
        "--attn-implementation",
        nargs="+",
        choices=ATTENTIONS,
        default=ATTENTIONS,
        help="default: all that can run; sdpa with a dynamic cache is always measured",
    )
    parser.add_argument(
        "--cache-implementation", nargs="+", choices=CACHES, default=CACHES, help="default: dynamic and static"
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=positive,
        default=BATCH_SIZES,
        metavar="N",
        help=f"default: {' '.join(map(str, BATCH_SIZES))}; 1 is always measured",
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled steps, too, with a static cache")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and scenes (default: 0)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection efficiency`."""
    if options.model is not None and options.shape is not None:
        raise InputError("give either a model or --shape")
    if options.compile and "static" not in options.cache_implementation:
        raise InputError("--compile needs a static cache: add static to --cache-implementation")
    check_writable(options.output)
    device = find_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        if options.shape is not None:
            shape = SHAPES[options.shape]
            subject = shape_subject(options.shape, shape, device, options.seed, Path(scratch), options.side)
        else:
            folder = checkpoint_folder(options.model)
            subject = checkpoint_subject(*load_checkpoint(folder, device), folder, options.model, options.side)
        result = measure(
            subject,
            device,
            options.repeats,
            options.seed,
            options.text_steps,
            compiled=options.compile,
            attentions=tuple(options.attn_implementation),
            caches=tuple(options.cache_implementation),
            batch_sizes=tuple(sorted({1, *options.batch_sizes})),
        )
    result = {"command": command_line(options, subject.description["name"]), **result}
    with writing(options.output):
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(render(result))
    print(f"\nAll figures are in {options.output}.")


def command_line(options: argparse.Namespace, name: str) -> str:
    """The command that measures this again, without paths of this machine."""
    words = ["vreflection", "efficiency"]
    words += [name] if options.model is not None else []
    words += ["--shape", options.shape] if options.shape is not None else []
    words += ["--output", options.output.name, "--repeats", str(options.repeats)]
    words += ["--text-steps", str(options.text_steps), "--seed", str(options.seed)]
    words += [] if options.side is None else ["--side", str(options.side)]
    words += [] if options.device is None else ["--device", options.device]
    for flag, given, default in (
        ("--attn-implementation", options.attn_implementation, ATTENTIONS),
        ("--cache-implementation", options.cache_implementation, CACHES),
        ("--batch-sizes", options.batch_sizes, BATCH_SIZES),
    ):
        words += [] if given is default else [flag, *map(str, given)]
    words += ["--compile"] if options.compile else []
    return shlex.join(words)
