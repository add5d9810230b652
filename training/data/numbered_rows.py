"""Rows by their numbers: what those without `id` are called, and those that can't even be read."""

import struct
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import DecompressionBombError


# What `datasets` raises for a picture that it can't decode.
UNDECODABLE = (OSError, SyntaxError, ValueError, struct.error, DecompressionBombError)


def undecodable(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """What stands for a row that can't be decoded."""
    return {"id": row.get("id"), "error": f"it can't be decoded ({error})"}


def named(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with an `id`: its own, or its number."""
    return row if row.get("id") is not None else {**row, "id": f"row {number}"}


@dataclass(eq=False)
class NumberedRows(torch.utils.data.Dataset):
    """Rows, of which those without `id` are called by their numbers; one whose picture `datasets` can't decode says so in `error`."""

    rows: Dataset | list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return named(self.rows[index], index)
        except UNDECODABLE as error:
            row = self.rows.select_columns(["id"])[index] if "id" in self.rows.column_names else {}
            return named(undecodable(row, error), index)


def number_rows(rows):
    """Numbers the rows of data sets or lists, of a dict each. A stream stays as it is."""
    if isinstance(rows, dict):
        return {name: number_rows(some) for name, some in rows.items()}
    return NumberedRows(rows) if isinstance(rows, (list, Dataset)) else rows
