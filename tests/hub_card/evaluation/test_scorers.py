import pytest

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.evaluation.scorers import (
    SCORERS,
    score_exact,
    score_exact_match,
    score_strict,
    summarise_verdicts,
    tagged,
)
from vreflection_hub_card.evaluation.statistics import proportion


REFLECTION = "<|sovt|>" + 8 * "<|lvr|>" + "<|eovt|>"

# What was written, and the letter that `authors`, `authors_table` and `strict` read.
ANSWERS = [
    ("B", "B", "B", "B"),
    ("b", "B", None, "B"),
    ("B.", "B", "B", "B"),
    (" B\n", "B", "B", "B"),
    ("(B)", "B", None, "B"),
    ("[b]", "B", None, "B"),
    ("'B'", "B", None, "B"),
    ("B)", "B", "B", "B"),
    ("B: the left one", "B", "B", "B"),
    ("B. Kevlar", "B", "B", "B"),
    ("(b) kevlar", "B", None, "B"),
    ("B) kevlar", "B", "B", "B"),
    ("B\n\nA man holds it.", "B", "B", "B"),
    ("**B**", "B", None, "B"),
    ("**Answer:** B", "A", None, "B"),
    ("$\\boxed{B}$", "B", None, "B"),
    ("Option B", "B", None, "B"),
    ("<answer>B</answer>", "B", "B", "B"),
    ("<answer> (b) </answer>", "B", None, "B"),
    ("<answer>B", "B", "B", "B"),
    ("A <answer>C</answer> or <answer>B</answer>", "B", "B", "B"),
    ("I see a cat. <answer>B. a cat</answer>", "B", "B", "B"),
    # The first letter in any case, of "the" the e, and of "answer" the a.
    ("The answer is B", "E", None, "B"),
    ("The answer is B.", "E", None, "B"),
    ("Answer: (b)", "A", "A", "B"),
    ("The correct option is: (B) Kevlar", "E", None, "B"),
    ("The best answer would be option B, as it is red.", "E", None, "B"),
    ("I choose B.", "C", None, "B"),
    ("I would go with (B)", "D", None, "B"),
    ("B is correct.", "B", "B", "B"),
    ("B is the right answer", "B", "B", "B"),
    ("It is not black. So the final answer is B", "B", None, "B"),
    ("The answer is A.", "E", None, "A"),
    ("The answer is (a), because it is red", "E", None, "A"),
    ("E", "E", "E", "E"),
    # No letter is given as the answer, or more than one.
    ("", None, None, None),
    ("  \n", None, None, None),
    ("No.", None, None, None),
    ("A or B", "A", "A", None),
    ("(A) or (B)", "A", None, None),
    ("A and B.", "A", "A", None),
    ("A, B", "A", "A", None),
    ("A/B", "A", "A", None),
    ("A. red or B. blue", "A", "A", None),
    ("A. red\nB. blue", "A", "A", None),
    ("The answer is A or B", "E", None, None),
    ("The answer is (A) or (B)", "E", None, None),
    ("The answer is A, B", "E", None, None),
    ("The answer is A. The answer is B.", "E", None, None),
    ("I see a dog", "E", None, None),
    ("A dog", "A", "A", None),
    ("A dog.", "A", "A", None),
    ("The answer is a dog", "E", None, None),
    ("I pick a dog", "C", None, None),
    ("The answer is not B", "E", None, None),
    ("B is right of the cat", "B", "B", None),
    ("E.g. a dog", "E", "E", None),
    ("Blue", "B", "B", None),
    ("Neither A nor B is correct.", "E", None, None),
    ("A or B is correct.", "A", "A", None),
    ("The answer isn't (B)", "E", None, None),
    ("F", None, None, None),
    ("<answer></answer>", "A", None, None),
    ("B <answer>dunno</answer>", "D", None, None),
    # Raw text: the token that closes a reflection has an e in its name.
    (REFLECTION + "B<|im_end|>", "E", None, "B"),
    (REFLECTION + "<answer>B</answer><|im_end|>", "B", "B", "B"),
    (REFLECTION + "The answer is B.<|im_end|>", "E", None, "B"),
    (REFLECTION + "I see a dog<|im_end|>", "E", None, None),
    (REFLECTION, "E", None, None),
    ("<|sovt|>" + 8 * "<|lvr|>", None, None, None),
]


@pytest.mark.parametrize("text, authors, table, strict", ANSWERS)
def test_letters(text, authors, table, strict):
    read = {name: SCORERS[name](text, ()) for name in ("authors", "authors_table", "strict")}
    assert read == {"authors": authors, "authors_table": table, "strict": strict}


def test_the_tagged_part():
    assert tagged("<answer>A</answer> or <answer>\nB") == "B"
    assert tagged(" It is B. ") == "It is B."


