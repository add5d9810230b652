"""GlyphSearch as a measurement: what is asked, what is counted, what is written."""

import json

import pytest
import torch

from vreflection_hub_card.attention import Reflection, recorded_steps
from vreflection_hub_card.checkpoints import load_checkpoint
from vreflection_hub_card.cli import main
from vreflection_hub_card.evaluation.glyphsearch import (
    Sample,
    draw_question,
    evaluate_glyphsearch,
    points_at,
    summarise,
)
from vreflection_hub_card.evaluation.provenance import sha256
from vreflection_hub_card.evaluation.shuffling import LatentShufflingModel
from vreflection_hub_card.evaluation.statistics import proportion, wilson_interval
from vreflection_hub_card.glyphsearch import get_difficulty, scene_row


class Reflecting(LatentShufflingModel):
    """The stand-in wouldn't open a reflection by itself."""

    def generate(self, *args, latent_steps=None, **kwargs):
        reflect = None if latent_steps == 0 else True
        return super().generate(*args, latent_steps=latent_steps, reflect=reflect, **kwargs)


def prepare(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


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


@pytest.mark.parametrize("difficulty", ["easy", "default", "hard"])
def test_questions_are_those_of_the_data_set(difficulty):
    for index in range(5):
        scene, question = draw_question("test", index, difficulty)
        row = scene_row(index, "test", get_difficulty(difficulty))
        assert row["messages"][0]["content"][1]["text"] == question.text
        reflection, answer = row["messages"][1]["content"]
        assert answer["text"] == question.answer and tuple(reflection["box"]) == question.target.box
        assert row["images"][0].tobytes() == scene.image.tobytes()


def test_pointing_asks_for_the_centre_of_the_largest_patch_of_the_mean():
    maps = torch.zeros(2, 3, 4)
    maps[0, 0, 0], maps[:, 2, 1] = 0.5, 0.3  # the mean is largest at row 2, column 1: centre (0.375, 0.833)
    reflection = Reflection(2, {"dac": [maps]})
    assert points_at(reflection, (0.3, 0.8, 0.4, 0.9)) == {"dac": True}
    assert points_at(reflection, (0.25, 0.67, 0.37, 1.0)) == {"dac": False}
    assert points_at(reflection, (0.0, 0.0, 0.25, 0.33)) == {"dac": False}


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_shuffling_feeds_each_row_the_latents_of_the_one_before(tiny, conversations, latent_feedback):
    model, processor = tiny
    inputs = prepare(processor, conversations)
    with recorded_steps(model) as steps:
        _, exchanged = model.generate_shuffled(
            **inputs, reflect=True, latent_feedback=latent_feedback, max_new_tokens=12
        )
    assert exchanged.tolist() == [True] * 3
    is_image = inputs["input_ids"] == model.config.image_token_id
    for before, slot in zip(steps[1:9], steps[2:10]):
        latents = before.state
        if latent_feedback == "dac":
            features = [embeds[mask][None] for embeds, mask in zip(steps[0].embeds, is_image)]
            latents = [
                model.model.dac(state[None], feature, torch.ones(feature.shape[:2], dtype=torch.bool))[0]
                for state, feature in zip(before.state, features)
            ]
            latents = torch.cat(latents).detach()
        torch.testing.assert_close(slot.embeds, latents.roll(1, 0))
        assert not torch.allclose(slot.embeds, latents)


def test_only_rows_in_a_reflection_exchange_latents(tiny, conversations):
    model, processor = tiny
    inputs = prepare(processor, conversations)

    def open_in(*rows):
        def processor(input_ids, scores):
            if input_ids.shape[1] == inputs["input_ids"].shape[1]:
                scores[list(rows)] = float("-inf")
                scores[list(rows), model.config.latent_start_token_id] = 0
            return scores

        return {"logits_processor": [processor], "max_new_tokens": 12}

    with recorded_steps(model) as steps:
        _, exchanged = model.generate_shuffled(**inputs, **open_in(0, 2))
    assert exchanged.tolist() == [True, False, True]
    assert torch.equal(steps[2].embeds[[0, 2]], steps[1].state[[2, 0]])
    assert not torch.equal(steps[2].embeds[1], steps[1].state[1])

    alone, exchanged = model.generate_shuffled(**inputs, **open_in(1))
    assert exchanged.tolist() == [False] * 3
    assert torch.equal(alone, model.generate(**inputs, **open_in(1)))


def test_shuffling_ends_with_its_call(tiny, conversations):
    model, processor = tiny
    inputs = prepare(processor, conversations)
    before = model.generate(**inputs, reflect=True, max_new_tokens=14)
    model.generate_shuffled(**inputs, reflect=True, max_new_tokens=14)
    with pytest.raises(ValueError):
        model.generate_shuffled(**inputs, reflect=True, latent_steps=0)
    assert torch.equal(before, model.generate(**inputs, reflect=True, max_new_tokens=14))


def test_results_count_what_happened():
    questions = [draw_question("test", index)[1] for index in range(4)]
    samples = [
        Sample(questions[0], True, True, {"dac": True, "llm": False}, False, True),
        Sample(questions[1], True, True, {"dac": False, "llm": False}, True, False),
        Sample(questions[2], True, False, {}, True, None),
        Sample(questions[3], False, True, {"dac": True, "llm": True}, False, None),
    ]
    result = summarise(samples)
    counted = {
        "accuracy": (3, 4),
        "reflection_rate": (3, 4),
        "without_latents": (2, 4),
        "shuffled_latents": (1, 2),
        "dac": (2, 3),
        "llm": (1, 3),
    }
    found = {
        "accuracy": result["accuracy"]["overall"],
        "reflection_rate": result["reflection_rate"],
        "without_latents": result["without_latents"]["accuracy"]["overall"],
        "shuffled_latents": result["shuffled_latents"]["accuracy"]["overall"],
        **result["pointing"],
    }
    assert {name: (one["successes"], one["count"]) for name, one in found.items()} == counted
    kinds = [result["accuracy"][kind]["count"] for kind in ("attribute", "relation")]
    assert kinds == [[question.kind for question in questions].count(kind) for kind in ("attribute", "relation")]
    assert result["shuffled_latents"]["unshuffled_accuracy_of_the_same"]["overall"]["successes"] == 2
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (question.target.box for question in questions)]
    assert result["mean_box_area"] == pytest.approx(sum(areas) / 4, abs=1e-4)


def test_a_model_that_reflects_is_measured_in_all_ways(tiny_folder):
    model, processor = load_checkpoint(tiny_folder, "cpu", Reflecting)
    result = evaluate_glyphsearch(model, processor, limit=5, split="validation", batch_size=4, latent_feedback="dac")
    assert result["reflection_rate"]["successes"] == 5
    # The last batch holds one scene, which has nobody to exchange latents with.
    assert result["shuffled_latents"]["accuracy"]["overall"]["count"] == 4
    assert {source: one["count"] for source, one in result["pointing"].items()} == {"dac": 5, "llm": 5}
    assert result["decoding"]["latent_feedback"] == "dac"
    assert result["data"]["first_seed"] == 2**40


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
        "data", "decoding", "accuracy", "reflection_rate", "without_latents", "shuffled_latents", "pointing", "mean_box_area"
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
