import json
import os
import time

import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as Picture

from vreflection_hub_card.rows import FEATURES, path_part, reflection_part, row_messages, text_part
from vreflection_training.data.images import image_size
from vreflection_training.data.sources import load_rows


QUESTION = {
    "question": "what month?",
    "answer": "MAY",
    "image": "a.png",
    "width": 80,
    "height": 60,
    "bboxs": [[8, 6, 16, 12]],
    "dataset": "docvqa",
    "split": "train",
}
RELEASED = {
    "dataset": "docvqa",
    "image": "viscot/docvqa/a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "<lvr>\nMAY"}],
    "bboxes": [[[0.1, 0.1, 0.2, 0.2]]],
}
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "reflection", "box": [0.1, 0.1, 0.2, 0.2], "image_index": 0},
            {"type": "text", "text": "MAY"},
        ],
    },
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docvqa").mkdir()
    Picture.new("RGB", (80, 60), "red").save(tmp_path / "docvqa" / "a.png")
    write(tmp_path / "docvqa_cot_train.jsonl", [{**QUESTION, "question": f"{number}?"} for number in range(30)])
    (tmp_path / "released.json").write_text(json.dumps([RELEASED] * 3))
    meta = [{"ds_name": "r", "data_path": "released.json", "image_folder": "."}] * 2
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    write(tmp_path / "own.jsonl", [{"images": ["docvqa/a.png"], "messages": PARTS} for _ in range(5)])
    return tmp_path


def write(path, items):
    path.write_text("\n".join(map(json.dumps, items)))


def visual_cot(folder, **options):
    return {"path": str(folder / "docvqa_cot_train.jsonl"), "format": "visual_cot", **options}


def own(folder, **options):
    return {"path": str(folder / "own.jsonl"), **options}


def save_parquet(folder, rows=4):
    """A file with the pictures in it, as a data set is published."""
    picture = {"bytes": (folder / "docvqa/a.png").read_bytes(), "path": "a.png"}
    data = [{"id": str(number), "images": [picture], "messages": PARTS, "extra": 1} for number in range(rows)]
    part = {
        "type": Value("string"),
        "text": Value("string"),
        "image_index": Value("int64"),
        "box": List(Value("float32")),
    }
    messages = List({"content": List(part), "role": Value("string")})
    dataset = Dataset.from_list(
        data,
        features=Features(
            {"extra": Value("int64"), "id": Value("string"), "images": List(Image()), "messages": messages}
        ),
    )
    dataset.to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_every_format_gives_the_same_row(folder, streaming):
    sources = [
        visual_cot(folder),
        {"path": str(folder / "released.json"), "format": "released"},
        {"path": str(folder / "meta.json"), "format": "released_meta"},
        own(folder),
        {"path": save_parquet(folder)},
    ]
    counts = [30, 3, 6, 5, 4]
    for source, count in zip(sources, counts):
        rows = load_rows([source], streaming=streaming)
        assert isinstance(rows, IterableDataset if streaming else Dataset)
        assert rows.features == FEATURES
        listed = list(rows)
        assert len(listed) == count
        row = listed[0]
        assert row["error"] is None
        assert row["id"] and row["dataset"]
        assert [image_size(image) for image in row["images"]] == [(80, 60)]
        answer = row["messages"][1]["content"]
        assert answer[0]["type"] == "reflection" and answer[0]["image_index"] == 0
        assert answer[0]["box"] == pytest.approx([0.1, 0.1, 0.2, 0.2])
        assert answer[-1]["text"].strip() == "MAY"
    together = list(load_rows(sources, streaming=streaming))
    assert len(together) == sum(counts)
    assert len({str(row["id"]) for row in together[:30]}) == 30


