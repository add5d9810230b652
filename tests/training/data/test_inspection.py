import copy
from functools import partial

import pytest
from datasets import Dataset, Image, List, load_from_disk
from PIL import Image as Picture
from transformers import Qwen2VLImageProcessor

from vreflection_hub_card.glyphsearch import glyphsearch_dataset
from vreflection_hub_card.rows import BadRow
from vreflection_training import VReflectionDataCollator
from vreflection_training.data.inspection import inspect_row, inspect_rows
from vreflection_training.data.sources import load_rows


measure_row = partial(inspect_row, stop=True)


def picture(width=84, height=56):
    return Picture.new("RGB", (width, height), "red")


def ask(*parts):
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def answer(*parts):
    return {**ask(*parts), "role": "assistant"}


def reflection(box=(0.1, 0.2, 0.5, 0.6), **keys):
    return {"type": "reflection", "box": list(box), **keys}


def path(*boxes, **keys):
    return {"type": "reflection", "boxes": [list(box) for box in boxes], **keys}


IMAGE = {"type": "image"}
BOXES = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0.5, 0, 1, 0.5)]
GOOD = {
    "one": {"images": [picture()], "messages": [ask(IMAGE, "What?"), answer(reflection(image_index=0), "A")]},
    "several images": {
        "images": [picture(500, 300), picture(31, 29), picture(28, 2000)],
        "messages": [ask(IMAGE, IMAGE, "What?", IMAGE), answer(reflection(image_index=2), "A", reflection(), "B")],
    },
    "several reflections": {
        "images": [picture(300, 301)],
        "messages": [ask(IMAGE, "What?"), answer(reflection(), reflection(), "A is", reflection(), " B.")],
    },
    "paths": {
        "images": [picture(), picture(60, 60)],
        "messages": [
            ask(IMAGE, IMAGE, "What?"),
            answer(path(*BOXES, image_index=[1, 0, 0]), "A", path(*BOXES[:1]), reflection(), path(*BOXES * 2)),
        ],
    },
    "text": {"messages": [ask("Hello"), answer("Which glyph")]},
    "strings": {"images": [picture()], "messages": [{"role": "user", "content": "What <|lvr|>?"}, {"role": "assistant", "content": "K"}]},
    "inline": {"messages": [ask({"type": "image", "image": picture(99, 400)}, "What?"), answer("K")]},
    "single image": {"image": picture(64, 64), "messages": [ask(IMAGE, "What?"), answer("K")]},
    "no text": {"images": [picture()], "messages": [ask(IMAGE), answer(reflection())]},
    "turns": {
        "images": [picture(), picture(200, 90)],
        "messages": [
            {"role": "system", "content": "Short."},
            ask(IMAGE, "What?"),
            answer("A"),
            ask(IMAGE, "And here?"),
            answer("First B, ", reflection(image_index=1), "é\n<|sovt|> 图"),
        ],
    },
}  # fmt: skip
REFLECTIONS = {"one": 1, "several images": 2, "several reflections": 3, "paths": 4, "no text": 1, "turns": 1}
SIZES = [(1, 1), (13, 200), (57, 55), (70, 98), (1024, 33), (640, 480), (2000, 1999), (27, 27)]


@pytest.fixture
def collate(processor, model):
    def make(rows, reflect=True):
        return VReflectionDataCollator(processor, model.config, reflect=reflect)(rows)

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def check_agreement(row, processor, collate, reflect=True):
    measured = measure_row(row, processor, reflect=reflect)
    batch = collate([copy.deepcopy(row)], reflect)
    assert measured.tokens == batch["input_ids"].shape[1]
    assert measured.images == len(batch.get("image_grid_thw", ()))
    assert measured.reflections == len(batch.get("boxes", ()))
    return measured.tokens, measured.images, measured.reflections


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("reflect", [True, False])
def test_a_measured_row_is_as_long_as_the_collators(processor, collate, name, reflect):
    *_, reflections = check_agreement(GOOD[name], processor, collate, reflect)
    assert reflections == (REFLECTIONS.get(name, 0) if reflect else 0)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_odd_sizes_count_as_the_collator_makes_them(processor, collate, size):
    check_agreement({**GOOD["one"], "images": [picture(*size)]}, processor, collate)


