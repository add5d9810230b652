"""The experiment of rewards without boxes, with the embedded model and a step or two."""

import json

import pytest

from experiments.reward import without_boxes
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
    assert sum(one["count"] for one in result["before"]["by_kind"].values()) == 4
    monkeypatch.setattr(without_boxes, "make_trainer", None)
    without_boxes.run(arm, chosen)
    with pytest.raises(SystemExit, match="is of other options"):
        without_boxes.run(arm, options(tmp_path, "--learning_rate", "1"))
