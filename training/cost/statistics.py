"""Medians, quartiles and intervals of a handful of values."""

import math
import statistics

import numpy as np


CONFIDENCE = 0.95


def spread(values: list[float]) -> dict:
    """The median and the quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "quartile_1": low, "quartile_3": high, "values": values}


def median_interval(values: list[float]) -> dict:
    """The median with an interval between two of the values, which holds whatever their distribution is.

    The k-th smallest and the k-th largest of n values enclose the median but for the probability that fewer than k lie on
    one side of it. The narrowest interval with 95 % is taken; with fewer than 6 values, the widest, and `coverage` says
    what it is worth.
    """
    ordered, count = sorted(values), len(values)
    coverages = [
        1 - 2 * sum(math.comb(count, index) for index in range(rank)) / 2**count
        for rank in range(1, (count + 1) // 2 + 1)
    ]
    rank = max((rank for rank, coverage in enumerate(coverages, 1) if coverage >= CONFIDENCE), default=1)
    return {
        "median": statistics.median(values),
        "low": ordered[rank - 1],
        "high": ordered[-rank],
        "coverage": coverages[rank - 1],
        "values": values,
    }
