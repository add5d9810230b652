"""Reading JSON files row by row: a file of many rows never sits in memory as Python objects."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ijson

from vreflection_hub_card.rows import make_row


def read_rows(path: str | Path, dataset: str, fill: Callable[[dict, dict], None]) -> Iterator[dict[str, Any]]:
    """Rows that `fill(row, item)` makes of a file's items; what it can't understand becomes a row with `error`.

    A row's id is the file's name and the number of the item; its data set is the item's, or else `dataset`.
    """
    for number, item in enumerate(read_json_rows(path)):
        row = make_row(f"{Path(path).stem}-{number}", dataset, [], [])
        try:
            if isinstance(item, ValueError):
                raise item
            if isinstance(item.get("dataset"), str):
                row["dataset"] = item["dataset"]
            fill(row, item)
        except (ValueError, TypeError, LookupError, OSError, ZeroDivisionError) as error:
            row.update(messages=[], error=str(error) or repr(error))
        yield row


def read_json_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a JSON Lines file, or of a file that is one JSON list.

    A line of JSON Lines that is no JSON object comes as a ValueError, for the caller to name the row and go on.

    Raises:
        ValueError: A list that breaks off, or holds something else than objects.
    """
    with open(path, encoding="utf-8-sig") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
    return _read_list(path) if first == "[" else _read_lines(path)


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
            if not isinstance(row, dict):
                row = ValueError(f"{path}, line {number} is not a JSON object, got {row!r}.")
            yield row


def _read_list(path: str | Path) -> Iterator[dict[str, Any]]:
    count = 0
    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:  # which ijson doesn't take
            file.seek(0)
        try:
            for row in ijson.items(file, "item", use_float=True):
                if not isinstance(row, dict):
                    raise ValueError(f"{path} must hold JSON objects; row {count} is {row!r}.")
                yield row
                count += 1
        except ijson.JSONError as error:
            message = f"{path} is not a complete JSON list: after {count} rows, {str(error).splitlines()[0]}."
            raise ValueError(message) from error
