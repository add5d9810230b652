"""Proportions with their uncertainty."""

import math
from collections.abc import Collection, Sequence


Z_95 = 1.959963984540054


def wilson_interval(successes: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, at least one trial; unlike the normal one it never leaves [0, 1].

    `z` is the normal quantile of the confidence, 95 % by default.
    """
    share = successes / count
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def proportion(outcomes: Collection[bool]) -> dict:
    """Counts outcomes: `successes`, `count`, and where there are any `share` and the 95 % interval `low` to `high`."""
    successes, count = sum(outcomes), len(outcomes)
    result = {"successes": successes, "count": count}
    if count:
        low, high = wilson_interval(successes, count)
        result |= {"share": round(successes / count, 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> dict:
    """How much the share of the second outcomes of the same items is above that of the first: `difference`, `low`, `high`.

    The 95 % interval is Agresti and Min's (Statistics in Medicine 24, 2005): the normal one after half an item was added to
    each cell of the table of pairs, so that it has a width even where no pair differs.

    Raises:
        ValueError: No items, or another number of the first than of the second.
    """
    count = len(first)
    if not count or count != len(second):
        raise ValueError(f"Outcomes must be paired, and there must be some: got {count} and {len(second)}.")
    lost = sum(one and not other for one, other in zip(first, second))
    won = sum(other and not one for one, other in zip(first, second))
    centre = (won - lost) / (count + 2)
    half = Z_95 * math.sqrt((won + lost + 1) / (count + 2) - centre**2) / math.sqrt(count + 2)
    difference = (won - lost) / count
    return {
        name: round(value, 4)
        for name, value in zip(
            ("difference", "low", "high"), (difference, max(-1.0, centre - half), min(1.0, centre + half))
        )
    }
