"""Reading JSON files row by row: a file of many rows never sits in memory as Python objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson


CHUNK = 1 << 16


def read_json_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a JSON Lines file, or of a file that is one JSON list.

    A line of JSON Lines that is no JSON object comes as a ValueError, for the caller to name the row and go on.

    Raises:
        ValueError: A list that breaks off, or holds something else than objects.
    """
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(CHUNK)
        while start and not start.strip():
            start = file.read(CHUNK)
    if start.lstrip().startswith("["):
        yield from _read_list(path)
    else:
        yield from _read_lines(path)


def _read_lines(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield ValueError(f"{path}, line {number} is not JSON: {error}.")
                continue
            if isinstance(row, dict):
                yield row
            else:
                yield ValueError(f"{path}, line {number} is not a JSON object, got {row!r}.")


def _read_list(path: str | Path) -> Iterator[dict[str, Any]]:
    count = 0
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # the byte order mark, which ijson doesn't take
            file.seek(0)
        try:
            for row in ijson.items(file, "item", use_float=True):
                if not isinstance(row, dict):
                    raise ValueError(f"{path} must hold JSON objects; row {count} is {row!r}.")
                yield row
                count += 1
        except ijson.JSONError as error:
            raise ValueError(
                f"{path} is not a complete JSON list: after {count} rows, {str(error).splitlines()[0]}."
            ) from error