@pytest.mark.parametrize(
    "text, options, letter",
    [
        ("Light blue.", ("red", "light blue"), "B"),
        (REFLECTION + "<answer>light blue</answer>", ("red", "Light blue"), "B"),
        ("a dog", ("a dog", "a cat"), "A"),
        ("B is darker", ("A is darker", "B is darker", "About the same"), "B"),
        ("It is light blue", ("red", "light blue"), None),
        ("light", ("red", "light blue"), None),
        ("red", ("red", "Red."), None),
        ("", ("", "red"), None),
        ("$5", ("$4", "$5"), "B"),
        ("A", ("B", "A"), "A"),
        ("A. light blue", ("red", "light blue"), "A"),
        ("The answer is D", ("red", "light blue"), "D"),
    ],
)
def test_the_text_of_an_option(text, options, letter):
    assert score_strict(text, options) == letter


@pytest.mark.parametrize(
    "text, option",
    [
        ("K", "K"),
        (f"{REFLECTION}K<|im_end|>", "K"),
        ("k", None),
        ("K.", None),
        ("the K", None),
        ("Q", None),
        ("", None),
    ],
)
def test_exact_takes_an_option_and_nothing_else(text, option):
    assert score_exact(text, ("A", "K")) == option


def test_only_strict_reads_the_options():
    letters = {name: SCORERS[name]("1", ("0", "1")) for name in ("authors", "authors_table", "strict")}
    assert letters == {"authors": None, "authors_table": None, "strict": "B"}


def run(groups, correct, unparsed=()):
    return [
        {
            "id": str(index),
            "groups": group,
            "verdicts": {"strict": {"letter": None if index in unparsed else "A", "correct": bool(right)}},
        }
        for index, (group, right) in enumerate(zip(groups, correct))
    ]


def summarise(name, samples):
    return summarise_verdicts(BENCHMARKS[name], samples, "strict")


def test_mmvp_single_and_pair():
    groups = [{"pair": pair} for pair in "112233"]
    got = summarise("mmvp", run(groups, [1, 1, 1, 0, 0, 0], unparsed={4, 5}))
    assert got == {
        "accuracy": proportion([True] * 3 + [False] * 3),
        "unparsed": 2,
        "pair": proportion([True, False, False]),
    }
    # With a limit, the pair that was asked about in part isn't counted.
    assert summarise("mmvp", run(groups[:5], [1, 1, 1, 0, 1]))["pair"] == proportion([True, False])


def test_vstar_and_blink_by_group_and_micro_average():
    groups = [{"category": name} for name in ("relative_position", "direct_attributes", "direct_attributes")]
    got = summarise("vstar", run(groups, [0, 1, 1]))
    assert got["accuracy"]["share"] == 0.6667
    assert got["category"] == {
        "direct_attributes": proportion([True, True]),
        "relative_position": proportion([False]),
    }
    got = summarise("blink", run([{"subset": name} for name in ("Jigsaw", "Counting")], [1, 0]))
    assert {name: one["share"] for name, one in got["subset"].items()} == {"Counting": 0, "Jigsaw": 1}


def test_hrbench_mean_and_cyclic_score():
    groups = [{"category": name, "cycle": name} for name in ("FSP", "FCP") for _ in range(4)]
    got = summarise("hrbench4k", run(groups, [1, 1, 1, 1, 1, 1, 1, 0]))
    assert got["accuracy"] == proportion([True] * 7 + [False])
    assert {name: one["share"] for name, one in got["category"].items()} == {"FCP": 0.75, "FSP": 1}
    assert got["cycle"] == proportion([True, False])


def test_scores_over_items_that_cannot_be_right():
    with pytest.raises(ValueError, match="vstar: scored twice: 0."):
        summarise("vstar", 2 * run([{"category": "direct_attributes"}], [1]))
    with pytest.raises(ValueError, match="mmvp: a pair has 2 items, but not 1"):
        summarise("mmvp", run(3 * [{"pair": "1"}], [1, 1, 1]))
    pairs = [{"pair": str(max(index // 2, 1))} for index in range(301)][1:]
    assert len(pairs) == 300
    with pytest.raises(ValueError, match="mmvp: a pair has 2 items, but not 1, 150."):
        summarise("mmvp", run(pairs, 300 * [1]))
    whole = summarise("mmvp", run([{"pair": str(index // 2)} for index in range(300)], 300 * [1]))
    assert whole["pair"] == proportion(150 * [True])


@pytest.mark.parametrize(
    "text, read",
    [
        ("t-shirt", "t-shirt"),
        (" T-Shirt.\n", "t-shirt"),
        ("tshirt", "t-shirt"),  # lmms-eval ignores punctuation, the hyphen too
        (REFLECTION + "<answer> T-shirt </answer>", "t-shirt"),
        ("t shirt", "t shirt"),
        ("The t-shirt", "The t-shirt"),
        ("", None),
        (REFLECTION, None),
    ],
)
def test_exact_match_ignores_case_and_punctuation_alone(text, read):
    assert score_exact_match(text, ("t-shirt",)) == read


@pytest.mark.parametrize("scorer", ["strict", "exact", "exact_match"])
def test_thoughts_in_words_do_not_count(scorer):
    for thoughts in ("<think>\nIt could be A. The answer is A? No.", "\n", "It is A."):
        assert SCORERS[scorer](f"{thoughts}</think>\n\n<|sovt|><|lvr|><|eovt|>B<|im_end|>", ("A", "B")) in ("B", "b")
