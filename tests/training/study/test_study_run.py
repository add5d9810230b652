"""The study, as small as it can be: run, resumed, extended, summarised."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.statistics import wilson_interval
from vreflection_training.study.plots import draw_all
from vreflection_training.study.run import PartFailed, StudyRun
from vreflection_training.study.summary import (
    difference,
    outcomes,
    pointing,
    pointing_shares,
    read_results,
    share_right,
    summarise,
    verdict,
)
from vreflection_training.study.table import ARMS, PLAIN, read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    table = yaml.safe_load(ARMS.read_text())
    # Two steps a part: the first has a learning rate of zero, and an untrained BCM is no teacher.
    table["forms"] = {"quick": {"base_steps": 2, "part_steps": 2, "scenes": 4, "seeds": {"main": [0], "others": [0]}}}
    main = table["groups"]["main"]["arms"]
    two_stage = main["two_stage"] | {"evaluate": {"reflecting": {"reflect": True}}}
    table["groups"] = {
        "main": table["groups"]["main"] | {"arms": {"base": main["base"], "two_stage": two_stage}},
        "steps": table["groups"]["steps"]
        | {
            "compare": ["two_stage"],
            "arms": {"steps_4": table["groups"]["steps"]["arms"]["steps_4"] | {"parts": ["S1"]}},
        },
    }
    path = tmp_path_factory.mktemp("table") / "arms.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return read_study(path)


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run = StudyRun(study, study.forms["quick"], folder / "work", folder / "results")
    assert run() == []
    return folder


def test_every_arm_has_its_file(study, done):
    results = read_results(study, done / "results")
    assert list(results) == ["base", "two_stage", "steps_4"]
    for name, result in results.items():
        told = result["seeds"]["0"]["evaluations"]
        assert list(told) == list(study.arms[name].evaluate)
        assert all(len(one["outcomes"]["usual"]) == 4 for one in told.values())
    reflecting = results["base"]["seeds"]["0"]["evaluations"]["reflecting"]
    assert reflecting["reflection_rate"]["share"] == 1.0 and list(reflecting["pointing"]) == ["llm"]
    assert results["steps_4"]["seeds"]["0"]["evaluations"]["plain"]["decoding"]["latent_steps"] == 4


def test_arms_start_from_one_base_and_see_the_same_scenes(done):
    work = done / "work"
    logs = sorted(work.rglob("checkpoint.log"))
    assert len(logs) == 2 + 1
    config = json.loads((work / "base" / "config.json").read_text())
    assert not config["has_bcm"] and not config["has_dac"]
    configs = [json.loads(path.read_text()) for path in work.rglob("checkpoint/config.json")]
    assert sorted(told["num_latent_tokens"] for told in configs) == [4, 8, 8]
    assert all(told["has_bcm"] and told["has_dac"] for told in configs)


def test_called_again_it_trains_nothing_and_only_adds(study, done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.suffix != ".lock" and path.is_file()}
    assert StudyRun(study, study.forms["quick"], done / "work", done / "results")() == []
    assert before == {
        path: path.stat().st_mtime_ns for path in done.rglob("*") if path.suffix != ".lock" and path.is_file()
    }


HOLD = """
import sys
from contextlib import ExitStack
from filelock import FileLock
with ExitStack() as locks:
    for path in sys.argv[1:]:
        locks.enter_context(FileLock(path))
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_is_running_is_left_to_it(study, done, tmp_path):
    run = StudyRun(study, study.forms["quick"], tmp_path / "work", tmp_path / "results")
    locks = tmp_path / "work" / "running"
    locks.mkdir(parents=True)
    shutil.copytree(done / "work" / "base", tmp_path / "work" / "base")
    paths = [str(locks / f"{name}-0.lock") for name in ("base", "two_stage", "steps_4")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, *paths], **pipes) as other:
        try:
            assert other.stdout.readline() == b"held\n"
            assert len(run()) == 3
        finally:
            other.kill()
    assert not list((tmp_path / "work").rglob("checkpoint")) and not list((tmp_path / "results").iterdir())


def test_no_time_leaves_everything_listed(study, tmp_path):
    run = StudyRun(study, study.forms["quick"], tmp_path / "work", tmp_path / "results", hours=0)
    assert run() == [("base", 0), ("two_stage", 0), ("steps_4", 0)]


