"""Data sets whose pictures lie beside the rows, as copies of their repositories."""

import json

import pytest
from benchmark_files import picture

from vreflection_hub_card.evaluation.benchmarks import BENCHMARKS
from vreflection_hub_card.evaluation.harness.data import load_beside_pictures


@pytest.mark.parametrize("name", ["Index", "lndex"])
def test_mmvp(tmp_path, name):
    (tmp_path / "MMVP Images").mkdir()
    for index in (1, 2):
        picture(index, 28 * index).save(tmp_path / "MMVP Images" / f"{index}.jpg")
    rows = [f"{name},Question,Options,Correct Answer", "1,Open?,(a) Yes (b) No,(a)", "2,Open?,(a) Yes (b) No,(b)"]
    (tmp_path / "Questions.csv").write_text("\n".join(rows) + "\n")
    items = [BENCHMARKS["mmvp"].item(row) for row in load_beside_pictures(BENCHMARKS["mmvp"], tmp_path)]
    assert [(item.id, item.answer, item.pictures()[0].size) for item in items] == [
        ("1", "A", (28, 28)),
        ("2", "B", (56, 56)),
    ]


def test_vstar(tmp_path):
    (tmp_path / "direct_attributes").mkdir()
    picture(1).save(tmp_path / "direct_attributes" / "one.jpg")
    row = {"image": "direct_attributes/one.jpg", "text": "What?\n(A) red\n(B) blue", "category": "direct_attributes"}
    (tmp_path / "test_questions.jsonl").write_text(json.dumps(row | {"label": "B", "question_id": "7"}) + "\n")
    (row,) = load_beside_pictures(BENCHMARKS["vstar"], tmp_path)
    item = BENCHMARKS["vstar"].item(row)
    assert (item.id, item.answer, item.pictures()[0].size) == ("7", "B", (56, 56))
