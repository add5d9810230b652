import base64
import io
import re

import pytest
from PIL import Image

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS, BLINK_COUNTS
from vreflection_hub_card.glyphsearch import glyphsearch_dataset


INSTRUCTION = "Answer with the option's letter from the given choices directly."


def encode(colour, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (4, 3), colour).save(file, "PNG")
    return file.getvalue()


RED = encode("red")
# One row of each data set, with its columns.
ROWS = {
    "mmvp": {
        "Index": 18,
        "Question": "Is the door open?",
        "Options": "(a) Open (b) Closed",
        "Correct Answer": "(b)",
        "image": {"bytes": RED, "path": "18.jpg"},
    },
    "vstar": {
        "image": Image.new("RGB", (4, 3), "red"),
        "text": f"What is the colour?\n(A) red\n(B) light blue\n{INSTRUCTION}",
        "category": "direct_attributes",
        "label": "B",
        "question_id": "7",
    },
    "blink": {
        "idx": "val_Jigsaw_3",
        "question": "Which one fits?",
        "sub_task": "Jigsaw",
        "image_1": {"bytes": RED, "path": None},
        "image_2": {"bytes": encode("lime"), "path": None},
        "image_3": {"bytes": encode("blue"), "path": None},
        "image_4": None,
        "choices": ["the second image", "the third image"],
        "answer": "(B)",
        "prompt": "not asked",
    },
    "hrbench4k": {
        "index": 5,
        "question": "How many?",
        "answer": "B",
        "category": "cross",
        "A": "1",
        "B": "2",
        "C": "3",
        "D": "4",
        "cycle_category": "0",
        "image": base64.b64encode(RED).decode(),
    },
    "mmerealworld_lite": {
        "index": "reason/monitoring/1",
        "question": "Where?",
        "multi-choice options": ["(A) here", "(B) there", "(C) left", "(D) right", "(E) not in the picture"],
        "answer": "B",
        "category": "Reasoning/Monitoring",
        "l2-category": "intention",
        "bytes": base64.b64encode(RED).decode(),
    },
    "gqa": {
        "id": "201307251",
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "image": {"bytes": RED, "path": None},
    },
}
ROWS["hrbench8k"] = ROWS["hrbench4k"]
QUESTIONS = {
    "mmvp": "Is the door open?\nOptions:\nA. Open B. Closed",
    # The authors add the instruction to a text that already ends with it.
    "vstar": f"What is the colour?\n(A) red\n(B) light blue\n{INSTRUCTION}",
    "blink": "Which one fits?\nOptions:\nA. the second image\nB. the third image\n",
    "hrbench4k": "How many?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4",
    "hrbench8k": "How many?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4",
    "mmerealworld_lite": "Where?\nOptions:\n(A) here\n(B) there\n(C) left\n(D) right\n(E) not in the picture",
}
LOADED = [name for name, benchmark in BENCHMARKS.items() if benchmark.rows is None]
PAPERS = [name for name in LOADED if name != "gqa"]
IMAGES = {"blink": [(255, 0, 0), (0, 255, 0), (0, 0, 255)]}
OPTIONS = {
    "mmvp": ("Open", "Closed"),
    "vstar": ("red", "light blue"),
    "blink": ("the second image", "the third image"),
    "hrbench4k": ("1", "2", "3", "4"),
    "hrbench8k": ("1", "2", "3", "4"),
    "mmerealworld_lite": ("here", "there", "left", "right", "not in the picture"),
}
IDS = {"mmvp": "18", "vstar": "7", "blink": "val_Jigsaw_3", "hrbench4k": "5", "hrbench8k": "5", "gqa": "201307251"}


@pytest.mark.parametrize("name", PAPERS)
def test_a_row_becomes_an_item(name):
    item = BENCHMARKS[name].item(ROWS[name])
    assert item.id == IDS.get(name, "reason/monitoring/1")
    assert item.question == QUESTIONS[name]
    assert item.question + BENCHMARKS[name].instruction == f"{QUESTIONS[name]}\n{INSTRUCTION}"
    assert item.options == OPTIONS[name]
    assert item.answer == "B"
    assert [image.getpixel((0, 0)) for image in item.pictures()] == IMAGES.get(name, [(255, 0, 0)])


