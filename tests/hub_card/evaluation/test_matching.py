"""When an answer to a row of one's own is right."""

import pytest

from vreflection_hub_card.evaluation.matching import Match


@pytest.mark.parametrize(
    "rule, answer, reference, correct",
    [
        ("exact", " a red cup\n", "a red cup", True),
        ("exact", "A red cup", "a red cup", False),
        ("exact", "a red cup.", "a red cup", False),
        ("exact", "2*3", "23", False),
        ("letter", "The answer is (B).", "B", True),
        ("letter", "B. the dog", "(B)", True),
        ("letter", "A or B", "B", False),
        ("letter", "a dog", "A", False),
        ("number", "There are 3 cups.", "3", True),
        ("number", "1,234.50 kg", "1234.5", True),
        ("number", "−2", "-2", True),
        ("number", ".5", "0.50", True),
        ("number", "3 cups and 2 spoons", "3", False),
        ("number", "three", "3", False),
        ("number", "B3", "3", False),
        ("number", "1,23", "1", False),
        ("number", "1/2", "1", False),
        ("number", "3.01", "3", False),
        ("number", "1e9999999", "3", False),
        ("number", "1e99999999999999999999999", "3", False),
    ],
)
def test_rules(rule, answer, reference, correct):
    assert Match(rule).verdict(answer, reference)["correct"] is correct


@pytest.mark.parametrize("answer, correct", [("1.0", True), ("0.4", True), ("1.01", False), ("none", False)])
def test_a_tolerance_is_absolute_and_exact(answer, correct):
    assert Match("number", 0.3).verdict(answer, "0.7")["correct"] is correct


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (("near",), "one of exact, letter, number"),
        (("exact", 1), "tolerance is for numbers"),
        (("number", -1), "from 0 on"),
    ],
)
def test_wrong_rules(arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        Match(*arguments)
