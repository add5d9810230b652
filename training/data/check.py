"""What a run's data holds, told without a model: `vreflection check RECIPE`."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor

from .histogram import save_histogram, text_histogram
from .measure import describe, inspect_row, inspect_rows
from .packing import pack_samples


if TYPE_CHECKING:
    from ..sft_config import VReflectionSFTConfig


NAMED = 10


@dataclass
class CheckReport:
    """What a data set holds.

    Args:
        rows (`int`): All rows.
        datasets (`dict[str, int]`): Rows by the data set that they come from.
        images (`int`): Pictures of all rows, found or not.
        missing (`int`): Pictures of which there is no file.
        decoded (`bool`): Whether pictures were read, not only their headers.
        reflect (`bool`): Whether reflections are trained.
        bad (`dict[str, int]`): Bad rows by kind; samples that are too long are among them.
        named (`list[str]`): What is wrong with the first ten bad rows.
        without_reflection (`int`): Good rows that don't reflect.
        lengths (`list[int]`): Tokens of each good row.
        long_length (`int`): Above it, a sample is long.
        max_length (`int`, *optional*): Most tokens of a sample, or of a pack.
        too_long (`int`): Samples above `max_length`.
        batch_size (`int`): Rows, or packs, of a batch.
        padding (`float`): Share of padding in batches of single samples.
        packs (`list[int]`, *optional*): Tokens of each pack.
        pack_padding (`float`, *optional*): Share of padding in batches of packs.
    """

    rows: int = 0
    datasets: dict[str, int] = field(default_factory=Counter)
    images: int = 0
    missing: int = 0
    decoded: bool = False
    reflect: bool = True
    bad: dict[str, int] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    without_reflection: int = 0
    lengths: list[int] = field(default_factory=list)
    long_length: int = 0
    max_length: int | None = None
    too_long: int = 0
    batch_size: int = 1
    padding: float = 0.0
    packs: list[int] | None = None
    pack_padding: float | None = None

    @property
    def bad_rows(self) -> int:
        """How many rows are bad."""
        return sum(self.bad.values())

    @property
    def pack_fill(self) -> float:
        """Share of the packs' room that samples take."""
        return sum(self.packs) / (len(self.packs) * self.max_length) if self.packs else 0.0

    def save_histogram(self, path: str | Path) -> None:
        """Draws the lengths; the suffix names the format."""
        limits = {"long_sample_length": self.long_length, "max_length": self.max_length}
        marked = {name: limit for name, limit in limits.items() if limit is not None}
        save_histogram(self.lengths, path, marked)


def check(
    rows: Dataset | IterableDataset,
    processor: VReflectionProcessor,
    args: "VReflectionSFTConfig",
    decode: bool = False,
) -> CheckReport:
    """Goes through all rows, bad ones too, and reports what they hold.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows.
        processor (`VReflectionProcessor`): The processor.
        args (`VReflectionSFTConfig`): The run's configuration: what it packs, how, and in batches of which size.
        decode (`bool`, *optional*, defaults to `False`): Whether to read every picture, not only its header.
    """
    reflect = args.stage != "sft"
    report = CheckReport(
        decoded=decode,
        reflect=reflect,
        long_length=args.long_sample_length,
        max_length=args.max_length,
        batch_size=args.per_device_train_batch_size,
    )
    if isinstance(rows, IterableDataset):
        found = (
            describe(row, inspect_row(row, processor, reflect, decode))
            for row in tqdm(rows, desc="Measuring rows", unit=" rows")
        )
    else:
        found = inspect_rows(rows, processor, reflect=reflect, decode=decode, num_proc=args.dataset_num_proc)
    _count(found, report)
    samples = list(report.lengths)
    if not isinstance(rows, IterableDataset) and args.train_sampling_strategy != "sequential":
        random.Random(args.seed).shuffle(samples)
    report.padding = padding_share(samples, report.batch_size)
    if args.sample_packing:
        packs = pack_samples(
            ((length, length) for length in samples),
            max_length=args.max_length,
            max_samples=args.max_samples_per_pack,
            long_length=args.long_sample_length,
            lookahead=args.packing_lookahead,
        )
        report.packs = [sum(pack) for pack in packs]
        report.pack_padding = padding_share(report.packs, report.batch_size)
    return report


