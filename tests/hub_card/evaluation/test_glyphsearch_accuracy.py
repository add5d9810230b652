"""GlyphSearch as a measurement: what is asked, what is counted, what is written."""

import json
from collections import Counter

import pytest
import torch

from vreflection_hub_card.evaluation.glyphsearch_accuracy import (
    Sample,
    accuracy_by_kind,
    compare_with_box,
    evaluate_glyphsearch,
    look_by_step,
    stack_latents,
    summarise_glyphsearch,
)
from vreflection_hub_card.evaluation.interventions import EXCHANGED, INTERVENTIONS
from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.statistics import proportion, wilson_interval
from vreflection_hub_card.glyphsearch import (
    chain_questions,
    draw_question,
    get_difficulty,
    make_scene,
    questions,
    scene_row,
)
from vreflection_hub_card.inference.attention_maps import Reflection
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_training.cli import main


@pytest.mark.parametrize("successes, count", [(0, 10), (10, 10), (3, 7), (486, 500)])
def test_wilson_interval_solves_its_equation(successes, count):
    """Its ends are the p for which the score |p̂ - p| is z standard errors, at that p."""
    share = successes / count
    for p in wilson_interval(successes, count, z=1.96):
        assert (share - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / count, abs=1e-12)
        assert 0 <= p <= 1


def test_wilson_interval_of_a_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_nothing_counted_has_no_interval():
    assert proportion([]) == {"successes": 0, "count": 0}


@pytest.mark.parametrize("difficulty", ["easy", "default", "hard", "chains"])
def test_questions_are_those_of_the_data_set(difficulty):
    for index in range(5):
        scene, question = draw_question("test", index, difficulty)
        row = scene_row(index, "test", get_difficulty(difficulty))
        assert row["messages"][0]["content"][1]["text"] == question.text
        reflection, answer = row["messages"][1]["content"]
        assert answer["text"] == question.answer
        assert reflection.get("boxes", [reflection.get("box")]) == [list(item.box) for item in question.path]
        assert row["images"][0].tobytes() == scene.image.tobytes()


def test_pointing_asks_for_the_centre_of_the_largest_patch_of_the_mean():
    maps = torch.zeros(2, 3, 4)
    maps[0, 0, 0], maps[:, 2, 1] = 0.5, 0.3  # the mean is largest at row 2, column 1: centre (0.375, 0.833)
    reflection = Reflection(2, {"dac": [maps]})
    assert compare_with_box(reflection, (0.3, 0.8, 0.4, 0.9))["dac"][0]
    assert not compare_with_box(reflection, (0.25, 0.67, 0.37, 1.0))["dac"][0]
    assert not compare_with_box(reflection, (0.0, 0.0, 0.25, 0.33))["dac"][0]


def test_the_share_inside_the_box_is_that_of_the_mean_map():
    maps = torch.zeros(2, 2, 2)
    maps[0, 0, 0], maps[1, 0, 0], maps[:, 1, 1] = 0.6, 0.2, 0.4
    reflection = Reflection(2, {"dac": [maps]})
    assert compare_with_box(reflection, (0.0, 0.0, 0.5, 0.5)) == {"dac": (True, pytest.approx(0.4 / 0.8))}
    assert compare_with_box(reflection, (0.26, 0.0, 0.5, 0.5)) == {"dac": (False, 0)}


def test_a_step_is_compared_with_its_own_box_and_the_last_box_is_repeated():
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    maps = torch.zeros(4, 2, 2)
    for step, column in enumerate((0, 1, 0, 1)):
        maps[step, step % 2, column] = 1
    reflection = Reflection(4, {"dac": [maps]})
    assert look_by_step(reflection, [left, right]) == {"dac": [True, True, False, True]}
    assert look_by_step(reflection, [right, left]) == {"dac": [False, False, True, False]}
    assert look_by_step(reflection, [left]) == {"dac": [True, False, True, False]}
    assert look_by_step(reflection, [right, right, left]) == {"dac": [False, True, True, False]}


def test_a_reflection_that_ended_early_repeats_its_last_latent():
    latents = {0: torch.tensor([[1.0], [2.0], [3.0]]), 4: torch.tensor([[4.0], [5.0]])}
    assert stack_latents(latents, 3)[..., 0].tolist() == [[1, 2, 3], [4, 5, 5]]


