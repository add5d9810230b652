import json

import pytest
from PIL import Image

from vreflection_training.data.image_folders import ImageFolders
from vreflection_training.data.json_files import read_json_rows
from vreflection_training.data.released import read_meta, released_rows
from vreflection_training.data.visual_cot import visual_cot_rows


# The three forms as the releases have them.
METADATA = {
    "question": "when is j. lowell bond's anniversary?",
    "answer": "AUGUST",
    "possible_answers": ["AUGUST"],
    "image": "mqnk0226_15.png",
    "width": 1638,
    "height": 2196,
    "bboxs": [[1146, 368, 1444, 396], [126, 798, 563, 827]],
    "dataset": "docvqa",
    "split": "train",
}
CONVERSATION = {
    "dataset": "docvqa",
    "split": "train",
    "question_id": 138460,
    "image": ["cot/docvqa/kpfl0225_13.png", "cot/docvqa/kpfl0225_13.png###[14, 645, 1776, 1617]"],
    "conversations": [
        {
            "from": "human",
            "value": "<image>\nWhat is the percentage of all consumers? Please provide the bounding box coordinate of the "
            "region that can help you answer the question better.",
        },
        {"from": "gpt", "value": "[0.006, 0.407, 0.807, 0.849]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "8%"},
    ],
}
RELEASED = {
    "dataset": "flickr30k",
    "image": ["viscot/flickr30k/2618322793.jpg"],
    "conversations": [
        {"from": "human", "value": "<image>\nWhat does the child wear?\nProvide a short and direct response."},
        {"from": "gpt", "value": "<lvr>\n<answer> Blue shorts. </answer>"},
    ],
    "bboxes": [[0.382, 0.456, 0.718, 0.656]],
}


def save_picture(path, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return str(path)


def read(tmp_path, reader, *items, name="docvqa_cot_train.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return list(reader(path, ImageFolders(tmp_path)))


def boxes(row):
    return [part["box"] for part in row["messages"][1]["content"] if part["type"] == "reflection"]


def test_metadata_becomes_a_question_and_one_reflection_a_box_in_order(tmp_path):
    picture = save_picture(tmp_path / "docvqa" / METADATA["image"], (1638, 2196))
    (row,) = read(tmp_path, visual_cot_rows, METADATA)
    assert row["id"] == "docvqa_cot_train-0" and row["dataset"] == "docvqa" and row["error"] is None
    assert row["images"] == [picture]
    question, answer = row["messages"]
    assert question == {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "when is j. lowell bond's anniversary?"}],
    }
    assert [part["type"] for part in answer["content"]] == ["reflection", "reflection", "text"]
    assert answer["content"][2]["text"] == "AUGUST"
    for box, pixels in zip(boxes(row), METADATA["bboxs"]):
        assert [corner * side for corner, side in zip(box, (1638, 2196) * 2)] == pytest.approx(pixels)


def test_boxes_may_become_the_path_of_one_reflection(tmp_path):
    save_picture(tmp_path / "docvqa" / METADATA["image"], (1638, 2196))
    path = tmp_path / "docvqa_cot_train.jsonl"
    one = {**METADATA, "bboxs": METADATA["bboxs"][:1]}
    path.write_text("\n".join(map(json.dumps, [METADATA, one, {**METADATA, "bboxs": []}])))
    apart, several = (
        [row["messages"][1]["content"] for row in visual_cot_rows(path, ImageFolders(tmp_path), paths)]
        for paths in (False, True)
    )
    expected = {"type": "reflection", "boxes": [part["box"] for part in apart[0][:2]], "image_index": 0}
    assert several[0] == [expected, apart[0][2]]
    assert several[1:] == apart[1:]


def test_without_width_and_height_the_header_is_asked(tmp_path):
    item = {key: value for key, value in METADATA.items() if key not in ("width", "height")}
    (row,) = read(tmp_path, visual_cot_rows, {**item, "bboxs": [[2, 3, 4, 6]]})
    assert "mqnk0226_15.png: no such file" in row["error"]
    assert len(row["images"]) == 1  # so that it is counted as missing
    save_picture(tmp_path / "docvqa" / METADATA["image"])
    (row,) = read(tmp_path, visual_cot_rows, {**item, "bboxs": [[2, 3, 4, 6]]})
    assert boxes(row) == [[0.25, 0.5, 0.5, 1.0]]


@pytest.mark.parametrize(
    ("size", "good"),
    [
        ((1638, 2196), True),
        ((819, 1098), True),
        ((100, 134), True),
        ((3277, 4392), True),
        ((2196, 1638), False),
        ((1638, 2190), False),
    ],
)
def test_width_and_height_have_the_shape_of_the_picture(tmp_path, size, good):
    save_picture(tmp_path / "docvqa" / METADATA["image"], size)
    (row,) = read(tmp_path, visual_cot_rows, METADATA)
    if good:
        assert row["error"] is None and boxes(row)[0][0] == 1146 / 1638
    else:
        assert "1638 x 2196" in row["error"] and "{} x {} pixels".format(*size) in row["error"]


def test_the_shape_is_that_after_the_rotation(tmp_path):
    (tmp_path / "docvqa").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2196, 1638)).save(tmp_path / "docvqa" / METADATA["image"], exif=exif)
    (row,) = read(tmp_path, visual_cot_rows, METADATA)
    assert row["error"] is None


