"""`vreflection evaluate --rows`: rows of one's own, and whether the answers depend on the latents."""

import argparse
import datetime
import json
import os
from pathlib import Path

from vreflection_hub_card.errors import InputError, reading

from .arguments import positive, writing


FIGURE, RESULTS, SAMPLES = "replacements.png", "results.json", "samples.jsonl"
MAX_NEW_TOKENS = 512
MATCHES = ("exact", "letter", "number")
REPLACEMENTS = ("zeroed", "noise", "shuffled", "other_picture", "filler", "first_look", "reversed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only `--rows` understands."""
    add = parser.add_argument_group("rows of your own").add_argument
    rows = "rows as for training, or with question, answer, and image or images (relative to the file): .jsonl, .json, .parquet, or a folder of `datasets`"
    add("--rows", type=Path, metavar="FILE", help=rows)
    match = "the whole text, the letter, or the number must be the same (default: exact)"
    add("--match", choices=MATCHES, help=match)
    add("--tolerance", type=float, metavar="X", help="with --match number: by how much it may be off (default: 0)")
    replace = f"ask again with other latents: {', '.join(REPLACEMENTS)} (without a name: all)"
    add("--replace", nargs="*", choices=REPLACEMENTS, metavar="NAME", help=replace)
    add("--max-new-tokens", type=positive, metavar="N", help=f"of an answer (default: {MAX_NEW_TOKENS})")


def read_rows(path: Path, split: str | None):
    """The rows of a file or folder, by the reader of training; an `InputError` if it can't be read."""
    from ..data.sources import load_rows

    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path}: the file is empty")
    json_file = path.name.removesuffix(".gz").endswith((".json", ".jsonl"))
    if split is not None and json_file:
        raise InputError(f"{path}: a JSON file has no splits: leave --split out")
    with reading(path, "can't be read as rows"):
        return load_rows([{"path": str(path)} | ({} if json_file else {"split": split})])


def read_questions(options: argparse.Namespace) -> tuple[list, object]:
    """Reads and checks the rows of `--rows`: [`OwnRow`]s, and by which [`Match`] they are scored."""
    if options.tasks:
        raise InputError("--rows and --tasks measure different things: leave one of them out")
    from vreflection_hub_card.evaluation.matching import Match
    from vreflection_hub_card.evaluation.own_rows import read_own_rows
    from vreflection_hub_card.rows import BadRow

    try:
        match = Match(options.match or "exact", options.tolerance)
    except ValueError as error:
        raise InputError(str(error)) from error
    rows = read_rows(options.rows, options.split)
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    try:
        return read_own_rows(rows, match), match
    except BadRow as error:
        raise InputError(f"{options.rows}: {error}") from error


def one_number_of_steps(options: argparse.Namespace) -> int | None:
    """The number of `--latent-steps`; an `InputError` for several."""
    steps = options.latent_steps or [None]
    if len(steps) > 1:
        raise InputError(
            f"one number of --latent-steps is taken here, got {len(steps)}: call the command for each, with an --output of its own"
        )
    return steps[0]