@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_of_32_pixels_count_as_the_collator_makes_them(processor, model, size):
    """Qwen3-VL's image processor is of the same class, with larger patches."""
    limits = {"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
    larger = copy.copy(processor)
    larger.image_processor = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=limits
    )

    def collate(rows, reflect):
        return VReflectionDataCollator(larger, model.config, reflect=reflect)(rows)

    check_agreement({**GOOD["one"], "images": [picture(*size)]}, larger, collate)


def test_a_reflection_costs_its_slots_and_two_tokens(processor):
    row = GOOD["one"]
    assert measure_row(row, processor).tokens - measure_row(row, processor, reflect=False).tokens == 8 + 2


def test_a_path_costs_no_more_than_a_box(processor):
    row = {"images": [picture()], "messages": [ask(IMAGE, "What?"), answer(path(*BOXES), "A")]}
    measured = measure_row(row, processor)
    assert measured.tokens == measure_row(GOOD["one"], processor).tokens
    assert measured.path_lengths == [3] and measure_row(GOOD["one"], processor).path_lengths == [1]
    assert measure_row(GOOD["paths"], processor).path_lengths == [3, 1, 1, 6]
    assert measure_row(GOOD["paths"], processor, reflect=False).path_lengths == []


def test_rows_from_arrow_with_none_in_every_part_count_the_same(processor, collate, tmp_path):
    rows = [
        {"id": str(number), "images": [], **GOOD[name]}
        for number, name in enumerate(["one", "several images", "turns"])
    ]
    for row in rows:
        row["messages"] = [
            message if isinstance(message["content"], list) else ask(message["content"]) | {"role": message["role"]}
            for message in row["messages"]
        ]
    dataset = Dataset.from_list(rows)
    assert dataset.features["images"] == List(Image())
    assert "box" in dataset[0]["messages"][0]["content"][0]  # None, in an image's part
    expected = [check_agreement(row, processor, collate) for row in rows]
    assert [check_agreement(row, processor, collate) for row in dataset] == expected
    dataset.to_parquet(str(tmp_path / "rows.parquet"))  # with the pictures in it
    for streaming in (False, True):
        loaded = list(load_rows([{"path": str(tmp_path / "rows.parquet")}], streaming=streaming))
        assert loaded[0]["images"][0]["bytes"] is not None
        assert [check_agreement(row, processor, collate) for row in loaded] == expected


def test_only_headers_are_read(processor, tmp_path):
    path = tmp_path / "cut.jpg"
    Picture.effect_noise((400, 300), 90).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    whole = measure_row({**GOOD["one"], "images": [picture(400, 300)]}, processor)
    assert measure_row({**GOOD["one"], "images": [str(path)]}, processor) == whole


