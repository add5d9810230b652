"""The command `vreflection`: parses what is asked for, runs it, and prints."""

import argparse
import datetime
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from modeling_vreflection.generation_vreflection import LATENT_FEEDBACK

from .ask import Look, look
from .attention import SOURCES, offered_sources
from .checkpoints import checkpoint_config, checkpoint_folder, load_checkpoint
from .drawing import FORMATS, draw_heatmap, save_figure
from .errors import InputError
from .evaluation import TASKS
from .evaluation.benchmarks import BENCHMARKS
from .evaluation.comparison import compare, comparison_table
from .evaluation.glyphsearch import draw_question
from .evaluation.provenance import describe_machine, describe_model, describe_versions
from .evaluation.samples import read_samples, read_verdicts
from .evaluation.shuffling import LatentShufflingModel
from .glyphsearch import DIFFICULTIES, SPLIT_SIZE
from .pictures import load_picture


DEMO_PICTURE, DEMO_HEATMAP = Path("scene.png"), Path("heatmap.png")
GLYPHSEARCH_OUTPUT, BENCHMARKS_OUTPUT = Path("glyphsearch.json"), Path("evaluation")
GLYPHSEARCH_DEFAULTS = {"limit": 500, "batch_size": 50, "split": "test", "difficulty": "default"}
# What only one kind of task understands.
GLYPHSEARCH_OPTIONS = ("split", "difficulty")
BENCHMARK_OPTIONS = (
    "latent_steps", "reflect", "min_pixels", "max_pixels", "dtype", "attn_implementation", "revision", "data"
)  # fmt: skip
EVAL_EXTRA = 'pip install "vreflection[eval]"'


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2, with one line on stderr, where the input was to blame."""
    options = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options.run(options)
    except InputError as error:
        return fail(str(error))
    except OSError as error:  # a folder that may not be read, a network that is down
        where = f"{error.filename}: " if error.filename else ""
        return fail(where + (error.strerror or str(error)))
    return 0


def fail(message: str) -> int:
    """Says in one line what went wrong, and returns the exit code for it."""
    print("vreflection: " + " ".join(message.split()), file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line; each subcommand sets `run`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="vreflection", description="A vision-language model that looks again.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_ask(commands)
    add_evaluate(commands)
    return parser


def add_ask(commands) -> None:
    """Adds `vreflection ask`."""
    parser = commands.add_parser(
        "ask",
        help="ask a question about a picture and see where the model looked",
        description="Answers a question about a picture. Without any argument: draws a GlyphSearch scene, asks about it, "
        f"and writes {DEMO_PICTURE} and {DEMO_HEATMAP} into the current folder.",
    )
    parser.add_argument("picture", nargs="?", metavar="PICTURE", help="a picture file")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="the question about it")
    parser.add_argument("--model", help="a folder or a Hub id (default: the checkpoint embedded in the package)")
    parser.add_argument("--heatmap", type=Path, metavar="FILE", help="write the picture beside its attention maps")
    parser.add_argument("--per-step", action="store_true", help="one map for each latent step instead of their mean")
    parser.add_argument(
        "--source", choices=[*SOURCES, "both"], help="DAC's attention, or the LLM's own (default: all that there are)"
    )
    parser.add_argument("--latent-steps", type=natural, metavar="S", help="latent steps of a reflection; 0: none")
    parser.add_argument("--latent-feedback", choices=LATENT_FEEDBACK, help="what a latent step feeds back")
    parser.add_argument(
        "--reflect",
        action=argparse.BooleanOptionalAction,
        help="begin with a reflection, or allow none (default: the model decides)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--seed", type=natural, help="without a picture: the scene to draw (default: a random one)")
    parser.set_defaults(run=run_ask)


def add_evaluate(commands) -> None:
    """Adds `vreflection evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a checkpoint",
        description="Measures a checkpoint. GlyphSearch writes one JSON file; the paper's benchmarks, which need lmms-eval "
        f"({EVAL_EXTRA}), write a folder a run, and a run that was killed goes on when it is called again. For several "
        "GPUs: torchrun --standalone --nproc-per-node 8 --no-python vreflection evaluate …",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder or a Hub id (default: the embedded checkpoint)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*TASKS, *BENCHMARKS],
        default=["glyphsearch"],
        metavar="TASK",
        help=f"glyphsearch, or any of {', '.join(BENCHMARKS)} (default: glyphsearch)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help=f"items of a task (default: all; of glyphsearch {GLYPHSEARCH_DEFAULTS['limit']})",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help=f"default: 1; for glyphsearch {GLYPHSEARCH_DEFAULTS['batch_size']}",
    )
    parser.add_argument("--latent-feedback", choices=LATENT_FEEDBACK, help="default: the checkpoint's")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help=f"default: {GLYPHSEARCH_OUTPUT}, for benchmarks the folder {BENCHMARKS_OUTPUT}",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="measure nothing; compare two runs, given by their folders, item by item (McNemar's test)",
    )
    glyphsearch = parser.add_argument_group("glyphsearch")
    glyphsearch.add_argument("--split", choices=["test", "validation"], help="default: test")
    glyphsearch.add_argument("--difficulty", choices=DIFFICULTIES, help="default: default")
    benchmarks = parser.add_argument_group("benchmarks")
    benchmarks.add_argument(
        "--latent-steps",
        nargs="+",
        type=natural,
        metavar="S",
        help="latent steps of a reflection, 0: none; several make a run each (default: the checkpoint's)",
    )
    benchmarks.add_argument(
        "--reflect",
        action=argparse.BooleanOptionalAction,
        help="begin with a reflection, or allow none (default: the model decides)",
    )
    benchmarks.add_argument(
        "--min-pixels", type=positive, metavar="N", help="of a picture (default: the checkpoint's)"
    )
    benchmarks.add_argument(
        "--max-pixels", type=positive, metavar="N", help="of a picture (default: the checkpoint's)"
    )
    benchmarks.add_argument("--dtype", help="e.g. bfloat16 (default: that of the weights)")
    benchmarks.add_argument("--attn-implementation", metavar="NAME", help="e.g. flash_attention_2")
    benchmarks.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    benchmarks.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where TASK/[SUBSET/]SPLIT*.parquet lie (default: the Hub)"
    )
    parser.set_defaults(run=run_evaluate)


def run_ask(options: argparse.Namespace) -> None:
    """`vreflection ask`."""
    demo = options.picture is None
    if demo:
        seed = random.randrange(10**6) if options.seed is None else options.seed
        if seed >= SPLIT_SIZE:
            raise InputError(f"--seed must be less than {SPLIT_SIZE}")
        heatmap = options.heatmap or DEMO_HEATMAP
        scene, asked = draw_question("test", seed)
        picture, question, box = scene.image, asked.text, asked.target.box
        check_writable(DEMO_PICTURE)
    else:
        if options.seed is not None:
            raise InputError("--seed draws a scene; with a picture there is nothing to draw")
        if options.question is None or not options.question.strip():
            raise InputError('a question is missing: vreflection ask PICTURE "QUESTION"')
        if options.heatmap is None and (options.per_step or options.source):
            raise InputError("--per-step and --source say what a heatmap shows: add --heatmap FILE")
        heatmap, question, box = options.heatmap, options.question, None
        picture = load_picture(options.picture)
    if heatmap is not None:
        check_suffix(heatmap)
        check_writable(heatmap)

    folder = checkpoint_folder(options.model)
    sources = choose_sources(options.source, folder) if heatmap is not None else ()
    model, processor = load_checkpoint(folder, options.device)
    if demo:
        with writing(DEMO_PICTURE):
            picture.save(DEMO_PICTURE)
        print(f"Scene {seed}, written to {DEMO_PICTURE}; --seed {seed} draws it again.\n{question}")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    seen = ask_model(model, processor, [{"role": "user", "content": content}], sources, options)
    if demo:
        verdict = "right" if seen.answer == asked.answer else f"wrong, it is {asked.answer}"
        print(f"{seen.answer or 'An empty answer'}   ({verdict})")
    else:
        print(seen.answer)

    if not seen.reflections:
        missing = f"; {heatmap} is not written, try --reflect" if heatmap is not None else ""
        print(f"The model answered without a reflection{missing}.", file=sys.stderr)
    elif heatmap is not None:
        figure = draw_heatmap([picture], seen.reflections, question, seen.answer, box, options.per_step)
        with writing(heatmap):
            save_figure(figure, heatmap)
        outlined = ", with the true place outlined" if demo else ""
        print(f"Where it looked: {heatmap}{outlined}.", file=sys.stdout if demo else sys.stderr)


def ask_model(model, processor, messages: list[dict], sources: tuple[str, ...], options: argparse.Namespace) -> Look:
    """`look` with the command's options; those that contradict each other or the checkpoint are the user's to change."""
    try:
        return look(
            model,
            processor,
            messages,
            sources,
            latent_steps=options.latent_steps,
            latent_feedback=options.latent_feedback,
            reflect=options.reflect,
            max_new_tokens=options.max_new_tokens,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def choose_sources(source: str | None, folder: Path) -> tuple[str, ...]:
    """The sources of attention to draw: all that the checkpoint offers, or exactly those demanded."""
    offered = offered_sources(checkpoint_config(folder))
    wanted = {None: offered, "both": SOURCES}.get(source, (source,))
    if not set(wanted) <= set(offered):
        raise InputError(
            f"{folder}: the checkpoint has no DAC, whose attention is to be drawn; --source llm needs none"
        )
    return wanted


def check_suffix(path: Path) -> None:
    """Checks that the name of a figure ends in a format that can be written."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: the name of a heatmap must end in one of {', '.join(FORMATS)}")


def check_writable(path: Path) -> None:
    """Checks before the long work that a file can be written after it; leaves no empty file behind."""
    existed = path.exists()
    with writing(path):
        path.open("ab").close()
    if not existed:
        path.resolve().unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file that can't be written: a full disk says nothing about it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from error


def run_evaluate(options: argparse.Namespace) -> None:
    """`vreflection evaluate`."""
    if options.compare:
        return compare_runs(*options.compare)
    benchmarks = [name for name in options.tasks if name in BENCHMARKS]
    if benchmarks and len(benchmarks) < len(options.tasks):
        raise InputError("glyphsearch is measured in another way than the other tasks: call the command for each")
    foreign = GLYPHSEARCH_OPTIONS if benchmarks else BENCHMARK_OPTIONS
    given = [name for name in foreign if getattr(options, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} has no meaning for {options.tasks[0]}")
    (run_benchmarks if benchmarks else run_glyphsearch)(options)


def run_benchmarks(options: argparse.Namespace) -> None:
    """The paper's benchmarks, on lmms-eval; one run for each number of latent steps."""
    try:
        from .evaluation.harness.run import RESULTS, evaluate
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "lmms_eval":
            raise
        raise InputError(f"the task {options.tasks[0]} needs lmms-eval: {EVAL_EXTRA}") from error
    tasks = [
        {"task": name} | ({} if options.data is None else {"dataset_path": str(options.data / name)})
        for name in dict.fromkeys(options.tasks)
    ]
    names = ("limit", "latent_feedback", "device", *BENCHMARK_OPTIONS)
    fixed = {name: getattr(options, name) for name in names if name not in ("latent_steps", "data")}
    steps = dict.fromkeys(options.latent_steps or [None])
    output = options.output or BENCHMARKS_OUTPUT
    for latent_steps in steps:
        folder = output if len(steps) == 1 else output / f"latent_steps_{latent_steps}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        report = evaluate(
            options.model,
            tasks,
            folder,
            latent_steps=latent_steps,
            batch_size=options.batch_size or 1,
            **fixed,
        )
        if report is None:  # only the first process speaks
            continue
        for name, result in report["tasks"].items():
            for scorer in ("authors", "strict"):
                accuracy, unparsed = result[scorer]["accuracy"], result[scorer]["unparsed"]
                print_accuracy(
                    f"{name} ({scorer}, {report['options']['latent_steps']} latent steps)",
                    accuracy,
                    f"; {unparsed} unparsed",
                )
        print(f"All results are in {folder / RESULTS}.")


def compare_runs(first: Path, second: Path) -> None:
    """Prints how two runs differ, item by item, on the tasks that both have."""
    runs = read_samples(first), read_samples(second)
    common = [name for name in runs[0] if name in runs[1]]
    if not common:
        raise InputError(f"{first} and {second} have no task in common")
    for scorer in ("authors", "strict"):
        try:
            results = {name: compare(*(read_verdicts(run[name], scorer) for run in runs)) for name in common}
        except ValueError as error:
            raise InputError(f"{first} and {second}: {error}") from error
        print(f"\n{scorer}:\n\n{comparison_table(results, (str(first), str(second)))}")


def run_glyphsearch(options: argparse.Namespace) -> None:
    """GlyphSearch, which needs no harness."""
    output = options.output or GLYPHSEARCH_OUTPUT
    check_writable(output)
    folder = checkpoint_folder(options.model)
    model, processor = load_checkpoint(folder, options.device, LatentShufflingModel)
    started = datetime.datetime.now(datetime.UTC)
    try:
        results = {name: TASKS[name](model, processor, **task_options(options)) for name in options.tasks}
    except ValueError as error:  # options that the checkpoint can't follow
        raise InputError(str(error)) from error
    finished = datetime.datetime.now(datetime.UTC)
    report = {
        "command": evaluate_command(options, folder.resolve().name),
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "model": describe_model(model, folder, options.model),
        "versions": describe_versions(),
        "machine": describe_machine(model.device),
        "tasks": results,
    }
    with writing(output):
        output.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in results.items():
        print_accuracy(name, result["accuracy"]["overall"])
    print(f"All results are in {output}.")


def print_accuracy(name: str, accuracy: dict, more: str = "") -> None:
    """One line about a proportion."""
    interval = f"95 % interval {accuracy['low']:.1%} to {accuracy['high']:.1%}"
    print(f"{name}: {accuracy['successes']} of {accuracy['count']} right, {accuracy['share']:.1%} ({interval}{more})")


def task_options(options: argparse.Namespace) -> dict:
    """The options of GlyphSearch."""
    names = ("limit", "split", "difficulty", "batch_size", "latent_feedback")
    given = {name: getattr(options, name) for name in names}
    return {name: GLYPHSEARCH_DEFAULTS.get(name) if value is None else value for name, value in given.items()}


def evaluate_command(options: argparse.Namespace, folder: str) -> str:
    """The command that repeats a run, with every default spelled out and no path of this machine in it."""
    given = {"--tasks": " ".join(options.tasks)}
    given |= {"--" + name.replace("_", "-"): value for name, value in task_options(options).items()}
    flags = [f"{name} {value}" for name, value in given.items() if value is not None]
    model = [] if options.model is None else [options.model if not Path(options.model).exists() else folder]
    return " ".join(["vreflection evaluate", *model, *flags])


def natural(text: str) -> int:
    """An integer from 0 on, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive(text: str) -> int:
    """An integer from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
