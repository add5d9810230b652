import json
from pathlib import Path

import pytest

from vreflection_hub_card.evaluation.report import BEGIN, END, glyphsearch_table, insert_table


ROOT = Path(__file__).parents[2]
RESULT = ROOT / "hub_card" / "results" / "vreflection_tiny.json"


def test_the_readme_quotes_the_committed_result():
    table = glyphsearch_table(json.loads(RESULT.read_text()))
    readme = (ROOT / "README.md").read_text()
    assert insert_table(readme, table) == readme


def test_the_committed_result_is_of_the_embedded_checkpoint_and_reaches_the_goals():
    from vreflection_hub_card.evaluation.provenance import sha256

    report = json.loads(RESULT.read_text())
    weights = ROOT / "hub_card" / "vreflection_tiny" / "model.safetensors"
    assert report["model"]["sha256"] == {"model.safetensors": sha256(weights)}
    result = report["tasks"]["glyphsearch"]
    assert result["data"]["count"] == 500 and result["data"]["difficulty"] == "default"
    assert result["accuracy"]["overall"]["share"] >= 0.95 and result["reflection_rate"]["share"] >= 0.99


def test_what_was_never_counted_has_no_share():
    report = json.loads(RESULT.read_text())
    report["tasks"]["glyphsearch"]["shuffled_latents"]["accuracy"]["overall"] = {"successes": 0, "count": 0}
    assert "| Accuracy with another sample's latents | none counted |" in glyphsearch_table(report)


def test_a_table_replaces_the_one_between_the_markers():
    document = f"a\n{BEGIN}\nold {END}\nb"
    assert insert_table(document, "| \\1 new |") == f"a\n{BEGIN}\n\n| \\1 new |\n\n{END}\nb"
    with pytest.raises(ValueError, match="no <!-- glyphsearch -->"):
        insert_table("a", "b")
