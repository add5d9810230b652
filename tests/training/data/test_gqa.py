"""GQA: every operation of its programs, from the files of the release to the path of a reflection."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS, SHORT_ANSWER
from vreflection_hub_card.rows import FEATURES
from vreflection_training.data.data_report import format_report, report_data
from vreflection_training.data.gqa import gqa_rows, read_scene_graphs
from vreflection_training.data.image_folders import ImageFolders
from vreflection_training.data.sources import load_rows


FILES = Path(__file__).parent / "gqa"
GRAPHS = FILES / "val_sceneGraphs.json"
# By question, the objects on the way to its answer, or why there is none.
PATHS = {
    "select and query": [101],
    "relate object": [102, 103, 104],
    "relate, o": [102, 101],
    "filter": [102, 103],
    "verify attribute": [102],
    "verify rel": [103, 102],
    "verify rel, none": [102],
    "choose rel": [102, 105],
    "choose attribute": [102],
    "choose healthier": [104, 106],
    "exist, and": [103, 104, 102],
    "or, one is missing": [103],
    "same of a set": [103, 104],
    "different of a set": [104, 103],
    "same color": [104, 102],
    "different color": [103, 102],
    "common": [104, 102],
    "scene": "program of scene",
    "scene and object": [102],
    "nothing selected": "empty path",
    "nothing further": [101],
    "back and forth": [102, 101],
    "parentheses and commas": [105],
    "out of order": [103, 102],
    "one box twice": [106],
    "cut to the picture": [107],
    "eight tiles": [*range(110, 118)],
    "nine tiles": "more than 8 boxes",
    "unbalanced": [102],
}
# The boxes by object in the picture of 640 x 480, by hand.
BOXES = {
    101: [0, 0.5, 1, 1],
    102: [0.25, 0.25, 0.5, 0.5],
    103: [0.3, 0.3, 0.4, 0.4],
    104: [0.4, 0.3, 0.5, 0.4],
    105: [0.75, 0.1, 0.85, 0.3],
    106: [0.25, 0.25, 0.5, 0.5],
    107: [0, 0, 0.3, 0.2],
    **{110 + number: [number / 10, 0, (number + 1) / 10, 0.1] for number in range(9)},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def pictures(tmp_path):
    """The pictures, a quarter as large as the scene graphs say."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (160, 120), "red").save(folder / "2370799.jpg")
    Image.new("RGB", (80, 60), "red").save(folder / "n161313.jpg")
    return folder


def source(pictures, **options):
    given = {"format": "gqa", "path": FILES / "val_questions.json", "scene_graphs": GRAPHS, "image_folder": pictures}
    return {name: str(value) if isinstance(value, Path) else value for name, value in (given | options).items()}


def looks(row):
    """The boxes that the answer looks at."""
    *reflections, text = row["messages"][1]["content"]
    assert text["type"] == "text" and len(reflections) <= 1
    return [box for part in reflections for box in part.get("boxes") or [part["box"]]]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_operation_has_the_path_that_was_worked_out_by_hand(pictures, streaming):
    rows = load_rows([source(pictures, balanced=False)], streaming=streaming)
    assert rows.features == FEATURES
    rows = {row["id"].removeprefix("val_questions-"): row for row in rows}
    assert list(rows) == list(PATHS)
    for name, row in rows.items():
        assert row["error"] is None and row["dataset"] == "gqa"
        assert [image["path"] for image in row["images"]] == [str(pictures / "2370799.jpg")]
        if isinstance(PATHS[name], str):
            assert (looks(row), row["no_reflection"]) == ([], PATHS[name]), name
        else:
            assert looks(row) == [pytest.approx(BOXES[number]) for number in PATHS[name]], name
            assert row["no_reflection"] is None


def test_unbalanced_questions_are_left_out_unless_they_are_asked_for(pictures):
    ids = [row["id"] for row in load_rows([source(pictures)])]
    assert ids == [f"val_questions-{name}" for name in PATHS if name != "unbalanced"]


def test_a_short_answer_is_asked_for_as_the_benchmark_asks(pictures):
    short, full = (load_rows([source(pictures, answers=answers)])[0]["messages"] for answers in ("short", "full"))
    said = [[message["content"][-1]["text"] for message in messages] for messages in (short, full)]
    asked = "What is the furniture?\nAnswer the question using a single word or phrase."
    assert said == [[asked, "table"], ["What is the furniture?", "It is a table."]]
    assert looks({"messages": short}) == looks({"messages": full})
    item = BENCHMARKS["gqa"].item(
        {"id": "1", "question": "What is the furniture?", "answer": "table", "image": str(pictures / "2370799.jpg")}
    )
    assert item.question + BENCHMARKS["gqa"].instruction == asked and asked.endswith(SHORT_ANSWER)


