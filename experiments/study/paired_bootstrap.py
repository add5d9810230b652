"""The difference of two accuracies with its uncertainty, over items and seeds."""

from collections.abc import Sequence

import numpy as np


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