def test_looks_are_counted_by_step_and_the_last_one_of_each_answer():
    scene = make_scene(0, "chains")
    asked = chain_questions(scene, "kinship", 1)[0]
    steps = [[True, True, False], [True, False], [False, True, True]]
    samples = [
        Sample(asked, {"usual": "A", "without_latents": "A"}, {"dac": (True, 1.0)}, {"dac": step}) for step in steps
    ]
    samples.append(Sample(asked, {"usual": "A", "without_latents": "A"}, {}, {}))
    found = summarise_glyphsearch(samples)["pointing_by_step"]["dac"]
    assert {step: (one["successes"], one["count"]) for step, one in found.items()} == {
        "1": (2, 3), "2": (2, 3), "3": (1, 2), "last": (1, 3)
    }  # fmt: skip


def test_accuracy_is_that_of_each_kind_and_of_chains_by_hops():
    scene = make_scene(0, "chains")
    chains = [(kind, hops) for kind, longest in scene.difficulty.chains.items() for hops in range(longest + 1)]
    asked = [chain_questions(scene, *chain)[0] for chain in reversed(chains)] + questions(scene)[::-1]
    # Right: the questions of two hops, and relations.
    samples = [
        Sample(
            question, {"usual": question.answer if question.hops == 2 or question.kind == "relation" else ""}, {}, {}
        )
        for question in asked
    ]
    found = accuracy_by_kind(samples, "usual")
    names = [f"{kind} {hops}" for kind, hops in chains]
    assert list(found) == ["overall", "attribute", "relation", *names]
    assert [found[name]["share"] for name in names] == [0, 0, 1, 0, 0, 0, 1]
    assert found["attribute"]["count"] == len(scene.objects) and found["attribute"]["successes"] == 0
    assert found["relation"]["share"] == 1
    assert found["overall"]["count"] == len(asked) == sum(one["count"] for one in found.values()) / 2


def test_results_count_what_happened():
    drawn = [draw_question("test", index)[1] for index in range(4)]
    names = ("usual", "without_latents", "shuffled", "zeroed")
    # For each question the outcomes in these four ways; a dot: not asked.
    outcomes = ["1001", "11.0", "11..", "00.0"]
    looks = [
        {"dac": (True, 0.5), "llm": (False, 0.1)},
        {"dac": (False, 0.1), "llm": (False, 0.2)},
        {},
        {"dac": (True, 0.9), "llm": (True, 0.3)},
    ]
    samples = [
        Sample(
            question,
            {
                name: question.answer if outcome == "1" else f"wrong {number % 2}"
                for number, (name, outcome) in enumerate(zip(names, row))
                if outcome != "."
            },
            looked,
            {source: [look[0]] for source, look in looked.items()},
        )
        for question, row, looked in zip(drawn, outcomes, looks)
    ]
    result = summarise_glyphsearch(samples)
    counted = {
        "accuracy": (3, 4),
        "reflection_rate": (3, 4),
        "without_latents": (2, 4),
        "shuffled": (0, 1),
        "zeroed": (1, 3),
        "dac": (2, 3),
        "llm": (1, 3),
    }
    found = {
        "accuracy": result["accuracy"]["overall"],
        "reflection_rate": result["reflection_rate"],
        "without_latents": result["without_latents"]["accuracy"]["overall"],
        **{name: one["accuracy"]["overall"] for name, one in result["interventions"].items()},
        **result["pointing"],
    }
    assert {name: (one["successes"], one["count"]) for name, one in found.items()} == counted
    assert {kind: one["count"] for kind, one in result["accuracy"].items()} == {"overall": 4, "attribute": 4}
    zeroed = result["interventions"]["zeroed"]
    assert zeroed["usual_accuracy_of_the_same"]["overall"]["successes"] == 2
    # "wrong 0" became "wrong 1" in the last one: wrong before and after, and changed.
    assert (zeroed["changed"]["successes"], zeroed["changed"]["count"]) == (2, 3)
    assert result["attention_inside_box"] == {"dac": 0.5, "llm": 0.2}
    assert result["outcomes"] == {
        "usual": "1110", "without_latents": "0110", "shuffled": "0---", "zeroed": "10-0"
    }  # fmt: skip
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (question.target.box for question in drawn)]
    assert result["mean_box_area"] == pytest.approx(sum(areas) / 4, abs=1e-4)