def test_more_boxes_than_the_models_steps_are_no_path(pictures):
    rows = {
        row["id"].removeprefix("val_questions-"): row for row in load_rows([source(pictures, num_latent_tokens=9)])
    }
    assert len(looks(rows["nine tiles"])) == 9
    rows = {
        row["id"].removeprefix("val_questions-"): row for row in load_rows([source(pictures, num_latent_tokens=2)])
    }
    assert rows["relate object"]["no_reflection"] == "more than 2 boxes" and looks(rows["relate, o"])


def test_check_counts_the_rows_without_a_reflection_by_kind(pictures, processor):
    rule = {"max_length": None, "max_samples": 4, "long_length": 4096, "lookahead": 256}
    report = report_data(load_rows([source(pictures)]), processor, rule)
    assert report.bad_rows == 0 and report.without_reflection == 3
    assert report.no_reflection == {"program of scene": 1, "empty path": 1, "more than 8 boxes": 1}
    text = " ".join(format_report(report).split())
    assert "without reflection 3 (10.71 %) empty path 1 more than 8 boxes 1 program of scene 1" in text
    assert "program of scene" not in format_report(
        report_data(load_rows([source(pictures)]), processor, rule, reflect=False)
    )


def question(*program, **changes):
    item = json.loads((FILES / "val_questions.json").read_text())["relate, o"]
    program = [dict(zip(("operation", "argument"), step)) for step in program]
    return {**item, **({"semantic": program} if program else {}), **changes}


def read(folder, item, **options):
    path = folder / "questions.json"
    path.write_text(json.dumps({"7": item}))
    (row,) = gqa_rows(path, ImageFolders(folder), read_scene_graphs(GRAPHS), **options)
    return row


@pytest.mark.parametrize(
    "item, problem",
    [
        (question(("select", "bowl (999)")), "'select' names the object 999"),
        (question(("select", "cat (-)"), ("relate", "bowl,on,s (999)")), "'relate' names the object 999"),
        (
            question(("select", "bowl (102)"), ("verify rel", "apple,in,s (102, 999)")),
            "'verify rel' names the object 999",
        ),
        (question(("select", "curtain (108)")), "object 108 lies outside its picture: x, y, w, h (640, 0, 30, 480)"),
        (question(("select", "bowl")), "the argument of 'select' must end with (ids) or (-), got 'bowl'"),
        (question(("select",)), "the argument of 'select' must end with (ids) or (-), got None"),
        (question(("relate", "bowl,on,s")), "the argument of 'relate'"),
        (question(("choose rel", "bowl,on|under,s (1O2)")), "the argument of 'choose rel'"),
        (question(("select", 102)), "needs `operation` and `argument` as texts"),
        (question((None, "bowl (102)")), "needs `operation` and `argument` as texts"),
        (question(semantic=["select: bowl (102)"]), "needs `operation` and `argument` as texts"),
        (question(semantic=None), "`semantic` must be a list of operations, got None"),
        (question(answer=None), "`answer` must be a text, got None"),
        (question(question=" "), "`question` must be a text"),
        (question(imageId=2370799), "`imageId` must be a text, got 2370799"),
        (question(imageId="no picture"), "no picture.jpg: no such file"),
        (question(imageId="no graph"), "the scene graphs hold no picture no graph"),
        (question(isBalanced=None), "`isBalanced` must be true or false, got None"),
    ],
)
def test_what_cannot_be_followed_makes_a_bad_row(pictures, item, problem):
    Image.new("RGB", (8, 8)).save(pictures / "no graph.jpg")
    row = read(pictures, item)
    assert problem in row["error"] and row["messages"] == []


