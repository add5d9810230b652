"""Packing (App. A): several samples share a row, chosen by best fit over a look-ahead buffer."""

import random
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.rows import BadRow

from .inspection import Inspection, inspect_row, inspect_rows
from .numbered_rows import NumberedRows, number_rows


T = TypeVar("T")


def pack_samples(
    samples: Iterable[tuple[T, int]],
    *,
    max_length: int,
    max_samples: int = 4,
    long_length: int = 4096,
    lookahead: int = 256,
) -> Iterator[list[T]]:
    """Groups samples into packs, reading no more than `lookahead` of them ahead.

    The oldest sample of the buffer opens a pack, so that no sample waits forever; the longest that still fits joins it, as
    long as one does. The order of the samples alone decides, so that the packs are the same on every rank and after a
    resume.

    Args:
        samples (`Iterable[tuple[T, int]]`): Samples, each with its length in tokens.
        max_length (`int`): Most tokens of a pack.
        max_samples (`int`, *optional*, defaults to 4): Most samples of a pack.
        long_length (`int`, *optional*, defaults to 4096): A sample above it, or of unknown length (0), is packed alone.
        lookahead (`int`, *optional*, defaults to 256): Samples held in the buffer.

    Yields:
        `list[T]`: The samples of one pack.

    Raises:
        ValueError: A sample longer than a pack.
    """
    # (length, -arrival, sample), ascending: of equal lengths the oldest is last.
    waiting: list[tuple[int, int, T]] = []

    def next_pack() -> list[T]:
        oldest = max(range(len(waiting)), key=lambda place: waiting[place][1])
        length, _, sample = waiting.pop(oldest)
        pack, room = [sample], max_length - length
        while len(pack) < max_samples and (fits := bisect_right(waiting, room, key=itemgetter(0))):
            length, _, sample = waiting.pop(fits - 1)
            pack.append(sample)
            room -= length
        return pack

    for arrival, (sample, length) in enumerate(samples):
        if length > max_length:
            raise ValueError(f"A sample of {length} tokens doesn't fit a pack of {max_length}.")
        if length > long_length or length == 0:
            yield [sample]
            continue
        insort(waiting, (length, -arrival, sample))
        if len(waiting) == lookahead:
            yield next_pack()
    while waiting:
        yield next_pack()


@dataclass(eq=False)
class PackedDataset(torch.utils.data.Dataset):
    """Packs of rows that can be asked for by number; an item is a list of rows."""

    rows: Dataset | NumberedRows
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[number] for number in self.packs[index]]


@dataclass(eq=False)
class PackedIterableDataset(torch.utils.data.IterableDataset):
    """Packs of a stream; an item is a list of rows. Every process measures the whole stream, and collates its own packs."""

    rows: IterableDataset
    inspect: Callable[[dict[str, Any]], Inspection]
    rule: dict[str, int]

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return pack_samples(((row, self.inspect(row).tokens) for row in self.rows), **self.rule)


def pack_dataset(
    rows: Dataset | IterableDataset | list[dict[str, Any]],
    processor: VReflectionProcessor,
    rule: dict[str, int],
    *,
    reflect: bool = True,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    seed: int | None = None,
) -> tuple[PackedDataset | PackedIterableDataset, list[str]]:
    """Packs a data set by a rule, the keyword arguments of [`pack_samples`]; returns what is wrong with skipped rows, too.

    Rows that can be asked for by number are all measured first, from the headers of their pictures, and packed once, in
    an order that depends on the seed alone (without one, as they come); the trainer shuffles packs. With
    `on_bad_row="skip"` bad rows are left out, those of a stream by the collator.

    Raises:
        BadRow: With `on_bad_row="error"`, a row that can't be read or doesn't fit a pack; no row that can be trained on.
    """
    options = {"reflect": reflect, "stop": on_bad_row == "error", "max_length": rule["max_length"]}
    if isinstance(rows, IterableDataset):
        return PackedIterableDataset(rows, partial(inspect_row, processor=processor, **options), rule), []
    # One process measures: a file that only one of them fails to read would give them different packs.
    measured = [None]
    if PartialState().is_main_process:
        found = inspect_rows(rows, processor, num_proc=num_proc, **options)
        measured = [(found["tokens"][:], found["problem"][:])]
    lengths, problems = broadcast_object_list(measured)[0]
    samples = [(number, length) for number, length in enumerate(lengths) if problems[number] is None]
    skipped = [problem for problem in problems if problem is not None]
    if not samples:
        raise BadRow(f"Of {len(rows)} rows none can be trained on. The first: {' '.join(skipped[:1])}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    return PackedDataset(number_rows(rows), list(pack_samples(samples, **rule))), skipped