def run_rows(options: argparse.Namespace) -> None:
    """Asks the rows, and writes answers, results, and with `--replace` a figure."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--rows runs in one process: call it without torchrun")
    from vreflection_hub_card.folder_lock import locked_folder

    steps = one_number_of_steps(options)
    replace = REPLACEMENTS if options.replace == [] else tuple(options.replace or ())
    asked, match = read_questions(options)
    with writing(options.output):
        with locked_folder(options.output):
            report = evaluate(options, asked, match, steps, replace)
    result = report["tasks"]["rows"]
    print_report(result, options.output, bool(replace))


def evaluate(
    options: argparse.Namespace, asked: list, match, latent_steps: int | None, replace: tuple[str, ...]
) -> dict:
    """Loads the model, asks, and writes the files; called again after it was killed, it continues."""
    from vreflection_hub_card.evaluation.asking_rows import RowsAsker
    from vreflection_hub_card.evaluation.dependence import draw_dependence
    from vreflection_hub_card.evaluation.harness.answers import AnswerLog
    from vreflection_hub_card.evaluation.own_rows import fingerprint
    from vreflection_hub_card.evaluation.provenance import describe_machine, describe_model, describe_versions
    from vreflection_hub_card.evaluation.rows_accuracy import ask_and_summarise, decoding_options
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint, set_pixel_limits
    from vreflection_hub_card.inference.drawing import save_figure

    started = datetime.datetime.now(datetime.UTC)
    folder = checkpoint_folder(options.model, options.revision)
    model, processor = load_checkpoint(folder, options.device, options.dtype, options.attn_implementation)
    set_pixel_limits(processor.image_processor, options.min_pixels, options.max_pixels)
    description = describe_model(model, folder, options.model) | {"revision": options.revision}
    limit = options.max_new_tokens or MAX_NEW_TOKENS
    try:
        decoding = decoding_options(model, replace, limit, latent_steps, options.latent_feedback, options.reflect)
    except ValueError as error:  # options that contradict each other, or that the checkpoint can't follow
        raise InputError(str(error)) from error
    pixels = processor.image_processor.size
    settings = {
        **decoding,
        "min_pixels": pixels["shortest_edge"],
        "max_pixels": pixels["longest_edge"],
        "dtype": description["dtype"],
        "attn_implementation": model.config._attn_implementation,
    }
    same = {"model": description["name"], "sha256": description["sha256"], "rows": fingerprint(asked), **settings}
    batch_size = options.batch_size or 1
    asker = RowsAsker(model, processor, asked, decoding, batch_size, AnswerLog(options.output, same, 0))
    try:
        evaluation = ask_and_summarise(asker, match, replace)
    except ValueError as error:  # a damaged picture, no room for an answer
        raise InputError(f"{options.rows}: {error}") from error
    finished = datetime.datetime.now(datetime.UTC)
    report = {
        "command": repeat_command(options, description, settings | {"batch_size": batch_size}, match, replace),
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "model": description,
        "options": settings | {"batch_size": batch_size},
        "limit": options.limit,
        "versions": describe_versions(),
        "machine": describe_machine(model.device),
        "tasks": {
            "rows": {"data": {"file": options.rows.resolve().name, "fingerprint": same["rows"]}, **evaluation.result}
        },
    }
    write_run(options.output, evaluation.samples, report)
    if replace and evaluation.result["accuracy_of_reflecting"]["count"]:
        save_figure(draw_dependence(evaluation.result), options.output / FIGURE)
    return report


def write_run(folder: Path, samples: list[dict], report: dict) -> None:
    """Writes what was answered and what came out."""
    from vreflection_hub_card.whole_files import replacing

    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    for name, text in ((SAMPLES, lines), (RESULTS, json.dumps(report, indent=2) + "\n")):
        with replacing(folder / name) as draft:
            draft.write_text(text)


def repeat_command(
    options: argparse.Namespace, description: dict, settings: dict, match, replace: tuple[str, ...]
) -> str:
    """The command that repeats a run, with every default spelled out and no path of this machine in it."""
    from vreflection_hub_card.evaluation.provenance import option_flags

    given = {"split": options.split, "limit": options.limit, "match": match.rule, "tolerance": match.tolerance}
    given |= {"revision": options.revision} | settings
    flags = option_flags({"rows": options.rows.name, **given})
    return " ".join(
        ["vreflection evaluate", description["name"], *flags, *(["--replace", *replace] if replace else [])]
    )


def print_report(result: dict, output: Path, replaced: bool) -> None:
    """Prints the accuracy, and with replacements the table and the sentence."""
    from vreflection_hub_card.evaluation.dependence import dependence_table

    reflected, accuracy = result["reflection_rate"], result["accuracy"]
    print(dependence_table(result))
    print(
        f"\n{accuracy['successes']} of {accuracy['count']} right by {result['match']['rule']!r}; {result['unparsed']} unparsed; "
        f"{reflected['successes']} answers hold a reflection, {reflected['count'] - reflected['successes']} don't."
    )
    if replaced:
        print(result["sentence"])
    drawn = f", the figure is {output / FIGURE}" if replaced and reflected["successes"] else ""
    print(f"All results are in {output / RESULTS}, the answers in {output / SAMPLES}{drawn}.")
