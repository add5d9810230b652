"""GlyphSearch: what a scene shows, what its questions ask, and what a dataset row holds, each checked from outside."""

import pickle
from collections import Counter
from itertools import islice, pairwise

import pytest

from vreflection_hub_card.glyphsearch import (
    BACKGROUND,
    CLUTTER,
    COLOURS,
    DIFFICULTIES,
    GLYPHS,
    SHAPES,
    SPLIT_SIZE,
    SPLITS,
    Difficulty,
    glyphsearch_curriculum,
    glyphsearch_dataset,
    make_scene,
    questions,
    scene_seed,
)


@pytest.fixture(params=DIFFICULTIES)
def scenes(request):
    return [make_scene(scene_seed("test", index), request.param) for index in range(40)]


def test_a_seed_gives_the_same_scene_and_another_seed_another():
    first, again, other = make_scene(7), make_scene(7), make_scene(8)
    assert first.objects == again.objects
    assert first.image.tobytes() == again.image.tobytes()
    assert first.objects != other.objects


def test_splits_are_disjoint():
    ranges = [(scene_seed(split, 0), scene_seed(split, SPLIT_SIZE - 1)) for split in SPLITS]
    assert all(last - first == SPLIT_SIZE - 1 for first, last in ranges)
    assert all(last < next_first for (_, last), (next_first, _) in pairwise(ranges))
    for index in (-1, SPLIT_SIZE):
        with pytest.raises(ValueError, match="index"):
            scene_seed("train", index)
    with pytest.raises(ValueError, match="dev"):
        scene_seed("dev", 0)


def test_scenes_hold_what_their_difficulty_says(scenes):
    difficulty = scenes[0].difficulty
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == set(range(difficulty.min_objects, difficulty.max_objects + 1))
    for scene in scenes:
        assert scene.image.size == (difficulty.image_size, difficulty.image_size)
        assert len({item.name for item in scene.objects}) == len(scene.objects)
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            assert item.colour in COLOURS and item.shape in SHAPES and item.glyph in GLYPHS


def test_boxes_are_tight(scenes):
    # Objects keep to their cells, so an object is every pixel of its cell that is neither background nor clutter.
    for scene in scenes:
        size, cell = scene.difficulty.image_size, scene.difficulty.cell
        pixels = scene.image.load()
        for item in scene.objects:
            row, column = item.cell
            drawn = [
                (x, y)
                for y in range(row * cell, row * cell + cell)
                for x in range(column * cell, column * cell + cell)
                if pixels[x, y] not in (BACKGROUND, CLUTTER)
            ]
            xs, ys = zip(*drawn)
            tight = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            assert item.pixel_box == tight
            assert item.box == pytest.approx([corner / size for corner in tight])
            assert any(pixels[x, y] == COLOURS[item.colour] for x, y in drawn)


def test_nothing_is_drawn_outside_the_boxes():
    scene = make_scene(3)
    picture = scene.image.copy()
    for item in scene.objects:
        picture.paste(BACKGROUND, item.pixel_box)
    assert picture.getcolors() == [(scene.image.width * scene.image.height, BACKGROUND)]


def _objects_beside(scene, anchor, side):
    """Every object on that side whose centre is level with the anchor, by boxes alone, the nearest first."""

    def centre(item):
        x0, y0, x1, y1 = item.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[side]
    half_cell = scene.difficulty.cell / scene.difficulty.image_size / 2
    beside = []
    for item in scene.objects:
        distance = sign * (centre(item)[axis] - centre(anchor)[axis])
        if item is not anchor and distance > 0 and abs(centre(item)[1 - axis] - centre(anchor)[1 - axis]) < half_cell:
            beside.append((distance, item))
    return [item for _, item in sorted(beside, key=lambda pair: pair[0])]


