"""Packing (App. A): several samples share a row, chosen by best fit over a look-ahead buffer."""

import random
from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.rows import BadRow, row_name

from .inspection import inspect_rows, measure_row


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
    waiting: dict[int, tuple[T, int]] = {}  # by arrival
    lengths: list[tuple[int, int]] = []  # (length, -arrival), ascending: of equal lengths the older one is the last

    def take(length: int, arrival: int) -> T:
        lengths.pop(bisect_right(lengths, (length, -arrival)) - 1)
        return waiting.pop(arrival)[0]

    def next_pack() -> list[T]:
        arrival, (_, length) = next(iter(waiting.items()))
        pack, room = [take(length, arrival)], max_length - length
        while len(pack) < max_samples and (fits := bisect_right(lengths, (room, 1))):
            length, arrival = lengths[fits - 1]
            pack.append(take(length, -arrival))
            room -= length
        return pack

    for arrival, (sample, length) in enumerate(samples):
        if length > max_length:
            raise ValueError(f"A sample of {length} tokens doesn't fit a pack of {max_length}.")
        if length > long_length or length == 0:
            yield [sample]
            continue
        waiting[arrival] = sample, length
        insort(lengths, (length, -arrival))
        if len(waiting) == lookahead:
            yield next_pack()
    while waiting:
        yield next_pack()


class PackedDataset(torch.utils.data.Dataset):
    """Packs of rows that can be asked for by number; an item is a list of rows.

    Args:
        rows (`Dataset`): The rows.
        packs (`list[list[int]]`): Numbers of the rows of each pack.
    """

    def __init__(self, rows: Dataset, packs: list[list[int]]):
        self.rows = rows
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[number] for number in self.packs[index]]


class PackedIterableDataset(torch.utils.data.IterableDataset):
    """Packs of a stream; an item is a list of rows. Every process measures the whole stream, and collates its own packs.

    Args:
        rows (`IterableDataset`): The rows.
        processor (`VReflectionProcessor`): Measures them.
        reflect (`bool`): Whether reflections are kept.
        on_bad_row (`str`): `"error"`; or `"skip"`, which leaves a bad row to the collator, to name it.
        rule (`dict`): The keyword arguments of `pack_samples`.
    """

    def __init__(
        self, rows: IterableDataset, processor: VReflectionProcessor, reflect: bool, on_bad_row: str, rule: dict
    ):
        self.rows = rows
        self.processor = processor
        self.reflect = reflect
        self.on_bad_row = on_bad_row
        self.rule = rule

    def set_epoch(self, epoch: int):
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return pack_samples(((row, self._length(row)) for row in self.rows), **self.rule)

    def _length(self, row: dict[str, Any]) -> int:
        try:
            length = measure_row(row, self.processor, reflect=self.reflect).tokens
            if length > self.rule["max_length"]:
                raise BadRow(too_long_message(row, length, self.rule["max_length"]))
        except BadRow:
            if self.on_bad_row == "error":
                raise
            return 0
        return length


def too_long_message(row: dict[str, Any], length: int, max_length: int) -> str:
    """What is wrong with a sample that is longer than a pack."""
    return (
        f"{row_name(row)} has {length} tokens, above `max_length` ({max_length}), the length of a pack. Nothing is "
        "cut: raise the limit, shrink the pictures, or drop the sample."
    )


def pack_dataset(
    rows: Dataset | IterableDataset,
    processor: VReflectionProcessor,
    rule: dict[str, int],
    *,
    reflect: bool = True,
    on_bad_row: str = "error",
    num_proc: int | None = None,
    seed: int | None = None,
) -> tuple[PackedDataset | PackedIterableDataset, list[str]]:
    """Packs a data set.

    Rows that can be asked for by number are all measured first, from the headers of their pictures, and packed once, in
    an order that depends on the seed alone; the trainer shuffles packs.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows.
        processor (`VReflectionProcessor`): Measures them.
        rule (`dict`): The keyword arguments of [`pack_samples`].
        reflect (`bool`, *optional*, defaults to `True`): Whether reflections are kept.
        on_bad_row (`str`, *optional*, defaults to `"error"`): `"error"` raises at a bad row, `"skip"` leaves it out.
        num_proc (`int`, *optional*): Processes to measure with.
        seed (`int`, *optional*): Seed of the order in which samples are packed; as they come, if left out.

    Returns:
        `tuple`: The packs, and what is wrong with each row that was skipped.

    Raises:
        BadRow: With `on_bad_row="error"`, a row that can't be read or doesn't fit a pack; no row that can be trained on.
    """
    if isinstance(rows, IterableDataset):
        return PackedIterableDataset(rows, processor, reflect, on_bad_row, rule), []
    # One process measures: a file that only one of them fails to read would give them different packs.
    measured = [None]
    if PartialState().is_main_process:
        found = inspect_rows(rows, processor, reflect=reflect, stop=on_bad_row == "error", num_proc=num_proc)
        measured = [(found["tokens"][:], found["problem"][:])]
    samples, skipped, too_long = [], [], []
    for number, (length, problem) in enumerate(zip(*broadcast_object_list(measured)[0])):
        if problem is not None:
            skipped.append(problem)
        elif length > rule["max_length"]:
            too_long.append(too_long_message(rows[number], length, rule["max_length"]))
        else:
            samples.append((number, length))
    if too_long and on_bad_row == "error":
        raise BadRow(too_long[0])
    skipped += too_long
    if not samples:
        raise BadRow(f"Of {len(rows)} rows none can be trained on. The first: {' '.join(skipped[:1])}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    return PackedDataset(rows, list(pack_samples(samples, **rule))), skipped
