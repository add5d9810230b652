"""Two runs on the same items, compared item by item."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .scorers import some
from .statistics import proportion


# One JSON line an item, with the answer and each scorer's verdict.
SAMPLES = "samples.jsonl"


def read_samples(folder: Path) -> dict[str, list[dict]]:
    """The rows of a run's `samples.jsonl`, by task; an `InputError` if there is no such file, or it is damaged."""
    path = folder / SAMPLES
    if not path.is_file():
        raise InputError(f"{folder}: no folder of a finished run, it has no {SAMPLES}")
    tasks: dict[str, list[dict]] = {}
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            tasks.setdefault(row["task"], []).append(row)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: not the samples of a run ({error})") from error
    return tasks


def compare(first: Sequence[dict], second: Sequence[dict], scorer: str) -> dict:
    """Compares two runs with McNemar's test, which asks the items that only one of them answered right.

    Args:
        first (`Sequence[dict]`): One run's samples of a task.
        second (`Sequence[dict]`): The other's, of the same items in any order.
        scorer (`str`): Whose verdicts are compared.

    Returns:
        `dict`: The proportions right, `first` and `second`; the `difference` of their shares, second minus first; how
        many items are right in `both`, `only_first`, `only_second` or `neither`; the `p_value`, exact and two-sided.

    Raises:
        ValueError: No items, an item twice, or runs with different items, questions or answers.
    """
    runs = {}
    for name, samples in (("first", first), ("second", second)):
        runs[name] = {sample["id"]: sample["verdicts"][scorer]["correct"] for sample in samples}
        if len(runs[name]) < len(samples):
            twice, _ = Counter(sample["id"] for sample in samples).most_common(1)[0]
            raise ValueError(f"The {name} run holds the item {twice} twice.")
    for one, other in (("first", "second"), ("second", "first")):
        if missing := [item for item in runs[one] if item not in runs[other]]:
            raise ValueError(
                f"Only runs on the same items can be compared: {len(missing)} of the {one} are not in the {other}: "
                f"{some(missing)}."
            )
    asked = {sample["id"]: sample for sample in first}
    for sample in second:
        for field in ("question", "answer"):
            one, other = asked[sample["id"]].get(field), sample.get(field)
            if one != other:
                raise ValueError(f"The item {sample['id']} has another {field} in the second run: {one!r}, {other!r}.")
    pairs = Counter((right, runs["second"][item]) for item, right in runs["first"].items())
    if not pairs:
        raise ValueError("There are no items to compare.")
    only_first, only_second = pairs[True, False], pairs[False, True]
    return {
        "first": proportion(runs["first"].values()),
        "second": proportion(runs["second"].values()),
        "difference": round((only_second - only_first) / pairs.total(), 4),
        "both": pairs[True, True],
        "only_first": only_first,
        "only_second": only_second,
        "neither": pairs[False, False],
        "p_value": mcnemar(only_first, only_second),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test: the binomial test that both counts are equally likely to grow."""
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    # Integers until the last step: 2 ** count alone may be too large for a float.
    return min(1.0, 2 * tail / 2**count)


def comparison_table(results: dict[str, dict], names: tuple[str, str]) -> str:
    """A Markdown table with a line for each benchmark, readable in a terminal, of what `compare` returned for each."""
    header = ("items", *names, "difference", f"only {names[0]}", f"only {names[1]}", "p (McNemar)")
    rows = [("benchmark", *header)]
    for benchmark, result in results.items():
        row = (
            benchmark,
            str(result["first"]["count"]),
            f"{result['first']['share']:.1%}",
            f"{result['second']['share']:.1%}",
            f"{100 * result['difference']:+.1f}",
            str(result["only_first"]),
            str(result["only_second"]),
            "< 0.0001" if result["p_value"] < 1e-4 else f"{result['p_value']:.4f}",
        )
        rows.append(row)
    return aligned_table(rows)


def aligned_table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, readable in a terminal; the first row is the header, and all columns but the first are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (width + 1) + ":|" for width in widths[1:])
    return "\n".join([lines[0], rule, *lines[1:]])