def test_results_of_another_definition_are_not_mixed_in(study, done, tmp_path):
    told = json.loads((done / "results" / "two_stage.json").read_text())
    (tmp_path / "two_stage.json").write_text(json.dumps(told | {"part_steps": 99}))
    with pytest.raises(ValueError, match="part_steps = 99, not 2"):
        StudyRun(study, study.forms["quick"], done / "work", tmp_path)()


def test_results_of_another_base_are_not_extended(study, done, tmp_path):
    told = json.loads((done / "results" / "two_stage.json").read_text())
    assert told["base"] == sha256(done / "work" / "base" / "model.safetensors")
    (tmp_path / "two_stage.json").write_text(json.dumps(told | {"base": "0" * 64}))
    with pytest.raises(ValueError, match="another base"):
        StudyRun(study, study.forms["quick"], done / "work", tmp_path)()


def test_the_summary_tells_everything(study, done, tmp_path):
    results = read_results(study, done / "results")
    text = summarise(study, study.forms["quick"], results, [("steps_4", 1)], {"steps": "Nothing."})
    for group in study.groups:
        assert f"## {group.title}" in text and group.expectation.strip() in text
    assert text.count("Found: ") == 1 and "Found: Nothing." in text.split("## Do the latents")[0]
    assert "- steps_4, seed 1" in text and "another sample's latents" not in text.split("## Do the latents")[0]
    pictures = draw_all(study, results, tmp_path)
    assert [path.name for path in pictures] == ["accuracy.png", "pointing.png", "interventions.png"]
    assert all(path.stat().st_size > 5_000 for path in pictures)


def test_seeds_answer_the_same_scenes_so_that_they_do_not_narrow_the_interval():
    one, three = ("1101" * 50,), ("1101" * 50, "0100" * 50, "1111" * 50)
    alone, together = (share_right(dict(enumerate(outcomes))) for outcomes in (one, three))
    assert alone["share"] == 0.75 and together["share"] == pytest.approx((0.75 + 0.25 + 1) / 3)
    assert (alone["low"], alone["high"]) == wilson_interval(150, 200)
    assert (together["low"], together["high"]) == pytest.approx(wilson_interval(200 * 2 / 3, 200))


def result_of(outcomes, **told):
    """An arm's result file with these outcomes, by seed."""
    usual = {seed: {"evaluations": {"plain": {"outcomes": {"usual": text}} | told}} for seed, text in outcomes.items()}
    return {"seeds": usual, "parts": [{"stage": "2"}]}


def test_a_difference_is_paired_on_the_seeds_that_both_have():
    first = result_of({"0": "0" * 100, "1": "1" * 100})
    second = result_of({"1": "1" * 60 + "0" * 40, "2": "0" * 100})
    change = difference(outcomes(first), outcomes(second))
    assert change["difference"] == pytest.approx(-0.4) and change["seeds"] == 1
    assert verdict(change).startswith("-40.0 (") and "noise" not in verdict(change)
    assert verdict(difference(outcomes(first), outcomes(first))) == "+0.0 (+0.0 to +0.0), within noise"


def test_what_was_never_trained_points_nowhere():
    told = {"pointing": {"dac": {"share": 0.5}, "llm": {"share": 0.2}}}
    result = result_of({"0": "1", "1": "1"}, **told)
    assert pointing_shares(result, "dac") == [0.5, 0.5]
    assert pointing_shares(result | {"parts": [{"stage": "1"}]}, "dac") == []
    assert pointing_shares(result | {"parts": []}, "llm") == [0.2, 0.2]


def test_several_seeds_show_their_range():
    told = {"pointing": {"dac": {"share": 0.5}}, "attention_inside_box": {"dac": 0.25}}
    result = result_of({"0": "1"}, **told)
    assert pointing(result, PLAIN) == ["50.0 %", "", "25.0 %"]
    other = result_of({"1": "1"}, **told | {"pointing": {"dac": {"share": 0.2}}})
    result["seeds"] |= other["seeds"]
    assert pointing(result, PLAIN) == ["35.0 % (20.0 to 50.0)", "", "25.0 % (25.0 to 25.0)"]


def test_a_part_that_fails_names_its_log(study, done, tmp_path):
    class Broken(StudyRun):
        def train_base(self):
            return tmp_path / "nowhere"

    with pytest.raises(PartFailed, match="checkpoint.log"):
        Broken(study, study.forms["quick"], tmp_path / "work", tmp_path / "results").train(study.arms["two_stage"], 0)
    assert not list((tmp_path / "work").rglob("checkpoint"))
