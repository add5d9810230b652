"""The study, as small as it can be: run, interrupted, gone on with, summarised."""

import json
import subprocess

import pandas
import pytest
import yaml
from safetensors.torch import load_file

from experiments.chains.network import BASE
from experiments.study import ablations
from experiments.study.ablation_plots import draw_all
from experiments.study.ablation_tables import (
    as_frame,
    difference,
    mean_and_range,
    read_results,
    seeds_of,
    share_right,
    summarise,
)
from experiments.study.ablations import RECIPE, StudyRun
from experiments.study.arms import ARMS_FILE, PLAIN, read_study
from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.statistics import wilson_interval
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import main_train
from vreflection_training.recipe import parse


SMALL = "--dataloader_num_workers 0 --per_device_train_batch_size 4".split()
STUDY = read_study()
PARTS = {f"{name} {index}": part for name, arm in STUDY.arms.items() for index, part in enumerate(arm.parts)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    table = yaml.safe_load(ARMS_FILE.read_text())
    # Two steps a part: the first has a learning rate of zero, and an untrained BCM is no teacher.
    table["forms"] = {"quick": {"base_steps": 2, "part_steps": 2, "scenes": 4, "seeds": {"others": [0]}}}
    main = table["groups"]["main"]
    arms = {"base": main["arms"]["base"], "two_stage": {"parts": ["S1", "S2"], "interventions": True}}
    table["groups"] = {"main": main | {"arms": arms}}
    path = tmp_path_factory.mktemp("table") / "arms.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False))
    return read_study(path)


def train_here(command, stdout, stderr):
    """Trains in this process: importing torch in a new one would take longer."""
    assert command[1:3] == ["-m", "vreflection_training"]
    return subprocess.CompletedProcess(command, main_train([*command[3:], *SMALL]))


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    """The folder of a study that was interrupted after its first arm and called again."""
    folder = tmp_path_factory.mktemp("study")
    run = StudyRun(study, study.forms["quick"], folder / "work", folder / "results")

    def interrupted(command, stdout, stderr):
        if command[command.index("--stage") + 1] == "2":
            raise KeyboardInterrupt
        return train_here(command, stdout, stderr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "BATCH_SIZE", 4)
        patch.setattr(ablations.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
        kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
        assert len(kept) == 3 and run.missing() == [("two_stage", 0)]
        patch.setattr(ablations.subprocess, "run", train_here)
        run()
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}.items()
    return folder


@pytest.fixture
def make_run(study, done):
    return lambda output: StudyRun(study, study.forms["quick"], done / "work", output)


@pytest.mark.slow
def test_every_arm_has_its_file(study, done):
    results = read_results(study, done / "results")
    assert list(results) == ["base", "two_stage"]
    for name, result in results.items():
        ways = result["seeds"]["0"]["evaluations"]
        assert list(ways) == list(study.arms[name].evaluate)
        assert all(len(one["outcomes"]["usual"]) == 4 for one in ways.values())
        assert result["base"] == sha256(done / "work" / "base" / "checkpoint" / "model.safetensors")
    configs = [json.loads(path.read_text()) for path in sorted(done.rglob("checkpoint/config.json"))]
    assert [config["has_dac"] for config in configs] == [False, True, True]


@pytest.mark.slow
def test_called_again_it_trains_and_writes_nothing(done, make_run):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    make_run(done / "results")()
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"part_steps": 99}, {"base": "0" * 64}])
def test_results_of_another_definition_or_base_are_not_mixed_in(done, make_run, tmp_path, change):
    result = json.loads((done / "results" / "two_stage.json").read_text())
    (tmp_path / "two_stage.json").write_text(json.dumps(result | change))
    with pytest.raises(ValueError, match=f"two_stage.json: holds results with {next(iter(change))} = "):
        make_run(tmp_path)()


def test_arms_start_from_the_embedded_backbone_as_it_was_before_stage_path(tmp_path):
    ablations.save_start(tmp_path / "start")
    start, embedded, base = {}, {}, {}
    for weights, folder in ((start, tmp_path / "start"), (embedded, EMBEDDED), (base, BASE)):
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
    assert {f"model.language_model.{name}" for name in base} == {name for name in start if "language_model" in name}
    for name, tensor in start.items():
        if "visual" in name:
            assert tensor.equal(embedded[name]), name
        elif "language_model" in name:
            assert tensor.equal(base[name.removeprefix("model.language_model.")]), name
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    decoding = json.loads((tmp_path / "start" / "generation_config.json").read_text())
    assert (config["patch_positions"], decoding["latent_feedback"]) == ("none", "hidden")


def test_a_part_that_fails_names_its_log(study, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ablations.subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 2)
    )
    run = StudyRun(study, study.forms["quick"], tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match="ended with 2; see .*checkpoint.log"):
        run.train_base()


