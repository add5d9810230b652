"""Rows of the chains: the tokens and labels of the package's own processor and collator, and the patches of their boxes."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.chains.arms import ARMS, Arm
from experiments.chains.network import Batch
from experiments.chains.rows import IGNORED, patches_of, training_scene
from hub_card.glyphsearch import Question
from vreflection_training import VReflectionDataCollator


CPU = torch.device("cpu")
FORMS = ("glyph", "slots glyph", "boundaries glyph", "names", "boxes")


def edges(question: Question, side: int = 6) -> str:
    """The first and last column and row of each shape's patches, a line for each: by pixels, 28 a patch."""
    lines = []
    for item in question.path:
        x0, y0, x1, y1 = item.pixel_box
        lines.append(f"{x0 // 28}{y0 // 28}{(x1 - 1) // 28}{(y1 - 1) // 28}\n")
    return "".join(lines)


def answer_parts(question: Question, form: str) -> list[dict]:
    """The answer as parts of a message."""
    texts = {
        "names": "\n".join(f"the {item.name}\n{item.glyph}" for item in question.path),
        "boxes": edges(question) + question.answer,
    }
    parts = [{"type": "text", "text": texts.get(form, question.answer)}]
    if form == "slots glyph":
        boxes = [list(item.box) for item in question.path]
        parts.insert(0, {"type": "reflection", "boxes": boxes, "image_index": 0})
    return parts


def asked(chains):
    """Each scene's number, its questions and their examples, side by side."""
    for scene, ((_, questions), examples) in enumerate(zip(chains.drawn, chains.examples)):
        for question, example in zip(questions, examples, strict=True):
            yield scene, question, example


@pytest.mark.parametrize("form", [form for form in FORMS if form != "boundaries glyph"])
def test_tokens_and_labels_are_the_packages(chains, form, starting):
    """But for the line break behind the turn, which nothing supervises."""
    collator = VReflectionDataCollator(chains.processor, starting.config)
    rows = chains.tokens.rows([[example] for *_, example in asked(chains)], Arm("", answer=form), CPU)
    for line, (scene, question, example) in enumerate(asked(chains)):
        batch = collator([chains.row(scene, question, answer_parts(question, form))])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        length = len(ids) - 1
        assert chains.tokens.tokenizer.decode(ids[length:]) == "\n" and labels[length] == IGNORED
        assert example.prompt + example.answers[form] == ids[:length].tolist()
        torch.testing.assert_close(rows.ids[line, :length], ids[:length])
        torch.testing.assert_close(rows.labels[line, :length], labels[:length])
        assert (rows.ids[line, length:] == chains.tokens.tokenizer.pad_token_id).all()
        assert (rows.labels[line, length:] == IGNORED).all()


def test_boundary_tokens_alone(chains, starting):
    start, _, end = starting.config.latent_token_ids
    for *_, example in asked(chains):
        assert example.answers["boundaries glyph"] == [start, end, *example.answers["glyph"]]


def test_prompts_and_positions_are_the_processors(chains, starting):
    for scene, question, example in asked(chains):
        inputs = chains.prompt(scene, question)
        assert example.prompt == inputs["input_ids"][0].tolist()
    positions, _ = starting.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert torch.equal(chains.tokens.positions(positions.shape[2]), positions[:, 0])


@pytest.mark.parametrize("form", FORMS)
def test_what_is_supervised(chains, form, starting):
    """Exactly the answers' tokens, without slots and the end of a reflection; in lines that rows share, too."""
    rows = chains.tokens.rows(chains.examples, Arm("", answer=form), CPU)
    _, slot, end = starting.config.latent_token_ids
    for line, group in enumerate(chains.examples):
        shared = len(chains.tokens.head)
        expected = [IGNORED] * shared
        ids = group[0].prompt[:shared]
        for example in group:
            question, answer = example.prompt[shared:], example.answers[form]
            ids = ids + question + answer
            expected += [IGNORED] * len(question) + [IGNORED if token in (slot, end) else token for token in answer]
        assert rows.ids[line, : len(ids)].tolist() == ids
        assert rows.labels[line].tolist() == expected + [IGNORED] * (rows.labels.shape[1] - len(ids))


@pytest.mark.parametrize("whole_path", [True, False])
def test_a_step_looks_at_its_own_box(chains, whole_path):
    """Shape k of the path in step k, the last one in all further steps; or the last one in all."""
    rows = chains.tokens.rows(chains.examples, replace(ARMS["path"], whole_path=whole_path), CPU)
    inside = Batch.pick(rows, chains.scenes[0.0], torch.arange(len(rows.ids))).inside
    for line, (_, questions) in enumerate(chains.drawn):
        steps = inside[line].view(len(questions), 8, 6, 6)
        for question, maps in zip(questions, steps):
            for step, found in enumerate(maps):
                shown = question.path[min(step, question.hops)] if whole_path else question.target
                x0, y0, x1, y1 = shown.pixel_box
                expected = torch.zeros(6, 6, dtype=torch.bool)
                expected[y0 // 28 : (y1 - 1) // 28 + 1, x0 // 28 : (x1 - 1) // 28 + 1] = True
                assert torch.equal(found, expected)


def test_half_of_the_rows_without_a_reflection(chains, starting):
    groups = chains.examples * 20
    rows = chains.tokens.rows(groups, ARMS["path"], CPU, 0.5, seed=1)
    assert 0.45 < rows.reflects.float().mean() < 0.55
    start, slot, _ = starting.config.latent_token_ids
    for line, answers in enumerate(rows.answer.tolist()):
        for row, column in enumerate(answers):
            reflects = bool(rows.reflects[line, row])
            assert (rows.ids[line, column] == start) == reflects
            assert rows.slot[line, row] == (column + 1 if reflects else 1)
    other = chains.tokens.rows(groups, ARMS["path"], CPU, 0.5, seed=2)
    assert not torch.equal(rows.reflects, other.reflects)


def test_features_are_those_of_the_pictures(chains, starting):
    pictures = [scene.image for scene, _ in chains.drawn]
    inputs = chains.processor.image_processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        features = starting.model.image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(chains.scenes[0.0].features, torch.stack(features), rtol=1e-4, atol=1e-5)


def test_jitter_moves_each_side_by_its_share_of_the_box_at_most():
    rng = random.Random(0)
    scenes = [training_scene(index)[0] for index in range(8)]
    boxes = [[item.box for item in scene.objects] for scene in scenes]
    moved = 0
    for jitter in (0.1, 0.3):
        for one in boxes:
            found = patches_of(one, (6, 6), jitter, rng)
            least, most = grown(one, -jitter), grown(one, jitter)
            assert not (least & ~found).any() and not (found & ~most).any()
            moved += (found != grown(one, 0.0)).any(1).sum()
    assert moved > 10
    assert np.array_equal(patches_of(boxes[0], (6, 6), 0.0, rng), grown(boxes[0], 0.0))


def grown(boxes: list[tuple], by: float) -> np.ndarray:
    """The patches, (9, 36), that boxes overlap which are larger on each side by a share of their own sides."""
    found = np.zeros((9, 6, 6), dtype=bool)
    for place, (x0, y0, x1, y1) in enumerate(boxes):
        dx, dy = by * (x1 - x0), by * (y1 - y0)
        for row in range(6):
            for column in range(6):
                across = x0 - dx < (column + 1) / 6 - 1e-4 and x1 + dx > column / 6 + 1e-4
                down = y0 - dy < (row + 1) / 6 - 1e-4 and y1 + dy > row / 6 + 1e-4
                found[place, row, column] = across and down
    return found.reshape(9, 36)