def test_a_model_that_reflects_is_measured_in_all_ways(tiny_folder):
    model, processor = load_checkpoint(tiny_folder, "cpu")
    result = evaluate_glyphsearch(
        model, processor, limit=5, split="validation", batch_size=4, latent_feedback="dac", reflect=True
    )
    assert result["reflection_rate"]["successes"] == 5
    counts = {name: one["accuracy"]["overall"]["count"] for name, one in result["interventions"].items()}
    # The last batch holds one scene, which has nobody to exchange latents with.
    assert counts == {name: 4 if name in EXCHANGED else 5 for name in INTERVENTIONS}
    assert {source: one["count"] for source, one in result["pointing"].items()} == {"dac": 5, "llm": 5}
    assert set(result["attention_inside_box"]) == {"dac", "llm"}
    for steps in result["pointing_by_step"].values():
        assert list(steps) == [*map(str, range(1, 9)), "last"]
        assert steps["8"] == steps["last"] and steps["1"]["count"] == 5
    assert result["decoding"]["latent_feedback"] == "dac" and result["decoding"]["reflect"]
    assert result["data"]["first_seed"] == 2**40


@pytest.mark.parametrize("difficulty", ["chains", "longer_chains"])
def test_chains_are_measured_by_hops(tiny, difficulty):
    result = evaluate_glyphsearch(*tiny, limit=6, difficulty=difficulty, reflect=True)
    asked = [draw_question("test", index, difficulty)[1] for index in range(6)]
    counts = {name: one["count"] for name, one in result["accuracy"].items() if name != "overall"}
    assert counts == Counter(f"{question.kind} {question.hops}" for question in asked)
    assert set(result["interventions"]) == set(INTERVENTIONS)
    assert result["interventions"]["reversed"]["accuracy"].keys() == result["accuracy"].keys()


def test_interventions_are_made_where_the_model_reflects_and_only_if_asked_for(tiny):
    result = evaluate_glyphsearch(*tiny, limit=3)
    assert result["reflection_rate"]["successes"] == 0 and result["interventions"] == {}
    result = evaluate_glyphsearch(*tiny, limit=3, reflect=True, interventions=["noise"], latent_steps=2)
    assert list(result["interventions"]) == ["noise"] and result["decoding"]["latent_steps"] == 2


def test_the_command_writes_one_file(tiny_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(tiny_folder), "--tasks", "glyphsearch", "--limit", "4"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["glyphsearch.json"]
    text = (tmp_path / "glyphsearch.json").read_text()
    report = json.loads(text)
    assert list(report) == ["command", "date", "seconds", "model", "versions", "machine", "tasks"]
    assert str(tiny_folder.parent) not in text
    assert report["model"]["name"] == tiny_folder.name
    assert report["model"]["sha256"] == {"model.safetensors": sha256(tiny_folder / "model.safetensors")}
    assert report["command"].startswith(f"vreflection evaluate {tiny_folder.name} --tasks glyphsearch --limit 4")
    assert set(report["versions"]) == {"python", "vreflection", "torch", "transformers"}
    result = report["tasks"]["glyphsearch"]
    assert set(result) == {
        "data", "decoding", "accuracy", "reflection_rate", "without_latents", "interventions", "pointing",
        "pointing_by_step", "attention_inside_box", "mean_box_area", "outcomes"
    }  # fmt: skip
    assert result["data"]["count"] == result["accuracy"]["overall"]["count"] == 4
    assert "of 4 right" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["MODEL", "--output", "nowhere/result.json"], "can't be written"),
        (["MODEL", "--output", "full.json"], "No space left"),
        (["nothing.here/at/all"], "no such folder"),
    ],
)
def test_mistakes(tiny_folder, capsys, tmp_path, monkeypatch, arguments, fragment):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.json").symlink_to("/dev/full")
    arguments = [str(tiny_folder) if argument == "MODEL" else argument for argument in arguments]
    assert main(["evaluate", *arguments, "--limit", "1"]) == 2
    assert fragment in capsys.readouterr().err


def test_dac_feedback_without_dac(no_dac_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(no_dac_folder), "--limit", "1", "--latent-feedback", "dac"]) == 2
    assert "DAC" in capsys.readouterr().err
    assert main(["evaluate", str(no_dac_folder), "--limit", "2"]) == 0


def test_an_answer_may_reflect_as_often_as_the_checkpoint_says(tiny_folder):
    """Each reflection has room, so that both decodings are of the same length."""
    model, processor = load_checkpoint(tiny_folder, "cpu")
    stored = {"reflect": "uncertain", "reflect_threshold": 0.0, "max_reflections": 2}
    for name, value in stored.items():
        setattr(model.generation_config, name, value)
    limits, generate = [], model.generate

    def counted(*args, **kwargs):
        limits.append(kwargs["max_new_tokens"])
        return generate(*args, **kwargs)

    model.generate = counted
    evaluate_glyphsearch(model, processor, limit=1, interventions=())
    assert set(limits) == {2 * (8 + 2) + 8}
