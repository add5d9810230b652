import copy
import json
from pathlib import Path

import pytest

from vreflection_hub_card.efficiency.contenders import PHASES
from vreflection_hub_card.efficiency.report import insert_tables, render


def test_every_figure_is_in_the_tables(result):
    text = render(result)
    for title, variant in result["variants"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
        for phase in PHASES:
            assert f"{1000 * variant['ours'][phase]['median']:.3g} (" in line
            assert f"| {variant['ratios'][phase]['median']:.3f} (" in line
    for size, one in result["batches"].items():
        assert f"| {size} | {one['stock']['median']:.3g} | {one['ours']['median']:.3g} |" in text
    assert all(f"| {goal['goal']}: {goal['bound']} |" in text for goal in result["goals"])
    assert text.count("**not met**") == sum(not goal["met"] for goal in result["goals"])
    assert all(f"Not run: {title}, {reason}." in text for title, reason in result["not_run"].items())
    assert f"`{result['command']}`" in text


@pytest.mark.parametrize("ratio, verdict", [(0.5, "is faster"), (1.5, "is not faster")])
def test_whether_compiling_pays_is_said(result, ratio, verdict):
    compiled = copy.deepcopy(result["variants"]["sdpa, static cache"]) | {"compiled": True}
    for phase in PHASES:
        compiled["ours"][phase]["median"] *= ratio
    variants = {**result["variants"], "sdpa, static cache, compiled": compiled}
    text = render({**result, "variants": variants})
    assert f"a latent step {verdict} than without compiling ({ratio:.2f} of its time)" in text


@pytest.mark.parametrize(
    "path", [["variants"], ["variants", "sdpa, dynamic cache"], ["memory", "inference_only"], ["batches"], ["goals"]]
)
def test_a_result_without_figures_is_refused(result, path):
    broken = copy.deepcopy(result)
    holder = broken
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    with pytest.raises(ValueError, match="lacks figures"):
        render(broken)


def test_tables_go_between_the_markers_of_their_name(result):
    begin, end = "<!-- efficiency tiny -->", "<!-- /efficiency tiny -->"
    assert insert_tables(f"a\n{begin}\nold\n{end}\nb", result) == f"a\n{begin}\n\n{render(result)}\n\n{end}\nb"
    with pytest.raises(ValueError, match="no <!-- efficiency tiny -->"):
        insert_tables("<!-- efficiency 7b --><!-- /efficiency 7b -->", result)


@pytest.mark.parametrize(
    "name, document", [("small", "README.md"), ("vreflection_tiny", "hub_card/results/efficiency.md")]
)
def test_the_documents_quote_the_committed_results(name, document):
    root = Path(__file__).parents[3]
    committed = json.loads((root / f"hub_card/results/efficiency_{name}.json").read_text())
    text = (root / document).read_text()
    assert insert_tables(text, committed) == text and committed["command"] in text