BOXES = [[0.1, 0.1, 0.2, 0.2], [0.3, 0.1, 0.7, 0.2], [0.3, 0.1, 0.7, 0.2]]
REFLECTIONS = [
    reflection_part(BOXES[0]),
    {"type": "reflection", "box": BOXES[0]},
    path_part(BOXES, [1, 0, 1]),
    path_part(BOXES[:1], [1]),
    path_part(BOXES, 1),
    {"type": "reflection", "boxes": BOXES},
]


def reflection_rows(folder, parts):
    picture = str(folder / "docvqa/a.png")
    return [
        {
            "images": [picture] * 2,
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
                {"role": "assistant", "content": [part, text_part("A")]},
            ],
        }
        for part in parts
    ]


def reflections(rows):
    return [row_messages(row)[1]["content"][0] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_reflections_come_through_as_they_were_written(folder, streaming):
    """Number or list, one box or several: in one data set, and once more through a file of its rows."""
    write(folder / "paths.jsonl", reflection_rows(folder, REFLECTIONS))
    source = {"path": str(folder / "paths.jsonl")}
    assert reflections(load_rows([source], streaming=streaming)) == REFLECTIONS
    load_rows([source]).to_parquet(str(folder / "paths.parquet"))
    again = load_rows([{"path": str(folder / "paths.parquet")}, source], streaming=streaming)
    assert again.features == FEATURES
    assert reflections(again) == REFLECTIONS * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_may_hold_lists_of_images(folder, streaming):
    parts = [path_part(BOXES, [1, 0, 1]), path_part(BOXES[:1], [1]), {"type": "reflection", "boxes": BOXES}]
    Dataset.from_list(reflection_rows(folder, parts)).to_parquet(str(folder / "lists.parquet"))
    assert reflections(load_rows([{"path": str(folder / "lists.parquet")}], streaming=streaming)) == parts


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_disk", ["jsonl", "parquet"])
def test_a_part_with_a_key_that_nobody_knows_is_refused(folder, streaming, on_disk):
    """Also where Arrow gives the key to every part."""
    parts = [
        reflection_part(BOXES[0]),
        {**reflection_part(BOXES[0]), "boxs": BOXES},
        {**text_part("K"), "boxes": BOXES},
    ]
    rows = reflection_rows(folder, parts)
    rows[0]["messages"][0]["content"][0] = {"type": "image", "max_pixels": 784}
    if on_disk == "jsonl":
        write(folder / "keys.jsonl", rows)
    else:
        Dataset.from_list(rows).to_parquet(str(folder / "keys.parquet"))
    errors = [row["error"] for row in load_rows([{"path": str(folder / f"keys.{on_disk}")}], streaming=streaming)]
    assert "a part of type 'image' holds image besides its type, not 'max_pixels': {" in errors[0]
    assert "a part of type 'reflection' holds box, boxes, image_index besides its type, not 'boxs': {" in errors[1]
    assert "a part of type 'text' holds text besides its type, not 'boxes': {" in errors[2]


@pytest.mark.parametrize("streaming", [False, True])
def test_visual_cot_makes_paths_where_it_is_asked_to(folder, streaming):
    question = {**QUESTION, "bboxs": [[8, 6, 16, 12], [24, 6, 56, 12]]}
    write(folder / "docvqa_cot_train.jsonl", [question] * 2)
    sources = [visual_cot(folder, **options) for options in ({}, {"paths": False}, {"paths": True})]
    answers = [row_messages(load_one(source, streaming))[1]["content"] for source in sources]
    boxes = [[0.1, 0.1, 0.2, 0.2], [0.3, 0.1, 0.7, 0.2]]
    assert answers[0] == answers[1] == [*map(reflection_part, boxes), text_part("MAY")]
    assert answers[2] == [path_part(boxes), text_part("MAY")]


def load_one(source, streaming):
    return next(iter(load_rows([source], streaming=streaming)))


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_a_parquet_file_stay_as_they_are(folder, streaming):
    # Decoding and encoding a JPEG again changes it.
    Picture.effect_noise((80, 60), 90).save(folder / "docvqa/a.png", "JPEG", quality=93)
    (row, *_) = load_rows([{"path": save_parquet(folder)}], streaming=streaming)
    assert row["images"][0]["bytes"] == (folder / "docvqa/a.png").read_bytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_mix_by_their_shares_and_by_the_seed(folder, streaming):
    def mix(seed):
        sources = [visual_cot(folder, weight=3), own(folder, weight=1.0)]
        return [row["id"] for row in load_rows(sources, streaming=streaming, seed=seed)]

    write(folder / "own.jsonl", [{"images": ["docvqa/a.png"], "messages": PARTS} for _ in range(300)])
    first = mix(0)
    assert first == mix(0)
    assert first != mix(1)
    assert len({name for name in first if name.startswith("own")}) == 300  # all of the one that takes longest
    share = sum(name.startswith("docvqa") for name in first) / len(first)
    assert len(first) > 1000
    assert share == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / len(first)) ** 0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_scenes_mix_with_files(folder, streaming):
    scenes = {"format": "glyphsearch", "split": "train", "count": 6}
    rows = list(load_rows([scenes, own(folder)], streaming=streaming))
    assert [row["dataset"] for row in rows] == ["glyphsearch"] * 6 + ["own"] * 5
    drawn = load_rows([scenes])
    assert drawn[2]["images"][0].size == (168, 168)  # alone, drawn when it is read
    assert image_size(rows[2]["images"][0]) == (168, 168)
    box = drawn[2]["messages"][1]["content"][0]["box"]
    assert rows[2]["messages"][1]["content"][0]["box"] == box
    curriculum = {"format": "glyphsearch_curriculum", "crops": 1, "lists": 1, "scenes": 1}
    assert len(list(load_rows([curriculum], streaming=streaming))) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_split_and_data_files_is_read_by_datasets(folder, streaming):
    save_parquet(folder, rows=9)
    source = {"path": str(folder), "data_files": {"mine": "rows.parquet"}, "split": "mine"}
    assert len(list(load_rows([source], streaming=streaming))) == 9
    if not streaming:
        assert len(load_rows([{**source, "split": "mine[:3]"}])) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_with_parts_of_different_keys_and_relative_paths_is_read(folder, streaming):
    (folder / "set").mkdir()
    write(folder / "set" / "train.jsonl", [{"extra": 1, "images": ["../docvqa/a.png"], "messages": PARTS}] * 3)
    rows = list(load_rows([{"path": str(folder / "set")}], streaming=streaming))
    assert [row["error"] for row in rows] == [None] * 3
    assert image_size(rows[2]["images"][0]) == (80, 60)
    assert rows[2]["messages"][1]["content"][0]["box"] == [0.1, 0.1, 0.2, 0.2]


