"""What a run's data holds, found without a model, as `vreflection check` prints it."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor

from .histogram import save_histogram, text_histogram
from .inspection import inspect_and_name, inspect_rows
from .packing import pack_samples


MOST_NAMED = 10


@dataclass
class DataReport:
    """What a data set holds.

    Args:
        rule (`dict`): The rule of packing; its `long_length` and `max_length` hold for single samples, too.
        packed (`bool`): Whether samples are packed.
        decoded (`bool`): Whether pictures were read, not only their headers.
        reflect (`bool`): Whether reflections are trained.
        batch_size (`int`): Rows, or packs, of a batch.
        rows (`int`): All rows.
        datasets (`dict[str, int]`): Rows by the data set that they come from.
        images (`int`): Pictures of all rows, found or not.
        missing (`int`): Pictures of which there is no file.
        bad (`dict[str, int]`): Bad rows by kind; samples that are too long are among them.
        named (`list[str]`): What is wrong with the first ten bad rows.
        without_reflection (`int`): Good rows that don't reflect.
        lengths (`list[int]`): Tokens of each good row.
        padding (`float`): Share of padding in batches of single samples.
        packs (`list[int]`): Tokens of each pack.
        pack_padding (`float`): Share of padding in batches of packs.
    """

    rule: dict[str, int]
    packed: bool = False
    decoded: bool = False
    reflect: bool = True
    batch_size: int = 1
    rows: int = 0
    datasets: dict[str, int] = field(default_factory=Counter)
    images: int = 0
    missing: int = 0
    bad: dict[str, int] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    without_reflection: int = 0
    lengths: list[int] = field(default_factory=list)
    padding: float = 0.0
    packs: list[int] = field(default_factory=list)
    pack_padding: float = 0.0

    @property
    def bad_rows(self) -> int:
        """How many rows are bad."""
        return sum(self.bad.values())

    @property
    def pack_fill(self) -> float:
        """Share of the packs' room that samples take."""
        return sum(self.packs) / (len(self.packs) * self.rule["max_length"]) if self.packs else 0.0

    def save_histogram(self, path: str | Path) -> None:
        """Draws the lengths; the suffix names the format."""
        limits = {"long_sample_length": self.rule["long_length"], "max_length": self.rule["max_length"]}
        save_histogram(self.lengths, path, {name: limit for name, limit in limits.items() if limit is not None})

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row, as `inspect_and_name` describes it."""
        number, most = self.rows, self.rule["max_length"]
        self.rows += 1
        self.datasets[row["dataset"] or "unnamed"] += 1
        self.images += row["images"]
        self.missing += row["missing"]
        kind, problem = row["kind"], row["problem"]
        if problem is None and most is not None and row["tokens"] > most:
            name = f"Row {number}" if row["id"] is None else f"Sample {row['id']}"
            kind, problem = "too long", f"{name}: {row['tokens']:,} tokens, above `max_length` ({most:,})."
        if problem is not None:
            self.bad[kind] += 1
            self.named += [problem][: MOST_NAMED - len(self.named)]
            return
        self.without_reflection += row["reflections"] == 0
        self.lengths.append(row["tokens"])


def report_data(
    rows: Dataset | IterableDataset,
    processor: VReflectionProcessor,
    rule: dict[str, int],
    *,
    packed: bool = False,
    reflect: bool = True,
    decode: bool = False,
    batch_size: int = 1,
    num_proc: int | None = None,
    seed: int | None = None,
) -> DataReport:
    """Goes through all rows, bad ones too, and reports what they hold.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows.
        processor (`VReflectionProcessor`): The processor.
        rule (`dict`): The keyword arguments of [`pack_samples`]; without packing `max_length` may be `None`.
        packed (`bool`, *optional*, defaults to `False`): Whether the run packs.
        reflect (`bool`, *optional*, defaults to `True`): Whether reflections are kept.
        decode (`bool`, *optional*, defaults to `False`): Whether to read every picture, not only its header.
        batch_size (`int`, *optional*, defaults to 1): Rows, or packs, of a batch.
        num_proc (`int`, *optional*): Processes.
        seed (`int`, *optional*): Seed of the order in which samples are packed; as they come, if left out.
    """
    report = DataReport(rule, packed=packed, decoded=decode, reflect=reflect, batch_size=batch_size)
    if isinstance(rows, IterableDataset):
        rows = tqdm(rows, desc="Measuring rows", unit=" rows")
        found: Iterable[dict] = (inspect_and_name(row, processor, reflect, decode) for row in rows)
        seed = None
    else:
        found = inspect_rows(rows, processor, reflect=reflect, decode=decode, num_proc=num_proc)
    for row in found:
        report.add(row)
    samples = list(report.lengths)
    if seed is not None:
        random.Random(seed).shuffle(samples)
    report.padding = padding_share(samples, batch_size)
    if packed:
        report.packs = [sum(pack) for pack in pack_samples(((length, length) for length in samples), **rule)]
        report.pack_padding = padding_share(report.packs, batch_size)
    return report


def padding_share(lengths: list[int], batch_size: int) -> float:
    """Share of padding, where batches of this size are filled up to their longest."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    total = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(lengths) / total if total else 0.0


