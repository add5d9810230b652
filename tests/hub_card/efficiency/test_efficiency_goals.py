import pytest

from vreflection_hub_card.efficiency.goals import judge_figure
from vreflection_hub_card.efficiency.rounds import in_turns


def test_everybody_is_first_once():
    orders = [in_turns("abc", number) for number in range(3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert sorted(order[0] for order in orders) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "relation, met", [("<", (True, False, False)), ("<=", (True, True, False)), (">=", (False, True, True))]
)
def test_a_goal_holds_at_its_bound_or_not(relation, met):
    assert tuple(judge_figure("x", value, relation, 1.0)["met"] for value in (0.9, 1.0, 1.1)) == met
