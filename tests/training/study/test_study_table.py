"""The study's table: every arm can be run as it stands there."""

import pytest

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS
from vreflection_training.recipe import parse
from vreflection_training.study.table import ARMS, PLAIN, read_study


STUDY = read_study()
PARTS = {
    f"{arm.name} {index}": (arm, part)
    for group in STUDY.groups
    for arm in group.arms
    for index, part in enumerate(arm.parts)
}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_recipe(name, tmp_path):
    arm, part = PARTS[name]
    words = [word for key, value in part.items() for word in (f"--{key}", str(value))]
    args = parse(["study_part", *words, "--output_dir", str(tmp_path)])[2]
    for key, value in part.items():
        assert getattr(args, key) == value


def test_every_arm_trains_as_long_as_the_others():
    assert {len(arm.parts) for arm in STUDY.arms.values()} == {0, 2}
    assert [arm.name for arm in STUDY.arms.values() if not arm.parts] == ["base"]


def test_arms_that_begin_alike_share_their_first_part_and_no_others_do():
    arms = STUDY.arms
    two_stages = arms["two_stage"].part_names
    assert arms["stage1"].part_names[0] == two_stages[0] != two_stages[1]
    assert arms["no_feature_term"].part_names[0] == two_stages[0]
    assert arms["no_feature_term"].part_names[1] != two_stages[1]
    assert arms["steps_4"].part_names[0] != two_stages[0]
    assert arms["alignment_joint"].part_names[0] != two_stages[0]
    assert arms["steps_8"].part_names == arms["stage1"].part_names


def test_what_is_asked_of_an_arm():
    two_stage = STUDY.arms["two_stage"]
    assert two_stage.evaluate[PLAIN] == {"interventions": list(INTERVENTIONS)}
    assert two_stage.evaluate["dac_feedback"] == {"interventions": [], "latent_feedback": "dac"}
    assert STUDY.arms["joint"].evaluate == {PLAIN: {"interventions": []}}


def test_the_main_arms_come_first_and_have_all_seeds():
    units = [(arm.name, seed) for arm, seed in STUDY.units(STUDY.forms["quick"])]
    names = ["base", "sft", "stage1", "two_stage"]
    # The base is the same for all seeds, and its answers are.
    assert units[:10] == [(name, seed) for seed in range(3) for name in names if name != "base" or seed == 0]
    # Named groups have the seeds that the form gives them, the others one.
    names = [name for name, seed in units if seed == 2]
    assert names == ["sft", "stage1", "two_stage"] + [
        arm.name
        for group in STUDY.groups
        if group.name in {"fill", "modules", "readings", "map"}
        for arm in group.arms
    ]
    assert len(units) == len(set(units)) == len(STUDY.arms) + 2 * len(names)


@pytest.mark.parametrize(
    "before, after, fragment",
    [("      joint:", "      stage1:", "two arms are called stage1"), ("[sft, stage1,", "[sft, stage9,", "stage9")],
)
def test_mistakes_in_the_table(before, after, fragment, tmp_path):
    text = ARMS.read_text()
    assert before in text
    (tmp_path / "arms.yaml").write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=fragment):
        read_study(tmp_path / "arms.yaml")
