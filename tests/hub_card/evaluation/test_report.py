import json
from pathlib import Path

import pytest

from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.report import glyphsearch_table, with_interval
from vreflection_hub_card.evaluation.statistics import proportion


ROOT = Path(__file__).parents[3]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "hub_card" / "results").glob("*.json")}


@pytest.mark.parametrize("name", ["vreflection_tiny", "vreflection_tiny_mixed", "vreflection_tiny_chains"])
def test_the_results_are_those_of_the_embedded_weights(name):
    weights = ROOT / "hub_card" / "vreflection_tiny" / "model.safetensors"
    assert RESULTS[name]["model"]["sha256"] == {"model.safetensors": sha256(weights)}


GOALS = {"attribute": 0.99, "relation": 0.95, "spatial 0": 0.95, "spatial 1": 0.95, "spatial 2": 0.95}
GOALS |= {"kinship 0": 0.99, "kinship 1": 0.97, "kinship 2": 0.95, "kinship 3": 0.90}


def test_the_embedded_checkpoint_reaches_the_goals():
    reached = {}
    for name, difficulty, count in (
        ("vreflection_tiny", "default", 500),
        ("vreflection_tiny_mixed", "mixed", 500),
        ("vreflection_tiny_chains", "chains", 1000),
    ):
        result = RESULTS[name]["tasks"]["glyphsearch"]
        assert (result["data"]["count"], result["data"]["difficulty"]) == (count, difficulty)
        assert result["decoding"]["latent_feedback"] == "dac" and result["reflection_rate"]["share"] >= 0.99
        reached |= {kind: measured["share"] for kind, measured in result["accuracy"].items()}
    missed = {kind: reached[kind] for kind, goal in GOALS.items() if reached[kind] < goal}
    assert not missed


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("replaced", ["zeroed", "noise", "shuffled", "other_picture", "filler"])
def test_the_embedded_checkpoints_answers_need_their_latents(name, replaced):
    measured = RESULTS[name]["tasks"]["glyphsearch"]["interventions"][replaced]
    own, other = measured["usual_accuracy_of_the_same"]["overall"], measured["accuracy"]["overall"]
    assert own["share"] - other["share"] >= 0.3


@pytest.fixture
def report():
    return json.loads(json.dumps(RESULTS["vreflection_tiny"]))


def test_kinds_and_steps_of_chains_are_rendered_and_older_results_have_none(report):
    result = report["tasks"]["glyphsearch"]
    del result["pointing_by_step"]
    assert "hop" not in glyphsearch_table(report) and "step 1" not in glyphsearch_table(report)
    right, wrong, both = proportion([True]), proportion([False]), proportion([True, False])
    result["accuracy"] = {"overall": both, "kinship 0": right, "kinship 1": wrong, "spatial 2": both}
    result["pointing_by_step"] = {"dac": {"1": right, "2": wrong, "last": both}}
    table = glyphsearch_table(report)
    assert f"| - kinship questions, 0 hops | {with_interval(right)} |" in table
    assert f"| - kinship questions, 1 hop | {with_interval(wrong)} |" in table
    assert f"| - spatial questions, 2 hops | {with_interval(both)} |" in table
    assert f"| - of the last step alone, DAC | {with_interval(both)} |" in table
    assert "DAC's largest attention inside the box of its own step, from step 1 on: 100.0 %, 0.0 %." in table


def test_what_was_never_counted_has_no_share(report):
    report["tasks"]["glyphsearch"]["interventions"]["shuffled"]["accuracy"]["overall"] = {"successes": 0, "count": 0}
    assert "| Accuracy with another sample's latents | none counted |" in glyphsearch_table(report)
