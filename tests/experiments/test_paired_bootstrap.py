"""The paired bootstrap."""

import numpy as np
import pytest

from experiments.study.paired_bootstrap import paired_bootstrap


def test_the_interval_is_that_of_the_normal_limit():
    """With one run and many items the bootstrap's spread is the standard error of a mean of paired differences."""
    rng = np.random.default_rng(3)
    first = "".join(rng.choice(["0", "1"], 4000, p=[0.4, 0.6]))
    second = "".join(rng.choice(["0", "1"], 4000, p=[0.3, 0.7]))
    change = np.array([int(b) - int(a) for a, b in zip(first, second)])
    found = paired_bootstrap([(first, second)])
    assert found["difference"] == pytest.approx(change.mean(), abs=1e-4)
    half = 1.96 * change.std() / np.sqrt(len(change))
    assert found["low"] == pytest.approx(change.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(change.mean() + half, abs=0.1 * half)


def test_pairs_that_agree_leave_no_doubt():
    assert paired_bootstrap([("0101" * 50, "0101" * 50)]) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_runs_that_disagree_widen_the_interval():
    better, worse = ("0" * 100, "1" * 50 + "0" * 50), ("1" * 50 + "0" * 50, "0" * 100)
    alone, both = paired_bootstrap([better]), paired_bootstrap([better, worse])
    assert alone["low"] > 0.35
    assert both["difference"] == 0 and both["low"] < -0.35 and both["high"] > 0.35


def test_items_that_were_not_asked_count_on_neither_side():
    assert paired_bootstrap([("01-0", "111-")])["difference"] == pytest.approx(0.5)


@pytest.mark.parametrize("pairs", [[], [("01", "011")], [("01", "01"), ("0", "1")]])
def test_outcomes_that_are_no_pairs(pairs):
    with pytest.raises(ValueError, match="one length"):
        paired_bootstrap(pairs)
