"""Two runs on the same items, compared item by item."""

import math
from collections import Counter
from collections.abc import Sequence

from .scorers import Scored, some
from .statistics import proportion


def compare(first: Sequence[Scored], second: Sequence[Scored]) -> dict:
    """Compares two runs with McNemar's test, which asks the items that only one of them answered right.

    Args:
        first (`Sequence[Scored]`): One run's verdicts.
        second (`Sequence[Scored]`): The other's, on the same items in any order.

    Returns:
        `dict`: The proportions right, `first` and `second`; the `difference` of their shares, second minus first; how
        many items are right in `both`, `only_first`, `only_second` or `neither`; the `p_value`, exact and two-sided.

    Raises:
        ValueError: No items, an item twice, or runs with different items.
    """
    runs = {"first": right_by_id(first, "first"), "second": right_by_id(second, "second")}
    for one, other in (("first", "second"), ("second", "first")):
        if missing := [id for id in runs[one] if id not in runs[other]]:
            raise ValueError(
                f"Only runs on the same items can be compared: {len(missing)} of the {one} are not in the {other}: "
                f"{some(missing)}."
            )
    pairs = [(right, runs["second"][id]) for id, right in runs["first"].items()]
    if not pairs:
        raise ValueError("There are no items to compare.")
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    return {
        "first": proportion([one for one, _ in pairs]),
        "second": proportion([other for _, other in pairs]),
        "difference": round((only_second - only_first) / len(pairs), 4),
        "both": pairs.count((True, True)),
        "only_first": only_first,
        "only_second": only_second,
        "neither": pairs.count((False, False)),
        "p_value": mcnemar(only_first, only_second),
    }


def right_by_id(run: Sequence[Scored], name: str) -> dict[str, bool]:
    """Whether each item is right, by its id; a `ValueError` if one is there twice."""
    right = {scored.id: scored.verdict.correct for scored in run}
    if len(right) < len(run):
        twice, _ = Counter(scored.id for scored in run).most_common(1)[0]
        raise ValueError(f"The {name} run holds the item {twice} twice.")
    return right


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: the binomial test that both counts are equally likely to grow."""
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    # Integers until the last step: 2 ** count alone may be too large for a float.
    return min(1.0, 2 * tail / 2**count)


def comparison_table(results: dict[str, dict], names: tuple[str, str]) -> str:
    """A Markdown table with a line for each benchmark, readable in a terminal.

    Args:
        results (`dict[str, dict]`): What `compare` returned, by the benchmark's name.
        names (`tuple[str, str]`): What to call the two runs.
    """
    header = ("benchmark", "items", *names, "difference", f"only {names[0]}", f"only {names[1]}", "p (McNemar)")
    rows = [header] + [
        (
            benchmark,
            str(result["first"]["count"]),
            f"{result['first']['share']:.1%}",
            f"{result['second']['share']:.1%}",
            f"{100 * result['difference']:+.1f}",
            str(result["only_first"]),
            str(result["only_second"]),
            "< 0.0001" if result["p_value"] < 1e-4 else f"{result['p_value']:.4f}",
        )
        for benchmark, result in results.items()
    ]
    first, *others = (max(map(len, column)) for column in zip(*rows))
    lines = [
        " | ".join([f"| {row[0]:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], others))]) + " |"
        for row in rows
    ]
    rule = "|" + "-" * (first + 2) + "|" + "".join("-" * (width + 1) + ":|" for width in others)
    return "\n".join([lines[0], rule, *lines[1:]])
