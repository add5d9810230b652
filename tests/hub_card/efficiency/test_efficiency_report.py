import copy
import json
from pathlib import Path

import pytest

from vreflection_hub_card.efficiency.contenders import PHASES
from vreflection_hub_card.efficiency.report import insert_tables, milliseconds, render


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
    flash = "needs the package flash-attn, a GPU and weights in half precision"
    assert f"Not run, {flash}: flash_attention_2." in text
    assert "Not run, not asked for (`--compile`): sdpa, static cache, compiled; eager, static cache, compiled." in text
    assert f"`{result['command']}`" in text


@pytest.mark.parametrize("ratio, verdict", [(0.5, "is faster"), (1.5, "is not faster")])
def test_whether_compiling_pays_is_said(result, ratio, verdict):
    compiled = copy.deepcopy(result["variants"]["sdpa, static cache"]) | {"compiled": True}
    for phase in PHASES:
        compiled["ours"][phase]["median"] *= ratio
    variants = {**result["variants"], "sdpa, static cache, compiled": compiled}
    text = render({**result, "variants": variants})
    assert f"a latent step {verdict} than without compiling ({ratio:.2f} of its time)" in text


def test_what_one_graph_saves_is_told_as_a_share_of_an_answer(result):
    compiled = copy.deepcopy(result["variants"]["sdpa, static cache"]) | {"compiled": True}
    for phase, seconds in (("prefill", 0.5), ("text_step", 0.01), ("latent_step", 0.02)):
        compiled["ours"][phase]["median"] = seconds
    graph = {
        "singly": {"median": 0.012},
        "one_graph": {"median": 0.006},
        "ratio": {"median": 0.5, "low": 0.4, "high": 0.6},
        "first_call_seconds": {"singly": 30.2, "one_graph": 200.4},
    }
    title = "sdpa, static cache, compiled"
    told = {**result, "variants": {**result["variants"], title: compiled}}
    told["headroom"] = {**result["headroom"], "one_graph": graph}
    # The prefill, 8 latent steps, 2 of text and the start token's.
    answer = 0.5 + 8 * 0.02 + 3 * 0.01
    text = render(told)
    assert "take 0.500 (0.400 to 0.600) of the time of 8 compiled ones" in text
    assert f"save {100 * 8 * 0.006 / answer:.1f} % of an answer" in text
    assert f"or {100 * 8 * 0.014 / answer:.1f} % if they left" in text
    assert "Compiling takes 200 s instead of 30 s" in text
    assert "one graph" not in render(result)


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


def test_times_have_three_figures_and_no_exponent():
    assert milliseconds({"median": 27.123, "quartile_1": 0.0012345, "quartile_3": 0.5}) == "27,100 (1.23 to 500)"


@pytest.mark.parametrize(
    "name, document",
    [
        ("7b_cpu", "README.md"),
        ("small", "hub_card/results/efficiency.md"),
        ("tiny", "hub_card/results/efficiency.md"),
        ("vreflection_tiny", "hub_card/results/efficiency.md"),
    ],
)
def test_the_documents_quote_the_committed_results(name, document):
    root = Path(__file__).parents[3]
    committed = json.loads((root / f"hub_card/results/efficiency_{name}.json").read_text())
    text = (root / document).read_text()
    assert insert_tables(text, committed) == text and committed["command"] in text