def test_a_changed_file_is_read_again(folder):
    assert len(load_rows([own(folder)])) == 5
    before = os.stat(folder / "own.jsonl").st_mtime_ns
    text = (folder / "own.jsonl").read_text()
    (folder / "own.jsonl").write_text(text.replace("MAY", "NOV"))  # the same size
    os.utime(folder / "own.jsonl", ns=(before + 10**9, before + 10**9))
    assert load_rows([own(folder)])[0]["messages"][1]["content"][1]["text"] == "NOV"
    write(folder / "own.jsonl", [{"messages": PARTS, "images": ["docvqa/a.png"]}])
    assert len(load_rows([own(folder)])) == 1


def test_pictures_that_are_added_later_are_found(folder):
    (folder / "docvqa_cot_train.jsonl").write_text(
        json.dumps({**QUESTION, "image": "new.png", "dataset": "openimages"})
    )
    (folder / "openimages" / "train_4").mkdir(parents=True)
    missing = load_rows([visual_cot(folder)])[0]["images"][0]["path"]
    assert missing == str(folder / "openimages" / "new.png")
    time.sleep(0.02)
    Picture.new("RGB", (8, 6)).save(folder / "openimages" / "train_4" / "new.png")
    assert load_rows([visual_cot(folder)])[0]["images"][0]["path"] == str(folder / "openimages/train_4/new.png")