def test_conversations_take_the_pixels_not_the_fractions_of_a_padded_square(tmp_path):
    save_picture(tmp_path / "docvqa" / "kpfl0225_13.png", (2200, 1700))
    (row,) = read(tmp_path, visual_cot_rows, CONVERSATION, name="viscot_363k.json")
    assert row["messages"][0]["content"][1]["text"] == "What is the percentage of all consumers?"
    assert row["messages"][1]["content"][-1]["text"] == "8%"
    assert boxes(row) == [[14 / 2200, 645 / 1700, 1776 / 2200, 1617 / 1700]]
    # The fractions in the answer are of the 2200 x 2200 square, 250 pixels of padding above the picture.
    fractions = [14 / 2200, (645 + 250) / 2200, 1776 / 2200, (1617 + 250) / 2200]
    assert fractions == pytest.approx([0.006, 0.407, 0.807, 0.849], abs=6e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"question": None}, "`question` must be a text, got None"),
        ({"answer": " "}, "`answer` must be a text"),
        ({"image": 3}, "`image` must be a text, got 3"),
        ({"bboxs": None}, "boxes must be a list"),
        ({"bboxs": [[1, 2, 3]]}, "a box must be"),
        ({"bboxs": [["1", "2", "3", "4"]]}, "a box must be"),
        ({"width": "wide"}, "must be numbers of pixels, got 'wide' and 2196"),
        ({"width": None}, "must be numbers of pixels, got None"),
        ({"height": 0}, "must be numbers of pixels, got 1638 and 0"),
        (
            {"bboxs": [[0.1, 0.2, 0.5, 1]]},
            "the box [0.1, 0.2, 0.5, 1.0] holds fractions; it must be in pixels, of 1638 x 2196",
        ),
        ({"bboxs": [[5, 6, 5.5, 90]]}, "the box [5.0, 6.0, 5.5, 90.0] is less than a pixel wide or high"),
        ({"bboxs": [[5, 6, 90, 6]]}, "less than a pixel"),
    ],
)
def test_what_metadata_lacks_is_said_and_the_reader_goes_on(tmp_path, change, problem):
    rows = read(tmp_path, visual_cot_rows, {**METADATA, **change}, "{broken", METADATA)
    assert problem in rows[0]["error"] and rows[0]["messages"] == []
    assert "line 2 is not JSON" in rows[1]["error"]
    assert rows[2]["error"] is None and rows[2]["id"] == "docvqa_cot_train-2"