BAD = {
    "missing picture": ({"images": ["/gone/a.jpg"]}, "/gone/a.jpg: no such file"),
    "picture": ({"images": [{"path": "a.jpg", "bytes": b"text"}]}, "a.jpg: not a picture"),
    "too narrow": ({"images": [picture(2, 500)]}, "2 x 500 pixels is too narrow"),
    "too few": ({"images": []}, r"images provided \(0\) does not match number of image placeholders \(1\)"),
    "too many": ({"images": [picture()] * 2}, r"images provided \(2\) does not match"),
    "reversed": ({"box": [0.5, 0.1, 0.4, 0.3]}, "Box 0 must have x0 < x1"),
    "pixels": ({"box": [3, 4, 50, 60]}, r"Box 0 must have corners in \[0, 1\]"),
    "nan": ({"box": [0.1, float("nan"), 0.4, 0.3]}, "Box 0 must have corners"),
    "no box": ({"box": None}, r"Box 0 must be \[x0, y0, x1, y1\], got None"),
    "three corners": ({"box": [0.1, 0.2, 0.3]}, r"Box 0 must be \[x0, y0, x1, y1\]"),
    "index": ({"index": 1}, "Box 0 has `image_index` 1, but the sample has 1 images"),
    "negative index": ({"index": -1}, "Box 0 has `image_index` -1"),
    "index of text": ({"index": "0"}, "Box 0 has `image_index` '0'"),
    "long path": ({"part": path(*BOXES * 3)}, "Reflection 0 has 9 boxes, but only 8 latent steps"),
    "empty path": ({"part": path()}, "Reflection 0 must have as `boxes` at least one"),
    "box and boxes": ({"part": {**path(*BOXES), "box": [0, 0, 1, 1]}}, "Reflection 0 has both `box` and `boxes`"),
    "box of a path": ({"part": path(*BOXES, (0.2, 0.3, 0.1, 0.4))}, "Box 3 of reflection 0 must have x0 < x1"),
    "index of a path": (
        {"part": path(*BOXES, image_index=[0, 1, 0])},
        "Box 1 of reflection 0 has `image_index` 1, but",
    ),
    "few indices": (
        {"part": path(*BOXES, image_index=[0])},
        "Reflection 0 has 3 boxes, but 1 numbers in `image_index`",
    ),
    "indices of a box": ({"part": reflection(image_index=[0])}, r"Box 0 has `image_index` \[0\]: of a single `box`"),
    "unknown key": ({"part": reflection(steps=3)}, "type 'reflection' holds box, boxes, image_index .* not 'steps'"),
    "boxes of a text": ({"part": {"type": "text", "text": "A", "boxes": []}}, "type 'text' holds text .* not 'boxes'"),
    "sized picture": (
        {"messages": [ask({**IMAGE, "max_pixels": 9}), answer("A")]},
        "'image' holds image .* not 'max_pixels'",
    ),
    "no answer": ({"messages": [ask(IMAGE, "What?")]}, "nothing to learn from"),
    "no messages": ({"messages": []}, "no `messages`"),
    "messages are text": ({"messages": "Hi"}, "no `messages`"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "a message needs `content`"),
    "no type": ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "parts with a `type`"),
    "no text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs `text`"),
    "role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "a `role` of system, user"),
    "video": ({"messages": [ask(IMAGE, {"type": "video"}), answer("A")]}, "'text' or 'image', not 'video'"),
    "an assistant's picture": ({"messages": [ask("Draw."), answer(IMAGE)]}, "'text' or 'reflection', not 'image'"),
    "a user's reflection": ({"messages": [ask(IMAGE, reflection()), answer("A")]}, "not 'reflection'"),
    "image token in text": (
        {"messages": [ask(IMAGE, "What is <|image_pad|>?"), answer("A")]},
        r"Message 0 \(user\) holds <\|image_pad\|> at character 8 of its text",
    ),
    "reader's": ({"error": "`bboxs` is missing."}, "`bboxs` is missing"),
}


def make_bad(change):
    row = {"id": "seven", **copy.deepcopy(GOOD["one"])}
    part = row["messages"][1]["content"][0]
    for key, value in change.items():
        if key == "part":
            row["messages"][1]["content"][0] = value
        elif key in ("box", "index"):
            part["box" if key == "box" else "image_index"] = value
        else:
            row[key] = value
    return row


@pytest.mark.parametrize("name", BAD)
def test_every_kind_of_bad_row_is_named(processor, name):
    change, problem = BAD[name]
    with pytest.raises(BadRow, match=f"Sample seven.*{problem}"):
        measure_row(make_bad(change), processor)


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_for_the_measure_is_bad_for_the_collator(collate, name):
    with pytest.raises(BadRow):
        collate([make_bad(BAD[name][0])])