def padding_share(lengths: list[int], batch_size: int) -> float:
    """Share of padding, where batches of this size are filled up to their longest."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    total = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(lengths) / total if total else 0.0


def _count(found: Iterable[dict[str, Any]], report: CheckReport):
    for number, row in enumerate(found):
        report.rows += 1
        report.datasets[row["dataset"] or "unnamed"] += 1
        report.images += row["images"]
        report.missing += row["missing"]
        kind, problem = row["kind"], row["problem"]
        if problem is None and report.max_length is not None and row["tokens"] > report.max_length:
            report.too_long += 1
            kind = "too long"
            name = f"Row {number}" if row["id"] is None else f"Sample {row['id']}"
            problem = f"{name}: {row['tokens']:,} tokens, above `max_length` ({report.max_length:,})."
        if problem is not None:
            report.bad[kind] += 1
            if len(report.named) < NAMED:
                report.named.append(problem)
            continue
        report.without_reflection += row["reflections"] == 0
        report.lengths.append(row["tokens"])


def format_report(report: CheckReport) -> str:
    """The report as text for a terminal."""
    lines = [f"rows                    {report.rows:,}"]
    if len(report.datasets) > 1:
        lines += [f"  {name:<22}{count:,}" for name, count in sorted(report.datasets.items(), key=_by_count)]
    how = "read in full" if report.decoded else "by their headers"
    lines.append(f"images found            {report.images - report.missing:,} ({how})")
    lines.append(f"images missing          {report.missing:,}")
    lines.append(f"bad rows                {share(report.bad_rows, max(report.rows, 1))}")
    lines += [f"  {kind:<22}{count:,}" for kind, count in sorted(report.bad.items(), key=_by_count)]
    if report.reflect:
        lines.append(f"without reflection      {share(report.without_reflection, max(report.rows, 1))}")
    if report.lengths:
        lines += ["", *_lengths(report), "", *text_histogram(report.lengths), "", *_padding(report)]
    if report.named:
        rest = report.bad_rows - len(report.named)
        lines += ["", "Bad rows:", *(f"- {problem}" for problem in report.named)]
        lines += [f"and {rest:,} more."] if rest else []
    return "\n".join(lines)


def share(count: int, total: int) -> str:
    """A number and its share, e.g. `"12 (3.00 %)"`."""
    return f"{count:,} ({100 * count / total:.2f} %)"


def percent(fraction: float) -> str:
    """A share, e.g. `"3.0 %"`."""
    return f"{100 * fraction:.1f} %"


def _lengths(report: CheckReport) -> list[str]:
    lengths = report.lengths
    lines = [
        f"tokens                  {sum(lengths):,}",
        f"  of a sample           mean {mean(lengths):,.0f}, median {median(lengths):,.0f}, longest {max(lengths):,}",
    ]
    long = sum(length > report.long_length for length in lengths)
    lines.append(f"long samples            {share(long, len(lengths))}, above {report.long_length:,} tokens")
    if report.max_length is not None:
        what = "a pack" if report.packs is not None else "max_length"
        lines.append(f"{'longer than ' + what:<24}{report.too_long:,}, above {report.max_length:,} tokens")
    return lines


def _padding(report: CheckReport) -> list[str]:
    lines = [f"padding, unpacked       {percent(report.padding)} of batches of {report.batch_size} samples"]
    if report.packs is not None:
        samples = len(report.lengths) / len(report.packs)
        lines += [
            f"padding, packed         {percent(report.pack_padding)} of batches of {report.batch_size} packs",
            f"packs                   {len(report.packs):,}, of {samples:.2f} samples and "
            f"{mean(report.packs):,.0f} tokens; {percent(report.pack_fill)} full",
        ]
    return lines


def _by_count(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
