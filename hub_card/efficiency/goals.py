"""A figure against its bound."""

import operator


RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def judge_figure(goal: str, value: float, relation: str, bound: float) -> dict:
    """Says whether a figure meets its goal.

    Args:
        goal (`str`): What the figure is.
        value (`float`): What was measured.
        relation (`str`): A key of `RELATIONS`.
        bound (`float`): What it is held against.
    """
    return {"goal": goal, "value": value, "bound": f"{relation} {bound}", "met": RELATIONS[relation](value, bound)}
