"""Results get into a card only from files of these weights, and into forms that the Hub reads."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from vreflection_hub_card.card import write_card
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.evaluation.statistics import proportion


def entries(folder, task="vstar"):
    return parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / f"{task}.yaml").read_text()))


# Of 191 made-up answers every fourth is wrong to one scorer, every fifth to the other.
STRICT, AUTHORS = (191 - 48) / 191, (191 - 39) / 191


def test_a_benchmark_gets_into_the_text_the_model_index_and_eval_results(folder, write_result):
    card = ModelCard(write_card(folder, results=[write_result(folder)]).read_text())
    (entry,) = entries(folder)
    assert (entry.dataset_id, entry.task_id) == ("craigwu/vstar_bench", "vstar")
    assert entry.dataset_revision == BENCHMARKS["vstar"].revision
    assert entry.value == pytest.approx(STRICT, abs=1e-4) and entry.date == "2026-11-23T10:00:00+00:00"
    assert "8 latent steps" in entry.notes and f"{round(AUTHORS, 4)}" in entry.notes
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "accuracy, scored by `strict`, 8 latent steps, `dac` fed back": pytest.approx(STRICT, abs=1e-4),
        "accuracy, scored by `authors`, 8 latent steps, `dac` fed back": pytest.approx(AUTHORS, abs=1e-4),
    }
    line = next(line for line in card.text.splitlines() if line.startswith("| V* |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:4] == ["191", f"{100 * STRICT:.1f} %"] and cells[5] == f"{100 * AUTHORS:.1f} %"
    assert "| - direct_attributes | 115 |" in card.text and "| - relative_position | 76 |" in card.text
    assert "94.2 % of the answers hold a reflection" in card.text and "No score" not in card.text


def test_only_the_checkpoints_own_decoding_gets_into_eval_results(folder, write_result):
    files = [
        write_result(folder, "with.json"),
        write_result(folder, "without.json", options={"latent_steps": 0}),
        write_result(folder, "never.json", options={"reflect": False}),
        write_result(folder, "early.json", options={"latent_tolerance": 0.2}),
    ]
    card = ModelCard(write_card(folder, results=files).read_text())
    assert len(entries(folder)) == 1 and len(card.data.eval_results) == 8
    assert len({result.metric_name for result in card.data.eval_results}) == 8
    write_card(folder, results=files[1:])
    assert not list((folder / ".eval_results").iterdir())  # that of the earlier card is gone


def test_local_items_are_said_to_be_local_and_stay_out_of_eval_results(folder, write_result):
    path = write_result(folder, data={"folder": "my_vstar"})
    card = ModelCard(write_card(folder, results=[path]).read_text())
    assert "items from a local folder, my_vstar" in card.text
    assert card.data.eval_results[0].dataset_revision is None
    assert not (folder / ".eval_results").exists()


@pytest.mark.parametrize(
    "report, message",
    [
        ({"model": {"name": "tiny", "sha256": {"model.safetensors": "0" * 64}}}, "with other weights"),
        ({"model": "tiny"}, "with other weights"),
        ({"limit": 8}, "only 8 items were asked"),
        ({"tasks": {"chess": {}}}, "can't show the task chess"),
        ({"tasks": {}}, "can't show the task that is missing"),
        ({"tasks": {"vstar": {}}}, "no result file"),
        ({"tasks": 3}, "no result file"),
        ({"tasks": ["vstar"]}, "no result file"),
        ({"versions": {}}, "no result file"),
    ],
)
def test_a_wrong_result_file_is_named(folder, write_result, report, message):
    path = write_result(folder, **report)
    with pytest.raises(InputError, match=message) as raised:
        write_card(folder, results=[path])
    assert str(path) in str(raised.value)
    assert not (folder / "README.md").exists()


def test_the_same_measurement_twice_is_refused(folder, results, write_result):
    with pytest.raises(InputError, match=r"V\* was measured in the same way in .*first.json"):
        write_card(folder, results=[write_result(folder, "first.json"), write_result(folder, "second.json")])
    with pytest.raises(InputError, match="GlyphSearch was measured in the same way"):
        write_card(folder, results=[results[0], results[0]])
    sizes = [write_result(folder, "large.json"), write_result(folder, "small.json", options={"max_pixels": 10**6})]
    with pytest.raises(InputError, match="several picture sizes"):
        write_card(folder, results=sizes)


@pytest.mark.parametrize("content", ["no json", "[]", json.dumps({"command": "x"})])
def test_what_is_no_result_file_is_refused(folder, tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError, match="result file"):
        write_card(folder, results=[path])
    with pytest.raises(InputError, match="can't be read"):
        write_card(folder, results=[tmp_path / "missing.json"])


def test_drawn_items_have_one_score_and_stay_out_of_eval_results(folder, write_result):
    path = write_result(folder, task="glyphsearch_answers", data={"dataset": "GlyphSearch", "split": "test"})
    card = ModelCard(write_card(folder, results=[path]).read_text())
    (result,) = card.data.eval_results
    assert "`exact`" in result.metric_name and "| items | exact |" in card.text
    assert "No score on a public benchmark" in card.text
    line = next(line for line in card.text.splitlines() if line.startswith("| GlyphSearch, answers alone |"))
    assert line.count("|") == 7
    assert not (folder / ".eval_results").exists()


def test_gqa_has_one_score_which_gets_into_eval_results(folder, write_result):
    write_card(folder, results=[write_result(folder, task="gqa")])
    (entry,) = entries(folder, "gqa")
    assert entry.dataset_id == "lmms-lab/GQA" and entry.value == pytest.approx(STRICT, abs=1e-4)
    assert entry.notes == "exact_match accuracy; 8 latent steps, dac fed back; pictures of 3136 to 12845056 pixels"


@pytest.mark.parametrize(
    "zeroed, noise, sentence",
    [
        (10, 60, "The answers depend on the latents: −80.0 points when zeroed (95 % interval −"),
        (10, 61, "The answers depend on the latents in part: −80.0 points when zeroed (95 % interval −"),
        (90, 61, "The answers depend on the latents in part: 0.0 points when zeroed (95 % interval −"),
        (90, 88, "The answers do not depend on the latents: 0.0 points when zeroed (95 % interval −"),
    ],
)  # fmt: skip
def test_whether_the_answers_depend_on_the_latents_follows_from_what_replacing_them_costs(
    folder, results, tmp_path, zeroed, noise, sentence
):
    """Of 90 right answers of 100, and of 20 more where nothing could be replaced; the model's own latents in another order don't count."""
    report = json.loads(results[0].read_text())
    result = report["tasks"]["glyphsearch"]
    result["outcomes"] = {"usual": "1" * 90 + "0" * 10 + "1" * 20}
    result["interventions"], result["reflection_rate"] = {}, proportion([True] * 100 + [False] * 20)
    result["data"]["count"] = 120

    def intervene(name, right):
        result["outcomes"][name] = "1" * right + "0" * (100 - right) + "-" * 20
        accuracy = {"overall": proportion([True] * right + [False] * (100 - right))}
        result["interventions"][name] = {
            "accuracy": accuracy,
            "changed": proportion([False] * right + [True] * (100 - right)),
        }

    path = tmp_path / "results.json"
    intervene("reversed", 89)
    path.write_text(json.dumps(report))
    assert "only rearranged" in write_card(folder, results=[path]).read_text()
    intervene("zeroed", zeroed)
    intervene("noise", noise)
    path.write_text(json.dumps(report))
    card = write_card(folder, results=[path]).read_text()
    assert f"\n**{sentence}" in card and "100 of 120 answers reflect" in card
    assert "| Accuracy with zeros for latents (of 100 answers that reflect) |" in card
    del result["outcomes"]
    path.write_text(json.dumps(report))
    with pytest.raises(InputError, match="no result file of `vreflection evaluate`, it has no 'outcomes'"):
        write_card(folder, results=[path])
