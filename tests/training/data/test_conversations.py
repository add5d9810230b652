"""Rows of LLaVA, ms-swift and LLaMA-Factory: as sources of their own, and refused as `messages`."""

import json
import logging

import pytest
from datasets import Dataset
from PIL import Image

from vreflection_hub_card.rows import BadRow, row_messages
from vreflection_training.data.conversations import conversation_row
from vreflection_training.data.sources import load_rows


PICTURE = {"type": "image"}
ASK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
SWIFT = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "<ref-object><bbox> and tea."}]
LLAVA = {"image": "a.png", "conversations": ASK}
OBJECTS = {"ref": ["A cup"], "bbox": [[20, 10, 40, 30]]}
GROUNDED = {"images": ["a.png"], "messages": SWIFT, "objects": OBJECTS}
ALPACA = {
    "instruction": "<image>What?",
    "input": "One word.",
    "output": "Cup.",
    "images": ["a.png"],
    "system": "Be kind.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (80, 40)).save(folder / "a.png")
    Image.new("RGB", (40, 20)).save(folder / "b.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def text(words):
    return {"type": "text", "text": words}


def swift(answer, question="<image>What?", **objects):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": ["a.png"], "messages": turns, "objects": {**OBJECTS, **objects}}


def contents(row):
    assert row["error"] is None
    return [(message["role"], message["content"]) for message in row["messages"]]


@pytest.mark.parametrize(
    ("form", "item", "expected"),
    [
        ("llava", LLAVA, [("user", [PICTURE, text("\nWhat?")]), ("assistant", [text("A cup.")])]),
        (
            "llava",
            {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "One <image>, two <image>: which?"}, ASK[1]]},
            [("user", [text("One "), PICTURE, text(", two "), PICTURE, text(": which?")]), ("assistant", [text("A cup.")])],
        ),
        ("llava", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
         [("user", [text("Hi")]), ("assistant", [text("Hello")])]),
        (
            "ms_swift",
            {"query": "<image>Sure?", "response": "Yes.", "history": [["What?", "A cup."]], "images": ["a.png"], "videos": []},
            [("user", [text("What?")]), ("assistant", [text("A cup.")]), ("user", [PICTURE, text("Sure?")]), ("assistant", [text("Yes.")])],
        ),
        (
            "llama_factory",
            ALPACA,
            [("system", [text("Be kind.")]), ("user", [PICTURE, text("What?\nOne word.")]), ("assistant", [text("Cup.")])],
        ),
        (
            "llama_factory",
            {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What? <image>"}, SWIFT[1] | {"content": "A cup."}], "images": ["a.png"], "tools": None},
            [("system", [text("Be kind.")]), ("user", [text("What? "), PICTURE]), ("assistant", [text("A cup.")])],
        ),
    ],
)  # fmt: skip
def test_pictures_stand_where_image_stood_and_texts_stay(folder, form, item, expected):
    row = conversation_row(item, "one", "mine", str(folder), form)
    assert contents(row) == expected
    assert len(row["images"]) == sum(part == PICTURE for _, content in expected for part in content)
    assert row["images"] == [str(folder / name) for name in ("a.png", "b.png")][: len(row["images"])]


FRACTIONS = [0.25, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("form", "boxes", "item", "words"),
    [
        ("llava", "pixels", {**LLAVA, "bbox": [20, 10, 40, 30]}, "A cup."),
        ("llava", "thousandths", {**LLAVA, "bboxes": [[250, 250, 500, 750]]}, "A cup."),
        ("llava", "fractions", {**LLAVA, "bboxes": [FRACTIONS]}, "A cup."),
        ("ms_swift", "pixels", GROUNDED, "A cup and tea."),
        ("ms_swift", "pixels", swift("<ref-object> <bbox> and tea.", bbox_type="real"), "A cup and tea."),
        ("ms_swift", None, swift("<bbox> A cup.", ref=[], bbox=[FRACTIONS], bbox_type="norm1"), "A cup."),
        ("ms_swift", "pixels", swift("Red.", "<image>Which colour has <ref-object>?"), "Red."),
        ("llama_factory", "thousandths", {**ALPACA, "bbox": [250, 250, 500, 750]}, "Cup."),
    ],
)
def test_a_box_is_looked_at_before_the_answer(folder, form, boxes, item, words):
    row = conversation_row(item, "one", "mine", str(folder), form, boxes)
    *_, (role, content) = contents(row)
    assert role == "assistant"
    assert content == [{"type": "reflection", "box": FRACTIONS, "image_index": 0}, text(words)]


def test_several_boxes_are_a_path_in_the_pictures_that_the_row_names(folder):
    item = swift("<ref-object><bbox><bbox> or <ref-object><bbox>.", "<image><image>?", ref=["Cup", "pot"])
    item |= {"images": ["a.png", "b.png"]}
    item["objects"] |= {"bbox": [[20, 10, 40, 30], [0, 0, 40, 20], [0, 0, 20, 10]], "image_id": [0, 1, 1]}
    *_, (_, (path, words)) = contents(conversation_row(item, "one", "mine", str(folder), "ms_swift", "pixels"))
    assert path["boxes"] == [FRACTIONS, [0, 0, 1, 1], [0, 0, 0.5, 0.5]]
    assert path["image_indices"] == [0, 1, 1]
    assert words == text("Cup or pot.")


@pytest.mark.parametrize(
    ("form", "boxes", "item", "problem"),
    [
        ("llava", None, {**LLAVA, "image": ["a.png", "b.png"]}, "<image> 1 times, but the row has 2 pictures"),
        ("llava", None, {"conversations": ASK}, "<image> 1 times, but the row has 0 pictures"),
        ("llava", None, {**LLAVA, "images": ["a.png"]}, "both `images` and `image`"),
        ("llava", None, {"messages": SWIFT}, "a row of llava holds `conversations`; this one has id, messages"),
        ("llava", None, {"conversations": [{"from": "robot", "value": "Hi"}]}, "must be of human, user, gpt"),
        ("llava", None, {"conversations": [{**ASK[0], "weight": 0}, ASK[1]], "image": "a.png"}, "nothing reads `weight`"),
        ("llava", None, {**LLAVA, "conversations": [ASK[0], {"from": "gpt", "value": "<lvr>A cup."}]}, "`format: released`"),
        ("llava", None, {"image": ["a.png"] * 2, "conversations": [*ASK, {"from": "gpt", "value": "<image>"}]}, "an answer holds <image>"),
        ("llava", None, {**LLAVA, "video": "a.mp4"}, "`video`"),
        ("llava", None, {**LLAVA, "bbox": [20, 10, 40, 30]}, "`bbox` holds boxes, and the source doesn't say in what"),
        ("llava", "pixels", {**LLAVA, "bbox": [20, 10, 81, 30]}, r"\[20.0, 10.0, 81.0, 30.0\] of `bbox`, read as pixels.* to 80 across and to 40 down"),
        ("llava", "thousandths", {**LLAVA, "bbox": [0, 0, 1001, 3]}, "1001.* read as thousandths"),
        ("llava", "fractions", {**LLAVA, "bbox": [20, 10, 40, 30]}, "read as fractions"),
        ("llava", "pixels", {**LLAVA, "bbox": [40, 10, 20, 30]}, "x0 < x1"),
        ("llava", "pixels", {**LLAVA, "bbox": [float("nan"), 10, 20, 30]}, "x0 < x1"),
        ("llava", "pixels", {**LLAVA, "image": "gone.png", "bbox": [1, 1, 2, 2]}, "gone.png: no such file"),
        ("ms_swift", "fractions", swift("<bbox>A cup.", bbox_type="real"), "'real', but the source has `boxes: fractions`"),
        ("ms_swift", "pixels", swift("<bbox>A cup.", bbox_type="norm1000"), "must be 'real' or 'norm1'"),
        ("ms_swift", None, GROUNDED, "`objects.bbox` holds boxes, and the source"),
        ("ms_swift", "pixels", swift("<bbox>"), "an answer holds <bbox> .*`objects.bbox`"),
        ("ms_swift", "pixels", swift("It is at <bbox>."), "an answer holds <bbox>"),
        ("ms_swift", "pixels", swift("A cup.", "<image>What is in <bbox>?"), "the user's text holds <bbox>"),
        ("ms_swift", "pixels", swift("<bbox><bbox>A cup."), "<bbox> 2 times, but the row has 1 boxes"),
        ("ms_swift", "pixels", swift("<ref-object> and <ref-object>"), "<ref-object> 2 times, but the row has 1 names"),
        ("ms_swift", "pixels", swift("<bbox>A cup.", bbox=[[20, 10]]), "a box must be|must be \\[x0"),
        ("ms_swift", "pixels", swift("<bbox>A cup.", image_id=[1]), "picture 1, but the row has 1 pictures"),
        ("ms_swift", "pixels", swift("<bbox>A cup.", width=3), "nothing reads `objects.width`"),
        ("ms_swift", None, {**GROUNDED, "label": False}, "`label`"),
        ("ms_swift", None, {"messages": [{**SWIFT[1], "role": "tool_call"}]}, "tool_call"),
        ("llama_factory", None, {**ALPACA, "tools": "[{}]"}, "`tools`"),
        ("llama_factory", None, {**ALPACA, "output": None}, "`output` must be a text"),
        ("llama_factory", None, {**ALPACA, "conversations": ASK}, "both `conversations` and `instruction`"),
        ("llama_factory", None, {**ALPACA, "rejected": "Pot."}, "`rejected`"),
    ],
)  # fmt: skip
def test_what_cannot_be_brought_over_is_a_bad_row_that_names_it(folder, form, boxes, item, problem):
    row = conversation_row({"id": 7, **item}, "one", "mine", str(folder), form, boxes)
    assert row["id"] == "7" and row["messages"] == []
    with pytest.raises(BadRow, match=f"Sample 7: .*{problem}"):
        row_messages(row)


ANSWER = {"role": "assistant", "content": "A cup."}


def asked(question, **columns):
    return {"images": ["a.png"], "messages": [{"role": "user", "content": question}, ANSWER], **columns}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (LLAVA, "`conversations` .*`format: llava` or `format: llama_factory`"),
        (ALPACA, "`instruction` .*`format: llama_factory`"),
        ({"query": "What?", "response": "A cup."}, "`query` .*`format: ms_swift`"),
        (asked("What?", system="Be kind."), "`system` "),
        (asked("<image>What?"), "<image> stands in the text of a row with pictures"),
        (asked([PICTURE, text("<image>What?")]), "<image> stands"),
        ({"messages": [{"role": "user", "content": [{**PICTURE, "image": "a.png"}, text("<image>?")]}, ANSWER]}, "<image> stands"),
        (asked("What is in <bbox>?"), "<bbox> stands"),
        (asked("What?", videos=["a.mp4"]), "`videos`"),
        (asked("What?", rejected_response="A pot."), "`rejected_response`"),
        (asked("What?", image="b.png"), "both `images` and `image`"),
        ({"messages": [{"role": "user", "content": "What?"}, {**ANSWER, "loss": False}]}, "nothing reads 'loss'"),
        ({"prompt": "What?", "completion": "A cup."}, "no `messages`, .*; the row has prompt, completion"),
    ],
)  # fmt: skip
def test_messages_are_never_rows_of_another_form(row, problem):
    """Also in rows that go straight to the trainer, whose collator reads them so."""
    with pytest.raises(BadRow, match=problem):
        row_messages(row)


