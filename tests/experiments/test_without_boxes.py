"""The experiment of rewards without boxes, with the embedded model and a step or two."""

import json

import pytest

from experiments.reward import without_boxes
from experiments.reward.reward_table import reward_table
from experiments.reward.start import make_start
from vreflection_hub_card.inference.checkpoints import EMBEDDED


def options(folder, *more):
    given = [
        "--start",
        EMBEDDED,
        "--steps",
        1,
        "--rows",
        2,
        "--answers",
        2,
        "--questions",
        4,
        "--work",
        folder / "work",
    ]
    return without_boxes.parse_arguments([*map(str, [*given, "--output", folder / "results"]), *more])


@pytest.mark.slow
@pytest.mark.parametrize("arm", without_boxes.LEARNERS)
def test_an_arm_trains_is_asked_and_done_once(tmp_path, monkeypatch, arm):
    chosen = options(tmp_path)
    without_boxes.run(arm, chosen)
    result = json.loads((tmp_path / "results" / f"{arm}_seed0.json").read_text())
    assert [log["step"] for log in result["log"]] == [1]
    assert result["before"]["accuracy"]["count"] == result["after"]["accuracy"]["count"] == 4
    assert set(result["gained"]) == {"difference", "low", "high"}
    for answers in (result["before"], result["after"]):
        assert set(answers["replacements"]) == {"zeroed", "noise", "shuffled"}
        assert sum(one["count"] for one in answers["by_kind"].values()) == answers["made_to_reflect"]["count"] == 4
    monkeypatch.setattr(without_boxes, "make_trainer", None)
    without_boxes.run(arm, chosen)
    with pytest.raises(SystemExit, match="is of other options"):
        without_boxes.run(arm, options(tmp_path, "--learning_rate", "1"))


@pytest.mark.slow
def test_the_start_is_a_run_stopped_early_and_goes_on_where_it_was_stopped(tmp_path):
    few = "--steps 4 --batch 1 --scenes 8 --test_scenes 3 --device cpu --stop_at".split()
    weights = []
    for stops in ((2,), (1, 2)):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            make_start(folder, *few, str(stop))
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    optimised = json.loads((folder / "training_facts.json").read_text())["runs"][-1]
    assert optimised["steps"] == 2 and "step 4, stopped early" in optimised["optimiser"]["lr_scheduler_type"]
    chosen = options(tmp_path, "--start", str(folder))
    assert without_boxes.evaluate(chosen.start, chosen, "start")[0]["made_to_reflect"]["count"] == 4


def answers(right, of_three_hops):
    """Of 100 questions, half of them with three hops."""
    kinds = {"kinship, 0 hops": (right - of_three_hops, 50), "kinship, 3 hops": (of_three_hops, 50)}
    return {
        "accuracy": {"share": right / 100},
        "reflection_rate": {"share": 1.0},
        "made_to_reflect": {"share": right / 80},
        "replacements": {"zeroed": {"accuracy": {"share": 0.1}}, "noise": {}, "shuffled": {}},
        "by_kind": {name: {"successes": one, "count": count} for name, (one, count) in kinds.items()},
    }


def test_the_table_says_what_was_gained():
    gained = {"difference": -0.025, "low": -0.05, "high": 0.01}
    result = {"arm": "grpo", "options": {"start": "a", "steps": 9}, "seconds": 90, "before": answers(60, 15)}
    result |= {"after": answers(50, 20), "gained": gained, "log": [{"reward": 0.5}] * 100 + [{"reward": 0.25}] * 100}
    assert reward_table([{"arm": "sft"}, result]).splitlines()[2:] == [
        "| the start | 60.0 | 30.0 | 100.0 | 75.0 | 10.0 | – | – |  |  |  |",
        "| reward, gradients through the latents | 50.0 | 40.0 | 100.0 | 62.5 | 10.0 | – | – | −2.5 (−5.0 to +1.0) | 50.0 to 25.0 | 2 |",
    ]
    with pytest.raises(ValueError, match="different options"):
        reward_table([result, {**result, "arm": "sft", "options": {"start": "b", "steps": 9}}])
