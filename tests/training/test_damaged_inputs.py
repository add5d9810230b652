"""Damaged recipes and data files are named with their line or key."""

import gzip
import json
import os

import pytest

from modeling_vreflection.pictures_vreflection import PictureError, open_picture
from vreflection_hub_card.errors import InputError
from vreflection_training.data.json_files import read_json_rows
from vreflection_training.data.sources import load_rows
from vreflection_training.recipe import check_reporting, parse


GOOD = (
    "from_scratch: qwen2_5_vl\ndataset_name: glyphsearch\nmax_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("\tseed: 3", "line 7"),
        ("max_steps: 2", "line 7: the key 'max_steps' comes twice"),
        ("seed: null", "`seed` must be a whole number, got None"),
        ("learning_rate: [1]", "`learning_rate` must be a number"),
        ("logging_steps: abc", "`logging_steps`"),
        ("stage: 7", "`stage`"),
        ("sedd: 3", "no setting 'sedd'"),
        ("train_sampling_strategy: group_by_length", "train_sampling_strategy"),
    ],
)
def test_a_wrong_recipe(tmp_path, more, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + more + "\n")
    with pytest.raises(InputError) as caught:
        parse([str(path), "--output_dir", str(tmp_path)])
    assert "recipe.yaml" in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("content", [b"- a", b"", b"caf\xe9: 1", "a: 1".encode("utf-16")])
def test_a_recipe_that_is_no_mapping_of_text(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match="recipe.yaml"):
        parse([str(tmp_path / "recipe.yaml")])


@pytest.mark.parametrize("line", [b'{"question": "\xff"}', b'{"question": "\\ud800"}', b"{", b"[" * 99999])
def test_one_bad_line_is_named_and_the_others_are_read(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a"}\n' + line + b'\n{"question": "b"}\n')
    first, bad, last = read_json_rows(path)
    assert (first, last) == ({"question": "a"}, {"question": "b"}) and f"{path}, line 2" in str(bad)


def test_a_file_of_another_encoding_and_a_compressed_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"question": "a"}\n'.encode("utf-16"))
    with pytest.raises(InputError, match="rows.jsonl is no UTF-8"):
        list(read_json_rows(path))
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(json.dumps([{"question": "a"}]).encode()))
    assert list(read_json_rows(path)) == [{"question": "a"}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="rows.json.gz"):
        list(read_json_rows(path))


def test_reports_that_nobody_can_take():
    with pytest.raises(InputError, match="nowhere"):
        check_reporting(["nowhere"])


@pytest.mark.parametrize("path", ["pipe.jsonl", "/dev/zero"])
@pytest.mark.parametrize("form", ["messages", "visual_cot"])
def test_what_never_ends_is_not_read(tmp_path, path, form):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="a pipe or a device"):
        load_rows([{"path": str(tmp_path / path), "format": form}])
    with pytest.raises(PictureError, match="a pipe or a device"):
        open_picture(str(tmp_path / path))
