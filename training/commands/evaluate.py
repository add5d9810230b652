"""`vreflection evaluate`: GlyphSearch, the paper's benchmarks, rows of one's own, and two runs compared."""

import argparse
import datetime
import json
import os
from contextlib import nullcontext
from pathlib import Path

from vreflection_hub_card.embedded import EMBEDDED_NAME
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.folder_lock import locked_folder
from vreflection_hub_card.glyphsearch import DIFFICULTIES
from vreflection_hub_card.whole_files import replacing

from . import evaluate_rows, evaluate_server, evaluate_thresholds
from .arguments import LATENT_FEEDBACK, check_writable, natural, positive, quiet_transformers, writing


GLYPHSEARCH_OUTPUT, BENCHMARKS_OUTPUT = Path("glyphsearch.json"), Path("evaluation")
GLYPHSEARCH_DEFAULTS = {
    "limit": 500, "split": "test", "difficulty": "default", "batch_size": 50, "latent_feedback": None
}  # fmt: skip
# What only one kind of task understands.
GLYPHSEARCH_OPTIONS = ("split", "difficulty")
BENCHMARK_OPTIONS = (
    "latent_steps", "reflect", "min_pixels", "max_pixels", "dtype", "attn_implementation", "revision", "data"
)  # fmt: skip
ROWS_OPTIONS = ("match", "tolerance", "replace", "max_new_tokens")
# Of `SCORERS`, and rules by which rows of one's own match; the authors' second scorer is in the files.
PRINTED_SCORERS = ("authors", "strict", "exact", "exact_match", "letter", "number")
EVAL_EXTRA = 'pip install "vreflection[eval]"'


def add_parser(commands) -> None:
    """Adds `vreflection evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a checkpoint",
        description="Measures a checkpoint: on GlyphSearch, which writes one JSON file; on rows of your own (--rows); or on the "
        f"paper's benchmarks, which need lmms-eval ({EVAL_EXTRA}). Rows and benchmarks write a folder a run, and a run that was "
        "killed goes on when it is called again. For several GPUs, benchmarks only: torchrun --standalone --nproc-per-node 8 "
        "--no-python vreflection evaluate …",
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"a folder, a Hub id, or the embedded checkpoint, {EMBEDDED_NAME} (the default)",
    )
    tasks = ["glyphsearch", *BENCHMARKS]
    any_of = f"glyphsearch, or any of {', '.join(BENCHMARKS)}"
    only = "(default: glyphsearch, which measures more than answers)"
    add("--tasks", nargs="+", choices=tasks, metavar="TASK", help=f"{any_of} {only}")
    default = f"default: all; of glyphsearch {GLYPHSEARCH_DEFAULTS['limit']}"
    add("--limit", type=positive, metavar="N", help=f"items of a task ({default})")
    default = f"default: 1; for glyphsearch {GLYPHSEARCH_DEFAULTS['batch_size']}"
    add("--batch-size", type=positive, metavar="N", help=default)
    add("--latent-feedback", choices=LATENT_FEEDBACK, help="default: the checkpoint's")
    add("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    default = f"default: {GLYPHSEARCH_OUTPUT}, for rows and benchmarks the folder {BENCHMARKS_OUTPUT}"
    add("--output", type=Path, metavar="PATH", help=default)
    compared = "measure nothing; compare two runs, given by their folders, item by item (McNemar's test)"
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help=compared)

    evaluate_rows.add_arguments(parser)
    evaluate_server.add_arguments(parser)
    evaluate_thresholds.add_arguments(parser)

    add = parser.add_argument_group("glyphsearch").add_argument
    add("--split", help="test or validation (default: test); of a folder of rows, the name of one of its splits")
    add("--difficulty", choices=DIFFICULTIES, help="default: default")

    add = parser.add_argument_group("benchmarks and rows").add_argument
    steps = "latent steps of a reflection, 0: none; several make a run each (default: the checkpoint's)"
    add("--latent-steps", nargs="+", type=natural, metavar="S", help=steps)
    reflect = "begin with a reflection, or allow none (default: the model decides)"
    add("--reflect", action=argparse.BooleanOptionalAction, help=reflect)
    add("--min-pixels", type=positive, metavar="N", help="of a picture (default: the checkpoint's)")
    add("--max-pixels", type=positive, metavar="N", help="of a picture (default: the checkpoint's)")
    add("--dtype", help="e.g. bfloat16 (default: that of the weights)")
    add("--attn-implementation", metavar="NAME", help="e.g. flash_attention_2")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    data = "where TASK/[SUBSET/]SPLIT*.parquet lie (default: the Hub)"
    add("--data", type=Path, metavar="FOLDER", help=data)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """`vreflection evaluate`."""
    quiet_transformers()
    given = [name for name, value in vars(options).items() if value is not None]
    if options.compare:
        ignored = [name for name in given if name not in ("compare", "run")]
        if ignored:
            raise InputError(f"--compare measures nothing: leave {ignored[0]} out")
        return compare_runs(*options.compare)
    if options.server is not None:
        return run_on_server(options)
    options.model = options.model or EMBEDDED_NAME
    if options.split not in (None, "test", "validation") and options.rows is None:
        raise InputError(f"GlyphSearch's splits are test and validation, got --split {options.split}")
    if options.thresholds is not None:
        return evaluate_thresholds.run_thresholds(options)
    if options.max_reflections is not None:
        raise InputError("--max-reflections is for --thresholds")
    if options.rows is not None:
        foreign = [name for name in ("difficulty", "data") if name in given]
        if foreign:
            raise InputError(f"--{foreign[0]} has no meaning for --rows")
        options.output = options.output or BENCHMARKS_OUTPUT
        return evaluate_rows.run_rows(options)
    if foreign := [name for name in ROWS_OPTIONS if name in given]:
        raise InputError(f"--{foreign[0].replace('_', '-')} is for --rows FILE")
    tasks = options.tasks or ["glyphsearch"]
    benchmarks = [name for name in tasks if name in BENCHMARKS]
    if benchmarks and len(benchmarks) < len(tasks):
        raise InputError(
            "glyphsearch is measured in another way than the other tasks: call the command for each, or ask for "
            "glyphsearch_answers"
        )
    foreign = [name for name in (GLYPHSEARCH_OPTIONS if benchmarks else BENCHMARK_OPTIONS) if name in given]
    if foreign:
        raise InputError(f"--{foreign[0].replace('_', '-')} has no meaning for {tasks[0]}")
    (run_benchmarks if benchmarks else run_glyphsearch)(options)


def run_on_server(options: argparse.Namespace) -> None:
    """The answers of a server, to rows of one's own or about GlyphSearch's scenes."""
    options.output = options.output or BENCHMARKS_OUTPUT
    ((name, result),) = evaluate_server.evaluate_served(options)["tasks"].items()
    print_accuracy(
        name, result["accuracy"], f"; {result['unparsed']} unparsed, {result['cut']} cut at --max-new-tokens"
    )
    print(
        f"All results are in {options.output / evaluate_rows.RESULTS}, the answers in {options.output / evaluate_rows.SAMPLES}."
    )


def run_benchmarks(options: argparse.Namespace) -> None:
    """The paper's benchmarks, on lmms-eval; one run for each number of latent steps."""
    try:
        from vreflection_hub_card.evaluation.harness.run import RESULTS, evaluate
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "lmms_eval":
            raise
        raise InputError(f"the task {options.tasks[0]} needs lmms-eval: {EVAL_EXTRA}") from error
    names = ("limit", "latent_feedback", "device", *BENCHMARK_OPTIONS)
    fixed = {name: getattr(options, name) for name in names if name != "latent_steps"}
    steps = dict.fromkeys(options.latent_steps or [None])
    output = options.output or BENCHMARKS_OUTPUT
    for latent_steps in steps:
        folder = output if len(steps) == 1 else output / f"latent_steps_{latent_steps}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        batch_size = options.batch_size or 1
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
        with locked_folder(folder) if first else nullcontext():
            report = evaluate(
                options.model, options.tasks, folder, latent_steps=latent_steps, batch_size=batch_size, **fixed
            )
        if report is None:  # only the first process speaks
            continue
        for name, result in report["tasks"].items():
            for scorer in filter(result.get, PRINTED_SCORERS):
                title = f"{name} ({scorer}, {report['options']['latent_steps']} latent steps)"
                print_accuracy(title, result[scorer]["accuracy"], f"; {result[scorer]['unparsed']} unparsed")
        print(f"All results are in {folder / RESULTS}.")