@pytest.mark.parametrize("stored", ["rows.json", "rows.parquet"])
def test_boxes_in_pixels_are_read_again_when_their_picture_comes(tmp_path, stored):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    row = {"id": "one", "image": "images/deep/new.png", "bbox": [0, 0, 4, 3], "conversations": turns}
    (tmp_path / "images" / "deep").mkdir(parents=True)
    if stored == "rows.json":
        write(tmp_path / stored, [row])
    else:
        Dataset.from_list([row]).to_parquet(tmp_path / stored)
    source = {"path": str(tmp_path / stored), "format": "llava", "boxes": "pixels"}
    assert "no such file" in load_rows([source])[0]["error"]
    time.sleep(0.02)
    Picture.new("RGB", (8, 6)).save(tmp_path / "images" / "deep" / "new.png")
    (found,) = load_rows([source])
    assert found["error"] is None and found["messages"][1]["content"][0]["box"] == [0.0, 0.0, 0.5, 0.5]


def test_a_second_load_reads_the_cache(folder, monkeypatch):
    first = load_rows([visual_cot(folder)])
    second = load_rows([visual_cot(folder)])
    assert first.cache_files and first.cache_files == second.cache_files


def test_strings_inline_pictures_and_absolute_paths_become_parts(folder):
    inline = str(folder / "docvqa/a.png")
    items = [
        {"id": 7, "images": [inline], "messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]},
        {"image": "docvqa/a.png", "messages": PARTS, "dataset": "mine"},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "docvqa/a.png"}]}, PARTS[1]]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": None, "text": None}]}, PARTS[1]], "images": [inline]},
        {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]},
    ]  # fmt: skip
    write(folder / "own.jsonl", items)
    rows = list(load_rows([own(folder)]))
    assert [row["error"] for row in rows] == [None] * 5
    assert [[image["path"] for image in row["images"]] for row in rows] == [[inline]] * 4 + [[]]
    kinds = [[part["type"] for part in row["messages"][0]["content"]] for row in rows]
    assert kinds == [["image", "text"], ["image", "text"], ["image"], ["image"], ["text"]]
    assert [row["id"] for row in rows] == ["7", "own-1", "own-2", "own-3", "own-4"]
    assert rows[1]["dataset"] == "mine"
    elsewhere = load_rows([own(folder, image_folder=str(folder / "docvqa"))])
    assert elsewhere[1]["images"][0]["path"] == str(folder / "docvqa/docvqa/a.png")


def test_relative_paths_are_stored_as_absolute_ones(folder, monkeypatch):
    monkeypatch.chdir(folder)
    save_parquet(folder)
    sources = [
        {"path": "own.jsonl"},
        {"path": "own.jsonl", "image_folder": "."},
        {"path": "docvqa_cot_train.jsonl", "format": "visual_cot"},
        {"path": "meta.json", "format": "released_meta"},
    ]
    for source in sources:
        assert load_rows([source])[0]["images"][0]["path"] == str(folder / "docvqa" / "a.png")


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_come_along_with_what_is_wrong(folder, streaming):
    good = {"images": ["docvqa/a.png"], "messages": PARTS}
    bad = [
        {"messages": PARTS},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "assistant", "content": [{"type": "reflection", "box": ["a"]}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "reflection", "image_index": "a"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "reflection", "image_index": [0, "a"]}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "reflection", "boxes": [0.1, 0.1, 0.2, 0.2]}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "reflection", "boxes": [["a"]]}]}]},
        {"images": [3], "messages": PARTS},
        3,
    ]
    write(folder / "own.jsonl", [good, *bad, good])
    rows = list(load_rows([own(folder)], streaming=streaming))
    assert [row["error"] is None for row in rows] == [True] + [False] * len(bad) + [True]
    assert "images provided (0) does not match number of image placeholders (1)" in rows[1]["error"]
    assert "line 15 is not a JSON object" in rows[14]["error"]


