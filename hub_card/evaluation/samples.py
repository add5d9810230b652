"""The samples of a run: one JSON line an item, with the answer and each scorer's verdict."""

import json
from pathlib import Path

from ..errors import InputError
from .scorers import Scored, Verdict


SAMPLES = "samples.jsonl"


def read_samples(folder: Path) -> dict[str, list[dict]]:
    """The rows of a run's `samples.jsonl`, by task.

    Raises:
        InputError: A folder without that file, or a file that is damaged.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise InputError(f"{folder}: no folder of a finished run, it has no {SAMPLES}")
    tasks: dict[str, list[dict]] = {}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            tasks.setdefault(row["task"], []).append(row)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: not the samples of a run ({error})") from error
    return tasks


def read_verdicts(samples: list[dict], scorer: str) -> list[Scored]:
    """A scorer's verdicts on a task's rows."""
    return [Scored(row["id"], row["groups"], Verdict(**row["verdicts"][scorer])) for row in samples]
