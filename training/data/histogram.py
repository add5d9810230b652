"""Token lengths as a histogram: bars of text, or a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


MOST_BINS = 20
BAR = 40


def bin_width(longest: int, most: int = MOST_BINS) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that covers 0 to `longest` in at most `most` bins."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if longest < width * most:
                return width
        power *= 10


def count_bins(lengths: Sequence[int], width: int) -> list[int]:
    """How many lengths lie in [0, width), [width, 2 width), and so on, to the longest."""
    counts = [0] * (max(lengths, default=0) // width + 1)
    for length in lengths:
        counts[length // width] += 1
    return counts


def text_histogram(lengths: Sequence[int]) -> list[str]:
    """Lines with a range of lengths, a bar, and the number of samples; none that is there has no bar."""
    width = bin_width(max(lengths, default=0))
    counts = count_bins(lengths, width)
    edge = len(f"{len(counts) * width:,}")
    return [
        f"{number * width:>{edge},} to {(number + 1) * width - 1:<{edge},}  "
        f"{'█' * max(round(BAR * count / max(counts)), count > 0):<{BAR}}  {count:,}".rstrip()
        for number, count in enumerate(counts)
    ]


def save_histogram(lengths: Sequence[int], path: str | Path, limits: dict[str, int] | None = None) -> None:
    """Writes the histogram as a picture.

    Args:
        lengths (`Sequence[int]`): Lengths in tokens.
        path (`str` or `Path`): Where to; the suffix names the format.
        limits (`dict[str, int]`, *optional*): Lengths to mark, by name; those over twice the longest sample's aren't.
    """
    limits = {name: limit for name, limit in (limits or {}).items() if limit <= 2 * max(lengths, default=0)}
    width = bin_width(max(lengths, default=0), most=80)
    counts = count_bins(lengths, width)
    figure = Figure(figsize=(8, 4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar([number * width for number in range(len(counts))], counts, width=width, align="edge", color="#3b6ea5")
    for (name, limit), colour in zip(limits.items(), ("#d9822b", "#b03a3a")):
        axes.axvline(limit, color=colour, linestyle="--", linewidth=1.4, label=f"{name}: {limit:,}")
    if limits:
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_xlim(left=0)
    axes.set_xlabel(f"tokens of a sample ({width:,} a bar)")
    axes.set_ylabel("samples")
    axes.set_title(f"{len(lengths):,} samples, {sum(lengths):,} tokens", fontsize=11)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white")
