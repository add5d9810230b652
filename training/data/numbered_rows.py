"""What rows without `id` are called."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset


def named(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with an `id`: its own, or its number."""
    return row if row.get("id") is not None else {**row, "id": f"row {number}"}


@dataclass(eq=False)
class NumberedRows(torch.utils.data.Dataset):
    """Rows without `id`, which are called by their numbers."""

    rows: Dataset | list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return named(self.rows[index], index)


def number_rows(rows):
    """Numbers the rows of data sets, or of lists, that have no `id`; of a dict each. Anything else stays as it is."""
    if isinstance(rows, dict):
        return {name: number_rows(some) for name, some in rows.items()}
    unnamed = isinstance(rows, list) or (isinstance(rows, Dataset) and "id" not in rows.column_names)
    return NumberedRows(rows) if unnamed else rows