def compare_runs(first: Path, second: Path) -> None:
    """Prints how two runs differ, item by item, on the tasks that both have."""
    from vreflection_hub_card.evaluation.comparison import compare, comparison_table, read_samples

    runs = read_samples(first), read_samples(second)
    common = [name for name in runs[0] if name in runs[1]]
    if not common:
        raise InputError(f"{first} and {second} have no task in common")
    if not any(runs[0][name][0]["verdicts"].keys() & runs[1][name][0]["verdicts"].keys() for name in common):
        raise InputError(f"{first} and {second} were scored by different rules: repeat one with the other's --match")
    for scorer in PRINTED_SCORERS:
        scored = [name for name in common if all(scorer in run[name][0]["verdicts"] for run in runs)]
        if not scored:
            continue
        try:
            results = {name: compare(runs[0][name], runs[1][name], scorer) for name in scored}
        except ValueError as error:
            raise InputError(f"{first} and {second}: {error}") from error
        print(f"\n{scorer}:\n\n{comparison_table(results, (str(first), str(second)))}")


def run_glyphsearch(options: argparse.Namespace) -> None:
    """GlyphSearch, which needs no harness."""
    from vreflection_hub_card.evaluation.glyphsearch_accuracy import evaluate_glyphsearch
    from vreflection_hub_card.evaluation.provenance import describe_machine, describe_model, describe_versions
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint

    output = options.output or GLYPHSEARCH_OUTPUT
    check_writable(output)
    folder = checkpoint_folder(options.model)
    model, processor = load_checkpoint(folder, options.device)
    asked = {name: getattr(options, name) or default for name, default in GLYPHSEARCH_DEFAULTS.items()}
    description = describe_model(model, folder, options.model)
    started = datetime.datetime.now(datetime.UTC)
    try:
        result = evaluate_glyphsearch(model, processor, **asked)
    except ValueError as error:  # options that the checkpoint can't follow
        raise InputError(str(error)) from error
    finished = datetime.datetime.now(datetime.UTC)
    # The command has every default spelled out and no path of this machine in it.
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in asked.items() if value is not None]
    report = {
        "command": " ".join(["vreflection evaluate", description["name"], "--tasks glyphsearch", *flags]),
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "model": description,
        "versions": describe_versions(),
        "machine": describe_machine(model.device),
        "tasks": {"glyphsearch": result},
    }
    with writing(output):
        with replacing(output) as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n")
    print_accuracy("glyphsearch", result["accuracy"]["overall"])
    print(f"All results are in {output}.")


def print_accuracy(name: str, accuracy: dict, more: str = "") -> None:
    """One line about a proportion."""
    interval = f"95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}"
    print(f"{name}: {accuracy['successes']} of {accuracy['count']} right, {accuracy['share']:.1%} ({interval}{more})")