@pytest.mark.parametrize(
    "change",
    [
        {"image": ["a.png", "a.png###[1, 2, 3]"]},
        {"image": ["a.png", "a.png###no box"]},
        {"image": []},
        {"conversations": CONVERSATION["conversations"][:3]},
        {"conversations": ["human"]},
        {"conversations": None},
    ],
)
def test_a_conversation_that_cannot_be_understood_is_bad(tmp_path, change):
    save_picture(tmp_path / "a.png")
    (row,) = read(tmp_path, visual_cot_rows, {**CONVERSATION, **change})
    assert row["error"]


@pytest.mark.parametrize(
    ("folder", "dataset", "image"),
    [
        ("coco/train2017", "coco", "1.jpg"),
        ("coco/train2014", "coco", "1.jpg"),
        ("cot_image_data/gqa", "gqa", "1.jpg"),
        ("gqa/images", "gqa", "viscot/gqa/1.jpg"),
        ("flickr30k/flickr30k-images", "flickr30k", "viscot/flickr30k/1.jpg"),
        ("textvqa/train_images", "textvqa", "1.jpg"),
        ("textvqa/train_images", "textcap", "1.jpg"),
        ("cot/textvqa", "textcap", "cot/textvqa/1.jpg"),
        ("docvqa", "docvqa", "viscot/docvqa/1.jpg"),
        ("infographicsvqa", "infographicsvqa", "1.jpg"),
        ("openimages", "openimages", "1.jpg"),
        *((f"openimages/train_{part}", "openimages", "viscot/openimages/1.jpg") for part in range(6)),
        ("openimages/train_3", "openimages", "train_3/1.jpg"),
        ("vsr/images", "vsr", "1.jpg"),
        ("viscot/dude", "dude", "viscot/dude/1.jpg"),
        ("dude/DUDE_train-val-test_binaries/images/train", "dude", "1.jpg"),
        ("sroie/viscot/sroie", "sroie", "1.jpg"),
        ("cub/CUB_200_2011/images/001.Black_footed_Albatross", "cub", "001.Black_footed_Albatross/1.jpg"),
        ("v7w", "v7w", "1.jpg"),
        ("visual7w/images", "v7w", "cot/v7w/1.jpg"),
        ("v7w", "visual7w", "1.jpg"),
        ("", "docvqa", "1.jpg"),
        ("mine", "unknown", "mine/1.jpg"),
    ],
)
def test_pictures_are_found_in_the_layouts_of_the_release_and_of_its_data_sets(tmp_path, folder, dataset, image):
    for decoy in ("docvqa", "gqa", "openimages/train_5"):
        save_picture(tmp_path / decoy / "other.jpg")
    picture = save_picture(tmp_path / folder / "1.jpg")
    assert ImageFolders(tmp_path).find(image, dataset) == picture


def test_a_missing_picture_has_the_path_where_it_should_be(tmp_path):
    (tmp_path / "gqa").mkdir()
    assert ImageFolders(tmp_path).find("1.jpg", "gqa") == str(tmp_path / "gqa" / "1.jpg")
    assert ImageFolders(tmp_path).find("1.jpg", "vsr") == str(tmp_path / "1.jpg")
    assert ImageFolders(tmp_path).find("/gone/1.jpg", "gqa") == "/gone/1.jpg"
    with pytest.raises(NotADirectoryError, match="image_folder"):
        ImageFolders(tmp_path / "nowhere")


def test_the_authors_format_puts_reflections_where_lvr_stands(tmp_path):
    picture = save_picture(tmp_path / "flickr30k" / "flickr30k-images" / "2618322793.jpg")
    (row,) = read(tmp_path, released_rows, RELEASED)
    assert row["images"] == [picture] and row["dataset"] == "flickr30k" and row["error"] is None
    assert row["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What does the child wear?\nProvide a short and direct response."},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "reflection", "box": [0.382, 0.456, 0.718, 0.656], "image_index": 0},
                {"type": "text", "text": "\n<answer> Blue shorts. </answer>"},
            ],
        },
    ]


