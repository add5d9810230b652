"""`vreflection evaluate --thresholds`: accuracy and latent steps for thresholds of `reflect="uncertain"`."""

import argparse
import datetime
import json
from pathlib import Path

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.whole_files import replacing

from .arguments import check_writable, positive, writing
from .evaluate_rows import MAX_NEW_TOKENS, read_rows


OUTPUT = Path("thresholds.json")
SCENES, SPLIT, BATCH_SIZE = 200, "validation", 50  # of GlyphSearch, where nothing else is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what only `--thresholds` understands, and the option itself."""
    add = parser.add_argument_group("threshold of reflect='uncertain'").add_argument
    thresholds = (
        "instead, measure accuracy and mean latent steps with reflect='uncertain' and these thresholds in nats (without a "
        "number: 0 and quantiles of the entropies where the answers begin; inf always), on GlyphSearch's validation split or "
        f"--rows; writes {OUTPUT} (--output) and a figure beside it"
    )
    add("--thresholds", nargs="*", type=float, metavar="T", help=thresholds)
    add("--max-reflections", type=positive, metavar="N", help="in an answer (default: the checkpoint's, else 1)")


def run_thresholds(options: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the result and the figure."""
    from vreflection_hub_card.evaluation.provenance import describe_machine, describe_model, describe_versions
    from vreflection_hub_card.evaluation.thresholds import draw_thresholds, evaluate_thresholds, thresholds_table
    from vreflection_hub_card.inference.checkpoints import checkpoint_folder, load_checkpoint, set_pixel_limits
    from vreflection_hub_card.inference.drawing import save_figure
    from vreflection_hub_card.rows import BadRow

    check_options(options)
    output = options.output or OUTPUT
    figure = output.with_suffix(".png")
    if figure == output:
        raise InputError(f"--output names the JSON file, and the figure goes beside it: got {output}")
    for path in (output, figure):
        check_writable(path)
    started = datetime.datetime.now(datetime.UTC)
    folder = checkpoint_folder(options.model, options.revision)
    model, processor = load_checkpoint(folder, options.device, options.dtype, options.attn_implementation)
    set_pixel_limits(processor.image_processor, options.min_pixels, options.max_pixels)
    try:
        rows, asked, data = own_rows(options) if options.rows is not None else glyphsearch_rows(options, model)
        result = evaluate_thresholds(model, processor, rows, options.thresholds or None, **asked)
    except (BadRow, ValueError) as error:
        raise InputError(str(error) if options.rows is None else f"{options.rows}: {error}") from error
    finished = datetime.datetime.now(datetime.UTC)
    result["data"] |= data
    report = {
        "command": repeat_command(options, describe_model(model, folder, options.model)["name"]),
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "model": describe_model(model, folder, options.model) | {"revision": options.revision},
        "versions": describe_versions(),
        "machine": describe_machine(model.device),
        "tasks": {"thresholds": result},
    }
    with writing(output):
        with replacing(output) as draft:
            draft.write_text(json.dumps(report, indent=2) + "\n")
        save_figure(draw_thresholds(result), figure)
    print(thresholds_table(result))
    print(f"\nAll results are in {output}, the figure is {figure}.")


def check_options(options: argparse.Namespace) -> None:
    """Raises an `InputError` for options of other measurements."""
    foreign = ["replace", "reflect", "data"]
    foreign += ["difficulty"] if options.rows is not None else ["match", "tolerance", "max_new_tokens"]
    for name in foreign:
        if getattr(options, name) is not None:
            with_rows = " with --rows" if name == "difficulty" else ""
            raise InputError(f"--{name.replace('_', '-')} has no meaning for --thresholds{with_rows}")
    if (options.tasks or ["glyphsearch"]) != ["glyphsearch"] or (options.tasks and options.rows is not None):
        raise InputError("--thresholds measures on GlyphSearch or on --rows: leave --tasks out")
    if len(options.latent_steps or []) > 1:
        raise InputError(f"--thresholds takes one number of --latent-steps, got {len(options.latent_steps)}")


def decoding(options: argparse.Namespace) -> dict:
    """The options that both kinds of rows share."""
    steps = None if options.latent_steps is None else options.latent_steps[0]
    names = ("latent_feedback", "max_reflections")
    return {"latent_steps": steps} | {name: getattr(options, name) for name in names}


def own_rows(options: argparse.Namespace) -> tuple:
    """The rows of `--rows`, how they are asked, and what they are called."""
    rows = read_rows(options.rows, options.split)
    if options.limit is not None:
        rows = rows.select(range(min(options.limit, len(rows))))
    asked = {"match": options.match or "exact", "tolerance": options.tolerance}
    asked |= {"batch_size": options.batch_size or 1, "max_new_tokens": options.max_new_tokens or MAX_NEW_TOKENS}
    return rows, asked | decoding(options), {"file": options.rows.resolve().name}


def glyphsearch_rows(options: argparse.Namespace, model) -> tuple:
    """The same of GlyphSearch: one question about each of a split's first scenes."""
    from vreflection_hub_card.evaluation.glyphsearch_accuracy import ANSWER_TOKENS, describe_scenes
    from vreflection_hub_card.glyphsearch import draw_question

    where = options.split or SPLIT, options.difficulty or "default"
    count = options.limit or SCENES
    drawn = (draw_question(where[0], index, where[1]) for index in range(count))
    rows = [{"image": scene.image, "question": asked.text, "answer": asked.answer} for scene, asked in drawn]
    resolved = model.reflection_options(**decoding(options), reflect="uncertain", reflect_threshold=0)
    room = (resolved.latent_steps + 2) * resolved.max_reflections + ANSWER_TOKENS
    asked = {"batch_size": options.batch_size or BATCH_SIZE, "max_new_tokens": room}
    return rows, asked | decoding(options), describe_scenes(*where, count)


def repeat_command(options: argparse.Namespace, name: str) -> str:
    """The command that repeats the run, without a path of this machine in it."""
    from vreflection_hub_card.evaluation.provenance import option_flags

    given = {
        "rows": options.rows and options.rows.name,
        "split": options.split if options.rows is not None else options.split or SPLIT,
        "difficulty": options.difficulty,
        "limit": options.limit if options.rows is not None else options.limit or SCENES,
        "latent_steps": options.latent_steps and options.latent_steps[0],
    }
    names = ("match", "tolerance", "batch_size", "max_new_tokens", "latent_feedback", "min_pixels", "max_pixels")
    given |= {name: getattr(options, name) for name in (*names, "dtype", "attn_implementation", "revision")}
    flags = option_flags(given)
    if options.max_reflections is not None:
        flags.append(f"--max-reflections {options.max_reflections}")
    return " ".join(["vreflection evaluate", name, *flags, "--thresholds", *map(str, options.thresholds)])
