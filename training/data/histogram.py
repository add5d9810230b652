"""Token lengths as a histogram: bars of text, or a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vreflection_hub_card.whole_files import replacing


BAR = 40


def round_edges(longest: int, most_bins: int) -> np.ndarray:
    """Edges of at most so many bins of one width, 1, 2, 5, 10, 20, 50, ..., that hold 0 to `longest`."""
    locator = MaxNLocator(most_bins, steps=[1, 2, 5, 10], integer=True)
    return locator.tick_values(0, longest + 1).round().astype(int)


def text_histogram(lengths: Sequence[int]) -> list[str]:
    """Lines with a range of lengths, a bar, and the number of samples; only a range without samples has no bar."""
    edges = round_edges(max(lengths, default=0), 20)
    counts, _ = np.histogram(lengths, edges)
    width = len(f"{edges[-1]:,}")
    names = [f"{low:>{width},} to {high - 1:<{width},}" for low, high in zip(edges, edges[1:])]
    return _bars(names, counts.tolist())


def text_counts(values: Sequence[int]) -> list[str]:
    """Lines with a value from 1 to the largest, a bar, and how often it occurs."""
    names = range(1, max(values, default=0) + 1)
    width = len(f"{names.stop - 1:,}")
    return _bars([f"{name:>{width},}" for name in names], [values.count(name) for name in names])


def _bars(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    return [
        f"{name}  {'█' * max(round(BAR * count / max(counts)), int(count > 0)):<{BAR}}  {count:,}".rstrip()
        for name, count in zip(names, counts)
    ]


def save_histogram(lengths: Sequence[int], path: str | Path, limits: dict[str, int]) -> None:
    """Writes the histogram as a picture; limits are marked by name, up to twice the longest sample's length."""
    longest = max(lengths, default=0)
    limits = {name: limit for name, limit in limits.items() if limit <= 2 * longest}
    edges = round_edges(longest, 80)
    figure = Figure(figsize=(8, 4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=edges, color="#3b6ea5")
    for (name, limit), colour in zip(limits.items(), ("#d9822b", "#b03a3a")):
        axes.axvline(limit, color=colour, linestyle="--", linewidth=1.4, label=f"{name}: {limit:,}")
    if limits:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set(xlim=(0, None), xlabel=f"tokens of a sample ({edges[1] - edges[0]:,} a bar)", ylabel="samples")
    axes.set_title(f"{len(lengths):,} samples, {sum(lengths):,} tokens", fontsize=11)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as draft:
        figure.savefig(draft, facecolor="white")