def test_a_row_without_pictures_may_speak_about_tags():
    messages = [{"role": "user", "content": "What is <image> in HTML?"}, ANSWER]
    assert row_messages({"messages": messages, "images": [], "videos": None, "tools": []})[0]["content"][0]["text"]
    assert row_messages(asked("What?", objects={"a": 1}, query="x"))  # nothing reads these


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_forms_are_sources_and_unread_columns_are_named_once_also_from_the_cache(folder, caplog, suffix, streaming):
    path = folder / f"rows.{suffix}"
    rows = [{"id": str(number), "source": "web", **GROUNDED} for number in range(3)]
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    source = {"path": str(path), "format": "ms_swift", "boxes": "pixels", "image_folder": str(folder)}
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = list(load_rows([source], streaming=streaming))
        assert [row_messages(row)[1]["content"][0]["box"] for row in loaded] == [FRACTIONS] * 3
        named = [record.message for record in caplog.records if "nothing reads" in record.message]
        assert named == [f"{path}: columns that nothing reads: source."]


@pytest.mark.parametrize(
    "source", [{"format": "llava", "boxes": "pixel"}, {"boxes": "pixels"}, {"format": "llava", "boxes": None}]
)
def test_boxes_are_said_in_a_known_way_and_for_these_forms(folder, source):
    with pytest.raises(ValueError, match="Source 0: `boxes` is for 'llava', 'ms_swift', 'llama_factory' and one of"):
        load_rows([{"path": str(folder), **source}])