@pytest.mark.parametrize(
    "program, path",
    [
        ([("select", "bowl(102)")], [102]),
        ([("select", "bowl ( 102 , 103 ) ")], [102, 103]),
        ([("select", "apple (103,104)"), ("relate", "_,on,o (104,103,101)")], [103, 104, 101]),
        (
            [("select", "bowl (102)"), ("filter color", "not(red)"), ("filter", "not(7)"), ("verify", "size (large)")],
            [102],
        ),
        ([("select", "bowl (102)"), ("exist",), ("and", None)], [102]),
        ([("select", "bowl (102)"), ("filter set", "the red one (103)")], [102, 103]),
        ([("select", "scene"), ("relate", "bowl,in,s (102)")], [102]),
        ([], []),
    ],
)
def test_other_ways_to_write_an_argument(pictures, program, path):
    row = read(pictures, question(*program, **({} if program else {"semantic": []})))
    assert row["error"] is None
    assert looks(row) == [pytest.approx(BOXES[number]) for number in path]
    assert row["no_reflection"] == (None if path else "empty path")


def test_a_folder_of_questions_is_read_in_order_and_the_pictures_found(pictures, tmp_path):
    questions = json.loads((FILES / "val_questions.json").read_text())
    folder = tmp_path / "train_all_questions"
    folder.mkdir()
    for number, name in enumerate(("scene", "common")):
        (folder / f"train_all_questions_{number}.json").write_text(json.dumps({str(number): questions[name]}))
    shutil.copy(GRAPHS, folder)
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/images").symlink_to(pictures)
    rows = load_rows([source(tmp_path, path=folder)])
    assert [row["id"] for row in rows] == ["train_all_questions_0-0", "train_all_questions_1-1"]
    assert rows[1]["images"][0]["path"] == str(tmp_path / "gqa/images/2370799.jpg")


def test_other_scene_graphs_are_read_anew(pictures, tmp_path):
    graphs = json.loads(GRAPHS.read_text())
    mine = tmp_path / "graphs.json"
    mine.write_text(json.dumps(graphs))
    before = load_rows([source(pictures, scene_graphs=mine)])[0]
    graphs["2370799"]["objects"]["101"]["y"] = 120
    mine.write_text(json.dumps(graphs))
    assert looks(before) == [BOXES[101]] and looks(load_rows([source(pictures, scene_graphs=mine)])[0]) == [
        [0, 0.25, 1, 0.75]
    ]


def test_without_a_size_in_the_graph_the_pictures_header_is_asked(pictures, tmp_path):
    graphs = json.loads(GRAPHS.read_text())
    del graphs["2370799"]["width"]
    (tmp_path / "graphs.json").write_text(json.dumps(graphs))
    (tmp_path / "questions.json").write_text(json.dumps({"7": question(("select", "apple (103)"))}))
    (row,) = gqa_rows(tmp_path / "questions.json", ImageFolders(pictures), read_scene_graphs(tmp_path / "graphs.json"))
    assert "object 103 lies outside its picture" in row["error"]  # whose file has 160 x 120 pixels


@pytest.mark.parametrize("text", ["[]", "{}", '[{"a": {}}]', '{"a": 3}', '{"a": {}', "3", "", '{"a": {"objects": 3}}'])
def test_a_file_that_holds_no_scene_graphs_is_refused(tmp_path, text):
    (tmp_path / "graphs.json").write_text(text)
    with pytest.raises(ValueError, match="graphs.json"):
        read_scene_graphs(tmp_path / "graphs.json")


@pytest.mark.parametrize(
    "options, error, problem",
    [
        ({"balanced": "yes"}, ValueError, "Source 0, gqa: `balanced` must be true or false, got 'yes'"),
        ({"answers": "long"}, ValueError, "`answers` must be 'short' or 'full', got 'long'"),
        ({"num_latent_tokens": 0}, ValueError, "`num_latent_tokens` must be a number from 1 on, got 0"),
        ({"scene_graphs": 3}, ValueError, "`scene_graphs` must be the file"),
        ({"scene_graphs": "gone.json"}, FileNotFoundError, "gone.json"),
        ({"scene_graph": "x"}, ValueError, "Source 0, gqa: .*'scene_graph'"),
        ({"paths": True}, ValueError, "`paths` is for 'visual_cot'"),
        ({"path": str(FILES.parent)}, FileNotFoundError, r"no files \*questions\*.json"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(pictures, options, error, problem):
    with pytest.raises(error, match=problem):
        load_rows([source(pictures, **options)])


def test_the_scene_graphs_must_be_named(pictures):
    given = source(pictures)
    del given["scene_graphs"]
    with pytest.raises(ValueError, match="Source 0, gqa: .*'scene_graphs'"):
        load_rows([given])
