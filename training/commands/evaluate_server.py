"""`vreflection evaluate --server`: the answers of any server of OpenAI's chat API."""

import argparse
import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

from vreflection_hub_card.errors import InputError

from .arguments import writing
from .evaluate_rows import MAX_NEW_TOKENS, one_number_of_steps, read_questions, write_run


SCENES_TASK = "glyphsearch_answers"
SCENES, IN_FLIGHT = 500, 8
# What takes the weights.
LOCAL_OPTIONS = (
    "replace", "latent_feedback", "device", "dtype", "attn_implementation", "revision", "min_pixels", "max_pixels", "data",
    "thresholds", "max_reflections",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--server`."""
    add = parser.add_argument_group("served models").add_argument
    server = (
        "ask a server of OpenAI's chat API, such as http://localhost:8000/v1, the --rows or GlyphSearch's questions; MODEL is the name "
        f"there (default: the only one it lists), --batch-size the number of requests at a time (default: {IN_FLIGHT})"
    )
    add("--server", metavar="URL", help=server)


def evaluate_served(options: argparse.Namespace) -> dict:
    """Asks the server what isn't answered yet, and writes samples and results; returns the results."""
    refuse_local_options(options)
    steps = one_number_of_steps(options)
    limit = options.max_new_tokens or MAX_NEW_TOKENS
    if limit <= (steps or 0) + 2:
        raise InputError(
            f"--max-new-tokens {limit}: no room for an answer, the {steps or 0} latent steps count as well"
        )

    from vreflection_hub_card.evaluation.asking_server import (
        ServerAsker,
        scene_rows,
        scenes_accuracy,
        summarise_answers,
    )
    from vreflection_hub_card.evaluation.chat_server import ChatServer, reflection_request
    from vreflection_hub_card.evaluation.glyphsearch_accuracy import describe_scenes
    from vreflection_hub_card.evaluation.harness.answers import AnswerLog
    from vreflection_hub_card.evaluation.matching import Match
    from vreflection_hub_card.evaluation.own_rows import fingerprint
    from vreflection_hub_card.folder_lock import locked_folder
    from vreflection_hub_card.rows import BadRow

    started = datetime.datetime.now(datetime.UTC)
    if options.rows is None:
        scenes = (options.split or "test", options.difficulty or "default", options.limit or SCENES)
        task, match, (rows, questions) = SCENES_TASK, Match(), scene_rows(*scenes)
        data, asked = describe_scenes(*scenes), scenes[2]
    else:
        task, (rows, match) = "rows", read_questions(options)
        data = {"file": options.rows.resolve().name, "fingerprint": fingerprint(rows)}
        asked = options.limit
    server = ChatServer(options.server, options.model)
    # A served model's name may be a path of the server's.
    name = Path(server.model).name if Path(server.model).is_absolute() else server.model
    settings = {"max_new_tokens": limit, "latent_steps": steps, "reflect": options.reflect}
    same = {"server": server.url, "model": name, "rows": fingerprint(rows), **settings}
    request = {"max_tokens": limit, "extra_body": reflection_request(steps, options.reflect)}
    batch_size = options.batch_size or IN_FLIGHT
    with writing(options.output):
        with locked_folder(options.output):
            asker = ServerAsker(server, rows, request, batch_size, AnswerLog(options.output, same, 0))
            try:
                asker.ask()
            except BadRow as error:  # a damaged picture
                raise InputError(f"{options.rows}: {error}") from error
            samples = asker.samples(task, match)
            result = {"data": data} | summarise_answers(samples, match)
            if options.rows is None:
                result["accuracy_by_kind"] = scenes_accuracy(samples, questions)
            finished = datetime.datetime.now(datetime.UTC)
            report = {
                "command": served_command(options, name, server.url, settings | {"batch_size": batch_size}, match),
                "date": started.isoformat(timespec="seconds"),
                "seconds": round((finished - started).total_seconds(), 1),
                "model": {"name": name, "server": server.url},
                "options": settings | {"temperature": 0, "batch_size": batch_size},
                "limit": asked,
                # Of the client; what computes is the server's.
                "versions": {"python": platform.python_version()}
                | {package: version(package) for package in ("vreflection", "huggingface_hub")},
                "tasks": {task: result},
            }
            write_run(options.output, samples, report)
    return report


def refuse_local_options(options: argparse.Namespace) -> None:
    """An `InputError` for what can't be asked of a server."""
    for name in LOCAL_OPTIONS:
        if getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} takes the weights in hand: leave it or --server out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--server is asked by one process: call it without torchrun")
    if options.rows is not None:
        if options.difficulty is not None:
            raise InputError("--difficulty has no meaning for --rows")
        return
    for task in options.tasks or ():
        if task != SCENES_TASK:
            more = ", since it measures latents and looks" if task == "glyphsearch" else ""
            raise InputError(
                f"--tasks {task} takes the weights in hand{more}: a server is asked {SCENES_TASK}, or --rows"
            )
    for name in ("match", "tolerance"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name} is for --rows FILE")
    if options.split not in (None, "test", "validation"):
        raise InputError(f"GlyphSearch's splits are test and validation, got --split {options.split}")


def served_command(options: argparse.Namespace, name: str, url: str, settings: dict, match) -> str:
    """The command that repeats a run, with every default spelled out and no path of this machine in it."""
    from vreflection_hub_card.evaluation.provenance import option_flags

    if options.rows is None:
        asked = [f"--tasks {SCENES_TASK}"]
        given = {"split": options.split or "test", "difficulty": options.difficulty or "default"}
        given["limit"] = options.limit or SCENES
    else:
        asked = [f"--rows {options.rows.name}"]
        given = {"split": options.split, "limit": options.limit, "match": match.rule, "tolerance": match.tolerance}
    return " ".join([f"vreflection evaluate {name} --server {url}", *asked, *option_flags(given | settings)])