def test_a_question_of_gqa_asks_for_a_word_or_phrase():
    item = BENCHMARKS["gqa"].item(ROWS["gqa"])
    asked = item.question + BENCHMARKS["gqa"].instruction
    assert asked == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert (item.id, item.answer, item.options) == ("201307251", "no", ("no",))
    assert item.pictures()[0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("missing", ["absent", "none", "no file", "broken", "damaged"])
def test_a_picture_that_is_not_there_is_named_by_its_item(name, missing, tmp_path):
    column = {"blink": "image_1", "mmerealworld_lite": "bytes"}.get(name, "image")
    encoded = name.startswith("hrbench") or column == "bytes"
    row = dict(ROWS[name])
    if missing == "absent":
        del row[column]
    elif missing == "none":
        row[column] = None
    elif missing == "no file":
        row[column] = "%%%" if encoded else str(tmp_path / "nothing.jpg")
    else:
        data = b"not a picture" if missing == "broken" else RED[:50]
        row[column] = base64.b64encode(data).decode() if encoded else {"bytes": data, "path": None}
    known = IDS.get(name, "reason/monitoring/1")
    with pytest.raises(InputError, match=rf"item (\w+ )?{re.escape(known)}: .*(image|picture)"):
        BENCHMARKS[name].item(row).pictures()


def test_a_picture_from_a_file_and_one_with_transparency(tmp_path):
    (tmp_path / "18.png").write_bytes(encode((255, 0, 0, 0), "RGBA"))
    item = BENCHMARKS["mmvp"].item(ROWS["mmvp"] | {"image": str(tmp_path / "18.png")})
    assert item.pictures()[0].getpixel((0, 0)) == (255, 255, 255)


def test_the_benchmarks_and_their_size():
    sizes = {"mmvp": 300, "vstar": 191, "blink": 697, "hrbench4k": 800, "hrbench8k": 800, "mmerealworld_lite": 1919}
    assert {name: BENCHMARKS[name].total for name in LOADED} == sizes | {"gqa": 12578}
    subsets = {"blink": set(BLINK_COUNTS), "gqa": {"testdev_balanced_instructions"}}
    for name in LOADED:
        benchmark = BENCHMARKS[name]
        assert benchmark.name == name
        assert set(benchmark.counts) == subsets.get(name, {""})
        assert re.fullmatch("[0-9a-f]{40}", benchmark.revision)


def test_blink_has_up_to_four_pictures():
    full = {"image_4": {"bytes": encode("white"), "path": None}}
    assert len(BENCHMARKS["blink"].item(ROWS["blink"] | full).images) == 4
    assert len(BENCHMARKS["blink"].item(ROWS["blink"] | {"image_2": None, "image_3": None}).images) == 1


def test_mmvp_pairs_are_neighbours():
    pairs = [
        BENCHMARKS["mmvp"].item(ROWS["mmvp"] | {"Index": index}).groups["pair"] for index in (1, 2, 3, 4, 299, 300)
    ]
    assert pairs == ["1", "1", "2", "2", "150", "150"]


def test_hrbench_rows_of_one_question():
    def cycle(**changes):
        return BENCHMARKS["hrbench4k"].item(ROWS["hrbench4k"] | {"index": 9} | changes).groups["cycle"]

    assert cycle() == cycle(A="4", B="1", C="2", D="3", answer="C")
    others = [{"question": "Which?"}, {"A": "5"}, {"image": base64.b64encode(encode("blue")).decode()}]
    assert len({cycle(), *(cycle(**other) for other in others)}) == 4


@pytest.mark.parametrize(
    "name, changes, groups",
    [
        ("vstar", {"category": "relative_position"}, {"category": "relative_position"}),
        *[("blink", {"sub_task": name}, {"subset": name}) for name in BLINK_COUNTS],
        ("mmerealworld_lite", {"category": "Perception/Autonomous_Driving"}, {"category": "Perception"}),
        ("mmerealworld_lite", {"category": "perception/monitoring"}, {"category": "Perception"}),
        ("mmerealworld_lite", {"category": "reason/monitoring"}, {"category": "Reasoning"}),
    ],
)
def test_groups(name, changes, groups):
    assert BENCHMARKS[name].item(ROWS[name] | changes).groups == groups


def test_hrbench_categories_have_the_names_of_the_paper():
    for column, name in {"single": "FSP", "cross": "FCP"}.items():
        item = BENCHMARKS["hrbench8k"].item(ROWS["hrbench8k"] | {"category": column})
        assert item.groups["category"] == name


@pytest.mark.parametrize(
    "name, changes, fragment",
    [
        ("mmvp", {"Correct Answer": "(c)"}, r"item mmvp 18: the answer '\(c\)' is no letter of its 2 options"),
        ("mmvp", {"Options": "Open or Closed"}, "item mmvp 18: the options 'Open or Closed' are not"),
        ("vstar", {"label": ""}, "item vstar 7: the answer ''"),
        ("vstar", {"text": "What?"}, "item vstar 7: no line"),
        ("vstar", {"category": "colour"}, "item vstar 7: 'colour' is none of direct_attributes, relative_position"),
        ("blink", {"answer": "hidden"}, "item blink val_Jigsaw_3: the answer 'hidden'"),
        ("blink", {"sub_task": "Art_Style"}, "item blink val_Jigsaw_3: 'Art_Style' is none of Counting"),
        ("hrbench8k", {"image": "%%%"}, "item hrbench8k 5: its image is not base64"),
        ("hrbench8k", {"category": "all"}, "item hrbench8k 5: 'all' is none of single, cross"),
        ("mmerealworld_lite", {"category": "OCR"}, "the category 'OCR' is neither perception nor reasoning"),
    ],
)
def test_rows_that_are_not_of_the_data_set(name, changes, fragment):
    with pytest.raises(InputError, match=fragment):
        BENCHMARKS[name].item(ROWS[name] | changes)


def test_glyphsearch_asks_what_its_data_set_asks():
    benchmark = BENCHMARKS["glyphsearch_answers"]
    rows = benchmark.rows()
    assert len(rows) == benchmark.total
    for index, known in enumerate(glyphsearch_dataset("test", 5)):
        item = benchmark.item(rows[index])
        asked, answered = known["messages"]
        assert item.question + benchmark.instruction == asked["content"][1]["text"]
        assert item.answer == answered["content"][1]["text"]
        assert item.pictures()[0].tobytes() == known["images"][0].tobytes()