def format_report(report: DataReport) -> str:
    """The report as text for a terminal."""
    lines = [("rows", f"{report.rows:,}")]
    if len(report.datasets) > 1:
        lines += _by_count(report.datasets)
    how = "read in full" if report.decoded else "by their headers"
    lines += [
        ("images found", f"{report.images - report.missing:,} ({how})"),
        ("images missing", f"{report.missing:,}"),
        ("bad rows", _count_of(report.bad_rows, report.rows)),
        *_by_count(report.bad),
    ]
    if report.reflect:
        lines.append(("without reflection", _count_of(report.without_reflection, report.rows)))
    text = [f"{name:<24}{value}" for name, value in lines]
    if report.lengths:
        text += ["", *(f"{name:<24}{value}" for name, value in _length_lines(report))]
        text += ["", *text_histogram(report.lengths)]
        text += ["", *(f"{name:<24}{value}" for name, value in _padding_lines(report))]
    if report.named:
        rest = report.bad_rows - len(report.named)
        text += ["", "Bad rows:", *(f"- {problem}" for problem in report.named)]
        text += [f"and {rest:,} more."] if rest else []
    return "\n".join(text)


def _by_count(counts: dict[str, int]) -> list[tuple[str, str]]:
    return [
        (f"  {name}", f"{count:,}") for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _count_of(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(total, 1):.2f} %)"


def _length_lines(report: DataReport) -> list[tuple[str, str]]:
    lengths, most, long = report.lengths, report.rule["max_length"], report.rule["long_length"]
    spread = f"mean {mean(lengths):,.0f}, median {median(lengths):,.0f}, longest {max(lengths):,}"
    count = _count_of(sum(length > long for length in lengths), len(lengths))
    lines = [
        ("tokens", f"{sum(lengths):,}"),
        ("  of a sample", spread),
        ("long samples", f"{count}, above {long:,} tokens"),
    ]
    if most is not None:
        name = f"longer than {'a pack' if report.packed else 'max_length'}"
        lines.append((name, f"{report.bad['too long']:,}, above {most:,} tokens"))
    return lines


def _padding_lines(report: DataReport) -> list[tuple[str, str]]:
    size, packs = report.batch_size, report.packs
    lines = [("padding, unpacked", f"{100 * report.padding:.1f} % of batches of {size} samples")]
    if packs:
        samples = len(report.lengths) / len(packs)
        lines += [
            ("padding, packed", f"{100 * report.pack_padding:.1f} % of batches of {size} packs"),
            (
                "packs",
                f"{len(packs):,}, of {samples:.2f} samples and {mean(packs):,.0f} tokens; "
                f"{100 * report.pack_fill:.1f} % full",
            ),
        ]
    return lines