@pytest.mark.parametrize("bboxes", [[0.1, 0.2, 0.3, 0.4], [[0.1, 0.2, 0.3, 0.4]], [[[0.1, 0.2, 0.3, 0.4]]]])
@pytest.mark.parametrize("image", ["a.jpg", ["a.jpg"]])
def test_boxes_may_be_nested_and_the_picture_a_string(tmp_path, bboxes, image):
    (row,) = read(tmp_path, released_rows, {**RELEASED, "bboxes": bboxes, "image": image})
    assert boxes(row) == [[0.1, 0.2, 0.3, 0.4]]
    assert len(row["images"]) == 1


def test_several_reflections_pictures_and_turns_keep_their_order(tmp_path):
    item = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "system", "value": "Look."},
            {"from": "human", "value": "<image>\nand <image>?"},
            {"from": "gpt", "value": "First <lvr> then <lvr>, so A."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "<lvr>Yes."},
        ],
        "bboxes": [[[0, 0, 0.1, 0.1]], [[0, 0, 0.2, 0.2], [0, 0, 0.3, 0.3]]],
    }
    (row,) = read(tmp_path, released_rows, item)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [part["type"] for part in row["messages"][1]["content"]] == ["image", "text", "image", "text"]
    parts = [part for message in row["messages"][2::2] for part in message["content"]]
    said = [part.get("text", part.get("box", ["", "", "", ""])[3]) for part in parts]
    assert said == ["First ", 0.1, " then ", 0.2, ", so A.", 0.3, "Yes."]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bboxes": []}, "<lvr> 1 times, but there are 0 boxes"),
        ({"bboxes": [[0, 0, 1, 1]] * 2}, "<lvr> 1 times, but there are 2 boxes"),
        ({"image": ["a.jpg", "b.jpg"]}, "<image> 1 times, but there are 2 images"),
        ({"image": None}, "<image> 1 times, but there are 0 images"),
        ({"image": [1]}, "`image` must be a path"),
        ({"conversations": None}, "`conversations` must be a list"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "a turn must have `from`"),
        ({"bboxes": ["0.1 0.2 0.3 0.4"]}, "a box must be"),
    ],
)
def test_counts_that_differ_and_other_slips_make_a_bad_row(tmp_path, change, problem):
    rows = read(tmp_path, released_rows, {**RELEASED, **change}, RELEASED)
    assert problem in rows[0]["error"]
    assert rows[1]["error"] is None


@pytest.mark.parametrize("as_object", [False, True])
def test_a_meta_files_paths_are_relative_to_it(tmp_path, as_object):
    entries = [{"ds_name": "a", "data_path": "data/a.json", "image_folder": "/pictures", "ds_type": "Q_A"}]
    content = {entry.pop("ds_name"): entry for entry in entries} if as_object else entries
    (tmp_path / "meta.json").write_text(json.dumps(content))
    expected = {"data_path": str(tmp_path / "data/a.json"), "image_folder": "/pictures"}
    assert read_meta(tmp_path / "meta.json") == [expected]


@pytest.mark.parametrize("content", [[], [{"ds_name": "a", "data_path": "a.json"}], ["a.json"], "a.json"])
def test_a_meta_file_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="meta.json"):
        read_meta(tmp_path / "meta.json")


@pytest.mark.parametrize("indent", [None, 4])
def test_lists_and_lines_are_told_apart(tmp_path, indent):
    items = [{"text": 'a "quoted" ] } é\n', "n": [number, {"x": None}]} for number in range(9)]
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(items, indent=indent))
    assert list(read_json_rows(path)) == items
    path.write_text("\n".join(map(json.dumps, items)))
    assert list(read_json_rows(path)) == items


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a"', '[{"a": 1}', '[{"a": 1}, 3]', '["a"]'])
def test_a_broken_json_list_is_an_error(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="rows.json"):
        list(read_json_rows(path))
