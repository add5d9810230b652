"""Whether answers depend on the latents: intervals of paired differences, and the sentence."""

import math

import pytest

from vreflection_hub_card.evaluation.dependence import dependence_table, latents_sentence, summarise_replacement
from vreflection_hub_card.evaluation.statistics import paired_difference, proportion


def pairs(both=0, lost=0, won=0, neither=0):
    first = [True] * (both + lost) + [False] * (won + neither)
    second = [True] * both + [False] * lost + [True] * won + [False] * neither
    return first, second


@pytest.mark.parametrize("cells", [(50, 12, 3, 35), (10, 0, 0, 0), (0, 20, 0, 0), (7, 5, 5, 7)])
def test_the_interval_is_the_normal_one_of_the_table_with_half_an_item_more_in_each_cell(cells):
    both, lost, won, neither = (cell + 0.5 for cell in cells)
    count = both + lost + won + neither
    # The variance of the mean of the values -1, 0 and 1, directly.
    mean = (won - lost) / count
    variance = (won * (1 - mean) ** 2 + lost * (-1 - mean) ** 2 + (both + neither) * mean**2) / count
    half = 1.96 * math.sqrt(variance / count)
    found = paired_difference(*pairs(*cells))
    assert found["difference"] == pytest.approx((cells[2] - cells[1]) / sum(cells), abs=1e-4)
    assert found["low"] == pytest.approx(max(-1, mean - half), abs=1e-3)
    assert found["high"] == pytest.approx(min(1, mean + half), abs=1e-3)


def test_differences_need_pairs():
    with pytest.raises(ValueError, match="paired"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="paired"):
        paired_difference([True], [True, False])


def measured(changed=None, **cells):
    first, second = pairs(**cells)
    return summarise_replacement(
        first,
        second,
        [one != other for one, other in zip(first, second)] if changed is None else [changed] * len(first),
    )


IDLE, NEEDED, SOME = (
    {"both": 90, "neither": 10},
    {"both": 20, "lost": 70, "neither": 10},
    {"both": 75, "lost": 15, "neither": 10},
)


@pytest.mark.parametrize(
    "replacements, sentence",
    [
        ({"zeroed": NEEDED, "shuffled": NEEDED}, "The answers depend on the latents: −70.0 points when zeroed (95 %"),
        ({"zeroed": IDLE, "noise": IDLE}, "The answers do not depend on the latents: 0.0 points when zeroed (95 %"),
        ({"zeroed": {"both": 89, "lost": 1, "won": 2, "neither": 8}}, "The answers do not depend on the latents: +1.0 points"),
        # Significant, but too little to count.
        ({"zeroed": {"both": 960, "lost": 40}}, "The answers do not depend on the latents: −4.0 points"),
        ({"zeroed": SOME}, "The answers depend on the latents in part: −15.0 points when zeroed"),
        # Zeros hurt, but what the latents hold doesn't matter.
        ({"zeroed": NEEDED, "shuffled": IDLE}, "in part: −70.0 points when zeroed (95 % interval −77.8 to −59.4), but 0.0 points with another"),
        # Those that keep the answer's own latents say nothing.
        ({"zeroed": NEEDED, "reversed": IDLE}, "The answers depend on the latents: −70.0"),
        ({"reversed": NEEDED}, "only rearranged"),
        ({"zeroed": {"both": 2}}, "2 rows don't tell"),
        ({"zeroed": {}}, "No answer holds a reflection"),
        ({"shuffled": NEEDED}, "depend on the latents: −70.0 points with another sample's latents"),
    ],
)  # fmt: skip
def test_the_sentence(replacements, sentence):
    assert sentence in latents_sentence({name: measured(**cells) for name, cells in replacements.items()})


def test_where_nothing_is_right_only_equal_answers_say_something():
    assert "none of them is answered right" in latents_sentence({"zeroed": measured(changed=True, neither=100)})
    assert "do not depend" in latents_sentence({"zeroed": measured(changed=False, neither=100)})


def test_the_table_has_a_line_for_each_way():
    result = {
        "accuracy": proportion([True] * 9 + [False]),
        "accuracy_of_reflecting": proportion([True] * 8),
        "replacements": {"zeroed": measured(both=1, lost=7), "shuffled": measured()},
    }
    lines = dependence_table(result).splitlines()
    assert len(lines) == 6 and len(set(map(len, lines))) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0][1:4] == ["10", "9", "90.0%"]
    assert cells[1][1:4] == ["8", "8", "100.0%"]
    assert cells[2][1:4] == ["8", "1", "12.5%"] and cells[2][5] == "−87.5"
    assert cells[3][1:] == ["0", "", "", "", "", "", ""]
