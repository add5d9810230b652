"""Reading JSON files row by row: a file of many rows never sits in memory as Python objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


CHUNK = 1 << 20
SPACE = " \t\r\n"


def read_json_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a JSON Lines file, or of a file that is one JSON list.

    A line of JSON Lines that is no JSON object comes as a ValueError, for the caller to name the row and go on.

    Raises:
        ValueError: A list that breaks off, or holds something else than objects.
    """
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(CHUNK)
        while start and not start.strip(SPACE):
            start = file.read(CHUNK)
        if not start.lstrip(SPACE).startswith("["):
            file.seek(0)
            yield from _read_lines(file, path)
        else:
            yield from _read_list(file, start.lstrip(SPACE)[1:], path)


def _read_lines(file, path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
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


def _read_list(file, buffer: str, path: str | Path) -> Iterator[dict[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    position, count, more = 0, 0, True
    while True:
        while position < len(buffer) and buffer[position] in SPACE + ",":
            position += 1
        if buffer[position : position + 1] == "]":
            return
        try:
            row, position = decode(buffer, position)
        except ValueError as error:
            if not more:
                raise ValueError(f"{path} is not a complete JSON list: after {count} rows, {error}.") from error
            chunk = file.read(max(CHUNK, len(buffer) - position))
            buffer, position, more = buffer[position:] + chunk, 0, bool(chunk)
            continue
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold JSON objects; row {count} is {row!r}.")
        count += 1
        yield row
