"""Thresholds of `reflect="uncertain"`: what each is measured to cost and to gain, and which are tried."""

import copy
import json

import pytest
import torch
from matplotlib.figure import Figure

from vreflection_hub_card.evaluation.own_rows import read_own_rows
from vreflection_hub_card.evaluation.rows_accuracy import evaluate_rows
from vreflection_hub_card.evaluation.thresholds import (
    QUANTILES,
    draw_thresholds,
    entropies_where_answers_begin,
    evaluate_thresholds,
    thresholds_table,
)
from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.inference.checkpoints import EMBEDDED, load_checkpoint
from vreflection_hub_card.inference.encoding import encode_prompts
from vreflection_training.cli import main


LIMITS = {"batch_size": 5, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def embedded():
    return load_checkpoint(EMBEDDED, "cpu")


@pytest.fixture(scope="module")
def rows():
    drawn = (draw_question("validation", index, "chains") for index in range(5))
    return [{"question": one.text, "answer": one.answer, "image": scene.image} for scene, one in drawn]


@pytest.fixture(scope="module")
def measured(embedded, rows):
    return evaluate_thresholds(*embedded, rows, **LIMITS)


@pytest.fixture(scope="module")
def first_entropies(embedded, rows):
    """By a forward pass over each prompt alone, (5,)."""
    model, processor = embedded
    from vreflection_hub_card.evaluation.matching import Match

    found = []
    for row in read_own_rows(rows, Match()):
        with torch.no_grad():
            logits = model(**encode_prompts(processor, [row.conversation()], "cpu")).logits[0, -1].double()
        allowed = [token for token in range(len(logits)) if token not in model.config.latent_token_ids]
        probabilities = logits[allowed].softmax(-1)
        found.append(-(probabilities * probabilities.log()).sum())
    return torch.stack(found)


def test_the_ends_are_never_and_always(embedded, rows, measured):
    first, *_, last = measured["thresholds"]
    for one, threshold, reflect in ((first, 0.0, True), (last, "inf", False)):
        expected = evaluate_rows(*embedded, rows, **LIMITS, reflect=reflect).result
        assert one["threshold"] == threshold and one["accuracy"] == expected["accuracy"]
        assert one["mean_latent_steps"] == 8 * reflect and one["reflection_rate"] == expected["reflection_rate"]
    assert measured["data"]["count"] == 5 and measured["decoding"]["max_reflections"] == 1


def test_quantiles_of_the_entropies_where_answers_begin_are_tried(measured, first_entropies):
    expected = [first_entropies.quantile(quantile).item() for quantile in QUANTILES]
    tried = [one["threshold"] for one in measured["thresholds"]][1:-1]
    assert tried == pytest.approx(expected, abs=2e-4)
    assert list(measured["entropy_quantiles"].values()) == pytest.approx(expected, abs=2e-4)


def test_thoughts_are_not_where_an_answer_begins(embedded):
    config = copy.deepcopy(embedded[0].config)
    options = embedded[0].reflection_options()
    steps = list(torch.arange(12.0).view(6, 2))  # of two rows
    tokens = torch.tensor([[5, 9, 4, 3, 3, 3], [5, 6, 4, 3, 3, 3]])
    assert entropies_where_answers_begin(config, options, tokens, steps) == [0, 1]
    config.think_end_token_id = 9
    assert entropies_where_answers_begin(config, options, tokens, steps) == [6], "the second row still thinks"


def test_table_and_figure_show_every_threshold(measured):
    lines = thresholds_table(measured).splitlines()
    assert len(lines) == 2 + len(measured["thresholds"])
    assert lines[2].split("|")[1].strip() == "0" and lines[-1].split("|")[1].strip() == "inf"
    figure = draw_thresholds(measured)
    assert isinstance(figure, Figure) and len(figure.axes[0].texts) == len(measured["thresholds"])


@pytest.mark.parametrize("thresholds", [[-1.0], [float("nan"), 0.0]])
def test_a_wrong_threshold_is_refused_before_anything_is_asked(embedded, thresholds):
    with pytest.raises(ValueError, match="from 0 on, in nats"):
        evaluate_thresholds(*embedded, [], thresholds)


@pytest.mark.parametrize("own", [False, True])
def test_the_command(own, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--limit", "2", "--difficulty", "chains"]
    if own:
        rows[0]["image"].save("0.png")
        (tmp_path / "my.jsonl").write_text(json.dumps(rows[0] | {"image": "0.png"}))
        asked = ["--rows", "my.jsonl", "--max-new-tokens", "14"]
    assert main(["evaluate", *asked, "--device", "cpu", "--thresholds", "0", "3.9"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "thresholds.json").read_text())
    assert list(report) == ["command", "date", "seconds", "model", "versions", "machine", "tasks"]
    result = report["tasks"]["thresholds"]
    assert [one["threshold"] for one in result["thresholds"]] == [0, 3.9, "inf"]
    assert thresholds_table(result) in out
    assert (tmp_path / "thresholds.png").read_bytes()[:4] == b"\x89PNG"
    if own:
        assert report["command"] == (
            "vreflection evaluate vreflection_tiny --rows my.jsonl --max-new-tokens 14 --thresholds 0.0 3.9"
        )
        assert result["data"]["file"] == "my.jsonl"
    else:
        assert report["command"] == (
            "vreflection evaluate vreflection_tiny --split validation --difficulty chains --limit 2 --thresholds 0.0 3.9"
        )
        assert result["data"]["split"] == "validation" and result["data"]["last_seed"] > result["data"]["first_seed"]


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["--thresholds", "--replace"], "--replace has no meaning for --thresholds"),
        (["--thresholds", "--no-reflect"], "--reflect has no meaning for --thresholds"),
        (["--thresholds", "--tasks", "mmvp"], "leave --tasks out"),
        (["--thresholds", "--max-new-tokens", "9"], "--max-new-tokens has no meaning for --thresholds"),
        (["--thresholds", "--latent-steps", "4", "8"], "one number of --latent-steps"),
        (["--thresholds", "-1"], "from 0 on, in nats, got -1.0"),
        (["--thresholds", "--output", "a.png"], "names the JSON file"),
        (["--max-reflections", "2"], "--max-reflections is for --thresholds"),
    ],
)
def test_mistakes(arguments, fragment, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *arguments]) == 2
    assert fragment in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