@pytest.mark.parametrize(
    ("sources", "error", "problem"),
    [
        ([], ValueError, "at least one source"),
        (["a.json"], ValueError, "Source 0 must be a dict"),
        ([{}], ValueError, "needs `path`"),
        ([{"path": "x", "format": "coco"}], ValueError, "`format` must be one of messages, llava"),
        ([{"path": "gone.jsonl"}], FileNotFoundError, "gone.jsonl"),
        ([{"path": "gone.jsonl", "format": "visual_cot"}], FileNotFoundError, "gone.jsonl"),
        ([{"path": "own.jsonl", "split": "train"}], ValueError, "takes no 'split'"),
        ([{"path": "docvqa", "format": "visual_cot"}], FileNotFoundError, "no files"),
        ([{"path": "own.jsonl", "paths": True}], ValueError, "Source 0: `paths` is for 'visual_cot' and 'glyphsearch', not for 'messages'"),
        ([{"path": "docvqa", "paths": True}], ValueError, "`paths` is for 'visual_cot'"),
        ([{"path": "released.json", "format": "released", "paths": True}], ValueError, "not for 'released'"),
        ([{"path": "meta.json", "format": "released_meta", "paths": True}], ValueError, "not for 'released_meta'"),
        ([{"format": "glyphsearch_curriculum", "crops": 1, "lists": 1, "scenes": 1, "paths": True}], ValueError, "'paths'"),
        ([{"format": "glyphsearch", "split": "train", "count": 1, "paths": 1}], ValueError, "`paths` must be true or false, got 1"),
        ([{"path": "docvqa_cot_train.jsonl", "format": "visual_cot", "paths": 1}], ValueError, "`paths` must be true or false, got 1"),
        ([{"path": "docvqa_cot_train.jsonl", "format": "visual_cot", "path_": 1}], ValueError, "takes no 'path_'"),
        ([{"path": "own.jsonl", "weight": 1}, {"path": "own.jsonl"}], ValueError, "Source 1 has `weight` None"),
        ([{"path": "own.jsonl", "weight": 0}] * 2, ValueError, "Source 0 has `weight` 0"),
        ([{"path": "own.jsonl", "weight": "1"}], ValueError, "above 0"),
        ([{"path": "meta.json", "format": "released_meta", "image_folder": "x"}], ValueError, "its own image folders"),
        ([{"path": "x", "format": "glyphsearch"}], ValueError, "leave `path`"),
        ([{"format": "glyphsearch", "split": "train"}], ValueError, "'count'"),
        ([{"format": "glyphsearch", "split": "train", "count": 1, "begin": 1}], ValueError, "Source 0.*'begin'"),
        ([{"path": "released.json", "format": "released", "image_folder": "x"}], NotADirectoryError, "image_folder"),
        ([{"path": "own.jsonl", "image_folder": "x"}], NotADirectoryError, "image_folder"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_understood_are_refused(folder, monkeypatch, sources, error, problem):
    monkeypatch.chdir(folder)
    for streaming in (False, True):
        with pytest.raises(error, match=problem):
            load_rows(sources, streaming=streaming)


def test_a_stream_is_shuffled_within_a_buffer(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"id": str(number), **row}) for number in range(50)))
    sources = [{"path": str(tmp_path / "rows.jsonl")}]

    def order(**options):
        return [int(row["id"]) for row in load_rows(sources, streaming=True, **options)]

    assert order() == list(range(50))
    shuffled = order(seed=1, shuffle_buffer=10)
    assert sorted(shuffled) == list(range(50)) and shuffled != list(range(50))
    assert shuffled == order(seed=1, shuffle_buffer=10) != order(seed=2, shuffle_buffer=10)
    assert all(row <= place + 10 for place, row in enumerate(shuffled))  # nothing is read further ahead
