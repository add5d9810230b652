"""Proportions and differences with their uncertainty."""

import math
from collections.abc import Sequence

import numpy as np


Z_95 = 1.959963984540054


def wilson_interval(successes: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a proportion; unlike the normal one it holds near 0 and 1, and never leaves [0, 1].

    Args:
        successes (`int`): Successes.
        count (`int`): Trials, at least one.
        z (`float`): The normal quantile of the confidence, 95 % by default.
    """
    share = successes / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def proportion(outcomes: list[bool]) -> dict:
    """Counts outcomes: `successes`, `count`, and where there are any `share` and the 95 % interval `low` to `high`."""
    successes, count = sum(outcomes), len(outcomes)
    result = {"successes": successes, "count": count}
    if count:
        low, high = wilson_interval(successes, count)
        result |= {"share": round(successes / count, 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def paired_bootstrap(pairs: Sequence[tuple[str, str]], repeats: int = 5000, seed: int = 0) -> dict:
    """The difference of two accuracies on the same items, second minus first, with a 95 % percentile interval.

    Items are drawn anew, the same for both and for all runs, and so are the runs.

    Args:
        pairs (`Sequence[tuple[str, str]]`): For each run, such as a seed, both sides' outcomes: `"1"` an item, `"0"`, or
            `"-"` for one that wasn't asked, which then counts on neither side.
        repeats (`int`): Draws.
        seed (`int`): Of the draws.

    Raises:
        ValueError: No run, or outcomes of different lengths.
    """
    lengths = {len(outcomes) for pair in pairs for outcomes in pair}
    if len(lengths) != 1:
        raise ValueError(f"Paired outcomes must have one length, got {sorted(lengths) or 'none'}.")
    rng = np.random.default_rng(seed)
    first, second = (np.array([list(pair[side]) for pair in pairs]) for side in (0, 1))  # (runs, items)
    asked = ((first != "-") & (second != "-")).astype(float)
    change = np.where(asked, (second == "1").astype(float) - (first == "1"), 0.0)
    draws = []
    for _ in range(repeats):
        # How often each run and each item was drawn.
        runs, items = (np.bincount(rng.integers(size, size=size), minlength=size) for size in change.shape)
        draws.append(runs @ change @ items / max(1, runs @ asked @ items))
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "difference": round(float(change.sum() / asked.sum()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
