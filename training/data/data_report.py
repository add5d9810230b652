"""What a run's data holds, found without a model, as `vreflection check` prints it."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor

from .histogram import save_histogram, text_counts, text_histogram
from .inspection import Inspection, inspect_row, inspect_rows
from .packing import pack_samples


MOST_NAMED = 10


@dataclass
class DataReport:
    """What a data set holds, how it was read, and how the run goes through it."""

    rule: dict[str, int]  # of packing; its `long_length` and `max_length` hold for single samples, too
    packed: bool = False
    decoded: bool = False  # whether pictures were read, not only their headers
    reflect: bool = True
    batch_size: int = 1  # rows, or packs
    rows: int = 0
    datasets: dict[str, int] = field(default_factory=Counter)  # rows of each
    images: int = 0
    missing: int = 0  # pictures of which there is no file
    bad: dict[str, int] = field(default_factory=Counter)  # bad rows of each kind
    named: list[str] = field(default_factory=list)  # what is wrong with the first of them
    without_reflection: int = 0
    no_reflection: dict[str, int] = field(default_factory=Counter)  # of those, by why their reader left it out
    lengths: list[int] = field(default_factory=list)  # tokens of each good row
    path_lengths: list[int] = field(default_factory=list)  # boxes of each of their reflections
    padding: float = 0.0  # share in batches of single samples
    packs: list[int] = field(default_factory=list)  # tokens of each
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

    def add(self, row: Inspection) -> None:
        """Counts a row."""
        self.rows += 1
        self.datasets[row.dataset or "unnamed"] += 1
        self.images += row.images
        self.missing += row.missing
        if row.problem is None:
            self.without_reflection += row.reflections == 0
            if row.no_reflection is not None:
                self.no_reflection[row.no_reflection] += 1
            self.lengths.append(row.tokens)
            self.path_lengths += row.path_lengths
        else:
            self.bad[row.kind] += 1
            self.named += [row.problem][: MOST_NAMED - len(self.named)]


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
    """Goes through all rows, bad ones too, and reports what they hold; see [`pack_dataset`] for the arguments."""
    report = DataReport(rule, packed=packed, decoded=decode, reflect=reflect, batch_size=batch_size)
    options = {"reflect": reflect, "decode": decode, "max_length": rule["max_length"]}
    if isinstance(rows, IterableDataset):
        rows = tqdm(rows, desc="Measuring rows", unit=" rows")
        found: Iterable[Inspection] = (inspect_row(row, processor, **options) for row in rows)
        seed = None
    else:
        found = (Inspection(**row) for row in inspect_rows(rows, processor, num_proc=num_proc, **options))
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
    text = _table(_row_lines(report))
    if report.lengths:
        text += ["", *_table(_length_lines(report))]
        text += ["", *text_histogram(report.lengths)]
        text += ["", *_table(_padding_lines(report))]
    if max(report.path_lengths, default=0) > 1:
        text += ["", *_table(_path_lines(report)), "", *text_counts(report.path_lengths)]
    if report.named:
        rest = report.bad_rows - len(report.named)
        text += ["", "Bad rows:", *(f"- {problem}" for problem in report.named)]
        text += [f"and {rest:,} more."] if rest else []
    return "\n".join(text)


def _table(lines: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<24}{value}" for name, value in lines]


def _by_count(counts: dict[str, int]) -> list[tuple[str, str]]:
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(f"  {name}", f"{count:,}") for name, count in by_count]


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(total, 1):.2f} %)"


def _row_lines(report: DataReport) -> list[tuple[str, str]]:
    how = "read in full" if report.decoded else "by their headers; damaged pixels are found by --decode"
    lines = [
        ("rows", f"{report.rows:,}"),
        *_by_count(report.datasets if len(report.datasets) > 1 else {}),
        ("images found", f"{report.images - report.missing:,} ({how})"),
        ("images missing", f"{report.missing:,}"),
        ("bad rows", _share(report.bad_rows, report.rows)),
        *_by_count(report.bad),
    ]
    if report.reflect:
        lines.append(("without reflection", _share(report.without_reflection, report.rows)))
        lines += _by_count(report.no_reflection)
    return lines


def _length_lines(report: DataReport) -> list[tuple[str, str]]:
    lengths, most, long = report.lengths, report.rule["max_length"], report.rule["long_length"]
    count = _share(sum(length > long for length in lengths), len(lengths))
    lines = [
        ("tokens", f"{sum(lengths):,}"),
        ("  of a sample", f"mean {mean(lengths):,.0f}, median {median(lengths):,.0f}, longest {max(lengths):,}"),
        ("long samples", f"{count}, above {long:,} tokens"),
    ]
    if most is not None:
        name = f"longer than {'a pack' if report.packed else 'max_length'}"
        lines.append((name, f"{report.bad['too long']:,}, above {most:,} tokens"))
    return lines


def _path_lines(report: DataReport) -> list[tuple[str, str]]:
    lengths = report.path_lengths
    several = sum(length > 1 for length in lengths)
    return [
        ("reflections", f"{len(lengths):,}"),
        ("  with a path", _share(several, len(lengths))),
        ("  boxes of each", f"mean {mean(lengths):.2f}, most {max(lengths)}"),
    ]


def _padding_lines(report: DataReport) -> list[tuple[str, str]]:
    size, packs = report.batch_size, report.packs
    lines = [("padding, unpacked", f"{100 * report.padding:.1f} % of batches of {size} samples")]
    if packs:
        samples, tokens = len(report.lengths) / len(packs), mean(packs)
        fill = f"{100 * report.pack_fill:.1f} % full"
        lines.append(("padding, packed", f"{100 * report.pack_padding:.1f} % of batches of {size} packs"))
        lines.append(("packs", f"{len(packs):,}, of {samples:.2f} samples and {tokens:,.0f} tokens; {fill}"))
    return lines
