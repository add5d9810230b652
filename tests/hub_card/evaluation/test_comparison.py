import itertools

import pytest

from vreflection_hub_card.evaluation.comparison import compare, comparison_table, mcnemar
from vreflection_hub_card.evaluation.statistics import proportion


def run(outcomes):
    return [
        {"id": item, "groups": {}, "verdicts": {"strict": {"letter": "A", "correct": bool(right)}}}
        for item, right in outcomes.items()
    ]


def compare_strict(first, second):
    return compare(first, second, "strict")


FIRST = run({"a": 1, "b": 1, "c": 0, "d": 0, "e": 1, "f": 0, "g": 0})
SECOND = run({"g": 0, "f": 1, "e": 0, "d": 1, "c": 1, "b": 1, "a": 1})


def test_items_are_paired_by_id():
    got = compare_strict(FIRST, SECOND)
    assert got == {
        "first": proportion([True] * 3 + [False] * 4),
        "second": proportion([True] * 5 + [False] * 2),
        "difference": 0.2857,
        "both": 2,
        "only_first": 1,
        "only_second": 3,
        "neither": 1,
        "p_value": 0.625,  # 2 (1 + 4) / 16
    }
    turned = compare_strict(SECOND, FIRST)
    assert (turned["only_first"], turned["difference"], turned["p_value"]) == (3, -0.2857, 0.625)


@pytest.mark.parametrize("count", range(9))
def test_mcnemar_counts_the_sequences_that_are_at_least_as_uneven(count):
    for first in range(count + 1):
        uneven = abs(2 * first - count)
        sequences = list(itertools.product([0, 1], repeat=count))
        extreme = [one for one in sequences if abs(2 * sum(one) - count) >= uneven]
        assert mcnemar(first, count - first) == pytest.approx(len(extreme) / len(sequences))


def test_mcnemar_of_many_items():
    assert mcnemar(1000, 1000) == 1
    assert mcnemar(0, 2000) == 0
    assert mcnemar(900, 1000) == pytest.approx(0.0231, abs=2e-4)  # the normal approximation with continuity correction


def test_runs_on_different_items():
    with pytest.raises(ValueError, match="2 of the first are not in the second: f, g."):
        compare_strict(FIRST, run(dict.fromkeys("abcde", 1)))
    with pytest.raises(ValueError, match="1 of the second are not in the first: z."):
        compare_strict(FIRST, [*SECOND, *run({"z": 1})])
    with pytest.raises(ValueError, match="first run holds the item a twice"):
        compare_strict([*FIRST, FIRST[0]], SECOND)
    with pytest.raises(ValueError, match="1697 of the first .*: 0, 1, 2, 3, 4 and 1692 more."):
        compare_strict(run(dict.fromkeys(map(str, range(1697)), 1)), run({}))
    with pytest.raises(ValueError, match="no items"):
        compare_strict([], [])


@pytest.mark.parametrize("field", ["question", "answer"])
def test_items_of_one_id_that_ask_something_else(field):
    first, second = ([{**run({"a": 1})[0], "question": "Who?", "answer": "I"}] for _ in range(2))
    compare_strict(first, second)
    second[0][field] = "Other"
    with pytest.raises(ValueError, match=f"The item a has another {field}"):
        compare_strict(first, second)


def test_the_table():
    results = {
        "mmvp": compare_strict(FIRST, SECOND),
        "v": compare_strict(run(dict.fromkeys(range(20), 1)), run(dict.fromkeys(range(20), 0))),
    }
    assert comparison_table(results, ("S=8", "S=0")).splitlines() == [
        "| benchmark | items |    S=8 |   S=0 | difference | only S=8 | only S=0 | p (McNemar) |",
        "|-----------|------:|-------:|------:|-----------:|---------:|---------:|------------:|",
        "| mmvp      |     7 |  42.9% | 71.4% |      +28.6 |        1 |        3 |      0.6250 |",
        "| v         |    20 | 100.0% |  0.0% |     -100.0 |       20 |        0 |    < 0.0001 |",
    ]
