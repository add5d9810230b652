"""Views of a data set that training reads in its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from vreflection_hub_card.rows import BadRow


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


@dataclass(eq=False)
class EndlessStream(torch.utils.data.IterableDataset):
    """A stream that begins anew when it ends, in another order if it is shuffled.

    To transformers all steps of a stream are one epoch, of which a resumed run skips the batches that it has seen.
    """

    rows: IterableDataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self.rows.set_epoch(epoch)
            row = None
            for row in self.rows:
                yield row
            if row is None:
                raise BadRow("The stream of training rows is empty.")


def number_rows(rows):
    """Numbers a data set's rows, or a list's, where they have no `id`; anything else stays as it is."""
    unnamed = isinstance(rows, list) or (isinstance(rows, Dataset) and "id" not in rows.column_names)
    return NumberedRows(rows) if unnamed else rows
