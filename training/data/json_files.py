"""Reading JSON files row by row: a file of many rows never sits in memory as Python objects."""

import codecs
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from vreflection_hub_card.errors import InputError, reading, refuse_special
from vreflection_hub_card.rows import make_row


def read_rows(path: str | Path, dataset: str, fill: Callable[[dict, dict], None]) -> Iterator[dict[str, Any]]:
    """Rows that `fill(row, item)` makes of a file's items; what it can't understand becomes a row with `error`.

    A row's id is the file's name and the number of the item; its data set is the item's, or else `dataset`.
    """
    for number, item in enumerate(read_json_rows(path)):
        yield fill_row(f"{Path(path).stem}-{number}", dataset, item, fill)


def fill_row(
    row_id: str, dataset: str, item: dict[str, Any] | ValueError, fill: Callable[[dict, dict], None]
) -> dict[str, Any]:
    """The row that `fill(row, item)` makes of an item, with `error` if it can't; the data set is the item's, or `dataset`."""
    row = make_row(row_id, dataset, [], [])
    try:
        if isinstance(item, ValueError):
            raise item
        if isinstance(item.get("dataset"), str):
            row["dataset"] = item["dataset"]
        fill(row, item)
    except (ValueError, TypeError, LookupError, OSError, ZeroDivisionError) as error:
        row.update(messages=[], error=str(error) or repr(error))
    return row


def read_json_rows(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a JSON Lines file, or of a file that is one JSON list.

    A line of JSON Lines that is no JSON object comes as a ValueError, for the caller to name the row and go on.

    Raises:
        InputError: A list that breaks off, or holds something else than objects; a file that isn't UTF-8 text.
    """
    with reading(path), _open(path) as file:
        first = file.read(4)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in first:
            raise InputError(f"{path} is no UTF-8 text, perhaps UTF-16: save it as UTF-8.")
        text = first.removeprefix(codecs.BOM_UTF8)
        while not text.strip() and (text := file.read(1)):
            pass
    return _read_list(path) if text.lstrip().startswith(b"[") else _read_lines(path)


def _open(path: str | Path) -> BinaryIO:
    refuse_special(path)
    return gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")


def _read_lines(path: str | Path) -> Iterator[dict[str, Any] | ValueError]:
    with reading(path), _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair, which no text can hold
            except UnicodeError as error:
                yield ValueError(f"{path}, line {number} is not UTF-8: {error}.")
                continue
            except (ValueError, RecursionError) as error:
                yield ValueError(f"{path}, line {number} is not JSON: {error}.")
                continue
            if not isinstance(row, dict):
                row = ValueError(f"{path}, line {number} is not a JSON object, got {row!r}.")
            yield row


def read_json_entries(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a file that is one JSON object of objects, with their names.

    Raises:
        InputError: A file that breaks off, is something else, or has no entry.
    """
    count = 0
    for name, value in _parse(path, "object of objects", lambda file: ijson.kvitems(file, "", use_float=True)):
        if not isinstance(value, dict):
            raise InputError(f"{path} must be a JSON object of objects; {name!r} is {value!r}.")
        yield name, value
        count += 1
    if count == 0:
        raise InputError(f"{path} must be a JSON object of objects, and has none.")


def _read_list(path: str | Path) -> Iterator[dict[str, Any]]:
    rows = _parse(path, "list", lambda file: ijson.items(file, "item", use_float=True))
    for count, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path} must hold JSON objects; row {count} is {row!r}.")
        yield row


def _parse(path: str | Path, what: str, parse: Callable[[BinaryIO], Iterator[Any]]) -> Iterator[Any]:
    """What a parser of ijson finds in a file; `what` is what the file should be, for the error."""
    count = 0
    with reading(path), _open(path) as file:
        if file.read(3) != codecs.BOM_UTF8:  # which ijson doesn't take
            file.seek(0)
        try:
            for item in parse(file):
                yield item
                count += 1
        except ijson.JSONError as error:
            message = f"{path} is not a complete JSON {what}: after {count} rows, {str(error).splitlines()[0]}."
            raise InputError(message) from error
