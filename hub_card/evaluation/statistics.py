"""Proportions with their uncertainty."""

import math
from collections.abc import Collection


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