KINDS = {"reversed": "box", "no box": "box", "box of a path": "box", "empty path": "box", "box and boxes": "box", "long path": "path too long", "index": "image_index", "few indices": "image_index", "unknown key": "unknown key"}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_is_wrong_with_a_reflection_has_a_heading(processor, name):
    assert inspect_row(make_bad(BAD[name][0]), processor).kind == KINDS[name]


def test_rows_with_paths_are_good_in_a_data_set(processor, collate):
    rows = [{"id": name, **GOOD[name]} for name in ("paths", "one", "no text")]
    found = inspect_rows(Dataset.from_list(rows[:1]), processor, stop=True)
    assert found[0]["path_lengths"] == [3, 1, 1, 6]
    assert [inspected["path_lengths"] for inspected in inspect_rows(Dataset.from_list(rows[1:]), processor)] == [
        [1],
        [1],
    ]


def test_boxes_that_are_dropped_may_be_bad(processor, collate):
    row = make_bad({"box": [3, 4, 50, 60]})
    assert check_agreement(row, processor, collate, reflect=False)[-1] == 0


def save_rows(tmp_path, count=12):
    Picture.new("RGB", (84, 56)).save(tmp_path / "a.jpg")
    rows = []
    for number in range(count):
        images = ["gone.jpg" if number % 5 == 3 else "a.jpg"]
        rows.append(
            {
                "id": f"r{number}",
                "images": images,
                "messages": [ask(IMAGE, "What? " * number), answer(reflection(), "A")],
            }
        )
    return Dataset.from_list(
        [{**row, "images": [str(tmp_path / image) for image in row["images"]]} for row in rows]
    )  # fmt: skip


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bad_rows_are_named_or_stop(processor, tmp_path, num_proc):
    dataset = save_rows(tmp_path)
    found = inspect_rows(dataset, processor, num_proc=num_proc)
    for number, (row, inspected) in enumerate(zip(dataset, found)):
        assert inspected["id"] == f"r{number}"
        if number in (3, 8):
            assert inspected["problem"].startswith(f"Sample r{number}: ") and inspected["kind"] == "missing picture"
            assert "gone.jpg: no such file" in inspected["problem"] and inspected["tokens"] == 0
        else:
            assert inspected["problem"] is None and inspected["tokens"] == measure_row(row, processor).tokens
    with pytest.raises(BadRow, match="Sample r3: .*gone.jpg"):
        inspect_rows(dataset.select(range(6)), processor, stop=True, num_proc=num_proc)


def test_a_data_set_that_draws_its_rows_is_measured(processor):
    dataset = glyphsearch_dataset("train", 9)
    lengths = inspect_rows(dataset, processor, stop=True)["tokens"][:]
    assert lengths == [measure_row(row, processor).tokens for row in dataset]
    assert inspect_rows(dataset, processor, reflect=False)["tokens"][:] == [length - 10 for length in lengths]


def test_a_picture_that_was_missing_counts_when_it_is_there(processor, tmp_path):
    dataset = save_rows(tmp_path)
    dataset.save_to_disk(str(tmp_path / "rows"))  # a data set in files has a cache
    dataset = load_from_disk(str(tmp_path / "rows"))
    assert sum(inspect_rows(dataset, processor)["missing"]) == 2
    Picture.new("RGB", (84, 56)).save(tmp_path / "gone.jpg")
    assert sum(inspect_rows(dataset, processor)["missing"]) == 0


def test_a_reflection_before_the_last_question_is_bad(processor, collate):
    """The template would drop it, and its answer would be trained on without."""
    turns = [ask(IMAGE, "What?"), answer(reflection(), "A"), ask("And there?"), answer(reflection(), "B")]
    row = {"id": "seven", "images": [picture()], "messages": turns}
    for check in (lambda: measure_row(row, processor), lambda: collate([row])):
        with pytest.raises(
            BadRow, match="Sample seven: 1 of its reflections belong to turns before the last question"
        ):
            check()
    assert check_agreement(row, processor, collate, reflect=False)[-1] == 0