@pytest.mark.slow
def test_the_summary_shows_everything(study, done, tmp_path):
    results = read_results(study, done / "results")
    text = summarise(study, study.forms["quick"], results, [("two_stage", 1)], {"main": "Nothing."})
    group = study.groups[0]
    assert f"## {group.title}" in text and group.expectation in text and "Found: Nothing." in text
    assert "- two_stage, seed 1" in text and "| two_stage | another sample's latents |" in text
    draw_all(study, as_frame(results), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.png", "pointing.png"}


def test_no_results_are_no_summary(study, tmp_path):
    with pytest.raises(ValueError, match="no results yet"):
        read_results(study, tmp_path)


def test_seeds_answer_the_same_scenes_so_that_they_do_not_narrow_the_interval():
    one, three = ["1101" * 50], ["1101" * 50, "0100" * 50, "1111" * 50]
    alone, together = (share_right(pandas.Series(outcomes)) for outcomes in (one, three))
    assert alone["share"] == 0.75 and together["share"] == pytest.approx((0.75 + 0.25 + 1) / 3)
    assert (alone["low"], alone["high"]) == wilson_interval(150, 200)
    assert (together["low"], together["high"]) == pytest.approx(wilson_interval(200 * 2 / 3, 200))
    assert share_right(pandas.Series(["1-0-"]))["share"] == 0.5


def test_a_difference_is_paired_on_the_seeds_that_both_have():
    first = pandas.Series({"0": "0" * 100, "1": "1" * 100})
    second = pandas.Series({"1": "1" * 60 + "0" * 40, "2": "0" * 100})
    assert difference(first, second).startswith("-40.0 (") and "noise" not in difference(first, second)
    assert difference(first, first) == "+0.0 (+0.0 to +0.0), within noise"


def test_what_was_never_trained_points_nowhere_and_seeds_show_their_range():
    evaluation = {"outcomes": {"usual": "1"}, "pointing": {"dac": {"share": 0.5}, "llm": {"share": 0.2}}}
    other = evaluation | {"pointing": {"dac": {"share": 0.2}, "llm": {"share": 0.2}}}
    seeds = {seed: {"evaluations": {PLAIN: one}} for seed, one in (("0", evaluation), ("1", other))}
    stages = {"trained": "2", "untrained": "1"}
    frame = as_frame({name: {"seeds": seeds, "parts": [{"stage": stage}]} for name, stage in stages.items()})
    cells = {
        name: [mean_and_range(seeds_of(frame, name)[f"pointing.{source}.share"]) for source in ("dac", "llm")]
        for name in stages
    }
    assert cells == {
        "trained": ["35.0 % (20.0 to 50.0)", "20.0 % (20.0 to 20.0)"],
        "untrained": ["", "20.0 % (20.0 to 20.0)"],
    }


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_recipe(name, tmp_path):
    words = [word for key, value in PARTS[name].items() for word in (f"--{key}", str(value))]
    args = parse([str(RECIPE), *words, "--output_dir", str(tmp_path)])[2]
    assert {key: getattr(args, key) for key in PARTS[name]} == PARTS[name]


def test_arms_train_equally_long_and_share_only_parts_that_are_alike():
    arms = STUDY.arms
    assert {len(arm.parts) for arm in arms.values()} == {0, 2} and not arms["base"].parts
    two_stages = arms["two_stage"].part_names
    assert arms["stage1"].part_names[0] == arms["no_feature_term"].part_names[0] == two_stages[0] != two_stages[1]
    assert arms["no_feature_term"].part_names[1] != two_stages[1]
    assert two_stages[0] not in (arms["steps_4"].part_names[0], arms["alignment_joint"].part_names[0])
    assert arms["steps_8"].part_names == arms["stage1"].part_names


def test_what_is_evaluated_of_an_arm():
    two_stage = STUDY.arms["two_stage"]
    assert two_stage.evaluate[PLAIN] == {"interventions": ["zeroed", "noise", "shuffled", "other_picture", "filler"]}
    assert two_stage.evaluate["dac_feedback"] == {"interventions": [], "latent_feedback": "dac"}
    assert STUDY.arms["joint"].evaluate == {PLAIN: {"interventions": []}}


def test_the_main_arms_come_first_and_have_all_seeds():
    form = STUDY.forms["quick"]
    runs = [(arm.name, seed) for arm, seed in STUDY.runs(form)]
    names = ["base", "sft", "stage1", "two_stage"]
    # The base is the same for all seeds, and its answers are.
    assert runs[:10] == [(name, seed) for seed in range(3) for name in names if name != "base" or seed == 0]
    thrice = [arm.name for group in STUDY.groups for arm in group.arms if group.name in form.seeds and arm.parts]
    assert [name for name, seed in runs if seed == 2] == thrice
    assert len(runs) == len(set(runs)) == len(STUDY.arms) + 2 * len(thrice)


@pytest.mark.parametrize(
    "before, after, fragment",
    [("      joint:", "      stage1:", "two arms are called stage1"), ("[sft, stage1,", "[sft, stage9,", "stage9")],
)
def test_mistakes_in_the_table(before, after, fragment, tmp_path):
    text = ARMS_FILE.read_text()
    assert before in text
    (tmp_path / "arms.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=fragment):
        read_study(tmp_path / "arms.yaml")
