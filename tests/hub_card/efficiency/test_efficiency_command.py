"""`vreflection efficiency` on a checkpoint and on a shape."""

import json
import resource
import signal

import pytest
from tiny_shape import TINY

from vreflection_hub_card.cli import main
from vreflection_hub_card.efficiency.report import render
from vreflection_hub_card.efficiency.shapes import SHAPES
from vreflection_hub_card.evaluation.provenance import sha256


SHORT = ["--repeats", "1", "--text-steps", "1", "--device", "cpu"]


def test_a_checkpoint_beside_the_stock_class(tiny_folder, tmp_path, capsys):
    output = tmp_path / "efficiency.json"
    assert main(["efficiency", str(tiny_folder), "--output", str(output), *SHORT]) == 0
    result = json.loads(output.read_text())
    assert render(result) in capsys.readouterr().out
    assert result["model"]["sha256"] == {"model.safetensors": sha256(tiny_folder / "model.safetensors")}
    assert str(tiny_folder.parent) not in output.read_text()
    assert result["command"] == (
        f"vreflection efficiency {tiny_folder.name} --output efficiency.json --repeats 1 --text-steps 1 --seed 0 --device cpu"
    )
    assert result["machine"]["threads"] == 1 and result["decoding"]["clock"] == "processor time"
    assert [(size, one["same_answers"]) for size, one in result["batches"].items()] == [
        ("1", 32),
        ("8", 32),
        ("32", 32),
    ]


def test_a_shape_with_pictures_of_another_size(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    output = tmp_path / "shape.json"
    assert main(["efficiency", "--shape", "tiny", "--side", "6", "--output", str(output), *SHORT]) == 0
    result = json.loads(output.read_text())
    assert result["decoding"]["image_tokens"] == 36 and result["model"]["shape"]["note"] == TINY.note
    assert "--shape tiny" in result["command"] and "--side 6" in result["command"]


def test_less_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    output = tmp_path / "shape.json"
    asked = ["--attn-implementation", "eager", "--cache-implementation", "dynamic", "--batch-sizes", "2"]
    assert main(["efficiency", "--shape", "tiny", "--output", str(output), *asked, *SHORT]) == 0
    result = json.loads(output.read_text())
    assert list(result["variants"]) == ["sdpa, dynamic cache", "eager, dynamic cache"]
    assert result["not_run"] == {"flash_attention_2": "not asked for", "static cache": "not asked for"}
    assert list(result["batches"]) == ["1", "2"]
    assert " ".join(asked) in result["command"]


def test_weights_that_find_no_room(tmp_path, monkeypatch, capsys):
    """A file may not grow beyond a megabyte; where a disk is full, safetensors says so in an error of the same class."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert main(["efficiency", "--shape", "tiny", "--output", str(tmp_path / "x.json"), *SHORT]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    error = capsys.readouterr().err
    assert "GB of weights can't be written there" in error and "TMPDIR" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_the_command_refuses(tiny_folder, tmp_path, capsys):
    assert main(["efficiency", str(tiny_folder), "--shape", "tiny"]) == 2
    assert "either a model or --shape" in capsys.readouterr().err
    assert main(["efficiency", "--compile", "--cache-implementation", "dynamic"]) == 2
    assert "--compile needs a static cache" in capsys.readouterr().err
    assert main(["efficiency", "--output", str(tmp_path / "no" / "such.json")]) == 2
    assert "can't be written" in capsys.readouterr().err
    assert main(["efficiency", "--device", "no_such"]) == 2
    assert main(["efficiency", str(tiny_folder), "--side", "25", "--output", str(tmp_path / "x.json"), *SHORT]) == 2
    assert "pictures of 25 by 25 merged patches" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["efficiency", "--repeats", "0"])
    assert not list(tmp_path.iterdir())