def test_questions_have_one_right_answer(scenes):
    for scene in scenes:
        asked = questions(scene)
        assert len({question.text for question in asked}) == len(asked)
        assert [question.target for question in asked if question.kind == "attribute"] == list(scene.objects)
        assert any(question.kind == "relation" for question in asked)
        for question in asked:
            assert question.answer == question.target.glyph
            named = [item for item in scene.objects if question.text.endswith(f" the {item.name}?")]
            assert len(named) == 1
            if question.kind == "attribute":
                assert named == [question.target]
            else:
                side = next(side for side in ("left of", "right of", "above", "below") if f" {side} " in question.text)
                assert _objects_beside(scene, named[0], side) == [question.target]


def test_answers_are_balanced():
    answers = Counter(question.answer for index in range(400) for question in questions(make_scene(index)))
    total = sum(answers.values())
    assert set(answers) == set(GLYPHS)
    assert all(0.08 < count / total < 0.12 for count in answers.values())


def test_relation_share_is_kept():
    texts = [row["messages"][0]["content"][1]["text"] for row in glyphsearch_dataset("train", 400, "hard")]
    assert 0.44 < sum("on the shape" in text for text in texts) / len(texts) < 0.56
    texts = [row["messages"][0]["content"][1]["text"] for row in glyphsearch_dataset("train", 50, "easy")]
    assert not any("on the shape" in text for text in texts)


def test_dataset_rows_are_messages_with_boxes():
    dataset = glyphsearch_dataset("validation", 20)
    assert len(dataset) == 20
    for index, row in enumerate(dataset):
        scene = make_scene(scene_seed("validation", index))
        assert set(row) == {"id", "images", "messages"}
        assert row["id"] == f"glyphsearch-validation-{index}"
        assert [image.tobytes() for image in row["images"]] == [scene.image.tobytes()]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"][0] == {"type": "image"}
        question = next(item for item in questions(scene) if item.text == user["content"][1]["text"])
        reflection, text = assistant["content"]
        assert reflection == {"type": "reflection", "box": list(question.target.box), "image_index": 0}
        assert text == {"type": "text", "text": question.answer}
    assert len({row["id"] for row in glyphsearch_dataset("train", 5, start=5)} & {row["id"] for row in dataset}) == 0


def test_a_conversation_shows_its_picture_once_and_repeats_no_question():
    for row in glyphsearch_dataset("train", 10, reflection=False, questions_per_scene=8):
        parts = [part for message in row["messages"] for part in message["content"]]
        texts = [part["text"] for message in row["messages"][::2] for part in message["content"][-1:]]
        assert len(row["images"]) == sum(part["type"] == "image" for part in parts) == 1
        assert not any(part["type"] == "reflection" for part in parts)
        assert 6 <= len(texts) == len(set(texts)) <= 8


def test_curriculum_goes_from_crops_to_lists_to_questions():
    rows = list(glyphsearch_curriculum(crops=3, lists=2, scenes=2, questions_per_scene=5))
    scenes = [make_scene(scene_seed("train", index)) for index in range(7)]
    names = [[f"the {item.name}\n{item.glyph}" for item in scene.objects] for scene in scenes]
    answers = [[message["content"][0]["text"] for message in row["messages"][1::2]] for row in rows]
    assert answers[:3] == names[:3]
    assert answers[3:5] == [["\n".join(name)] for name in names[3:5]]
    assert [len(turns) for turns in answers[5:]] == [5, 5]
    for row, name in zip(rows[:3], names):
        assert len(row["images"]) == len(name)
        assert {image.size for image in row["images"]} == {(56, 56)}
    assert all([image.size for image in row["images"]] == [(168, 168)] for row in rows[3:])


def test_dataset_draws_lazily_and_in_workers():
    DataLoader = pytest.importorskip("torch.utils.data").DataLoader
    dataset = glyphsearch_dataset("train", 1_000_000)  # minutes, if it drew them now
    assert pickle.loads(pickle.dumps(dataset))[999_999]["id"] == "glyphsearch-train-999999"
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=list)
    ids = [row["id"] for batch in islice(loader, 3) for row in batch]
    assert ids == [f"glyphsearch-train-{index}" for index in range(12)]


def test_unknown_difficulty_is_named():
    with pytest.raises(ValueError, match="'brutal'"):
        make_scene(0, "brutal")
    assert make_scene(0, Difficulty(grid=2, max_objects=4)).image.size == (112, 112)
