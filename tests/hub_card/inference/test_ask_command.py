"""`vreflection ask`, as it is typed."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from vreflection_hub_card.glyphsearch import draw_chain, make_scene, scene_seed
from vreflection_hub_card.glyphsearch.likeness import NOTE
from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import main


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ask(tiny_folder):
    """Asks the stand-in, briefly."""
    return lambda *arguments: main(
        ["ask", *map(str, arguments), "--model", str(tiny_folder), "--max-new-tokens", "12"]
    )


def fails(capsys, code, *fragments):
    """Whether the command ended as a mistake of the user should: code 2 and one line."""
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("vreflection: ") and err.count("\n") == 1, err
    assert "Traceback" not in err and out == ""
    for fragment in fragments:
        assert fragment in err


def test_the_answer_and_its_looks_are_printed(ask, picture_file, capsys, tmp_path):
    assert ask(picture_file, "Which glyph?", "--reflect") == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("Where it looked, by DAC's"))
    assert header >= 1
    assert ask(picture_file, "Which glyph?", "--reflect", "--json") == 0
    result = json.loads(capsys.readouterr().out)  # nothing else is printed
    assert result["question"] == "Which glyph?" and result["latent_steps"] == 8 and result["source"] == "dac"
    assert result["answer"] == "\n".join(lines[:header])
    assert [step for look in result["looks"] for step in look["steps"]] == list(range(1, 9))
    width, height = Image.open(picture_file).size
    for line, look in zip(lines[header + 2 :], result["looks"], strict=True):
        number, steps, *corners, inside, _, outside, _ = line.replace(",", "").split()
        assert int(number) == look["look"] and steps.split("-")[-1] == str(look["steps"][-1])
        expected = [corner * side for corner, side in zip(look["box"], (width, height) * 2)]
        assert [int(corner) for corner in corners] == pytest.approx(expected, abs=0.5)
        assert int(inside) / 100 == pytest.approx(look["inside"], abs=0.006) and int(inside) + int(outside) == 100
    assert list(tmp_path.iterdir()) == []
    assert ask(picture_file, "Which glyph?", "--no-reflect", "--json") == 0
    assert json.loads(capsys.readouterr().out)["looks"] == []


@pytest.mark.parametrize("more", [("--per-step",), ("--source", "llm"), ("--latent-steps", 3), ("--latent-feedback", "dac")])  # fmt: skip
def test_heatmaps(ask, picture_file, capsys, tmp_path, more):
    assert ask(picture_file, "Which glyph?", "--reflect", "--heatmap", "out.png", *more) == 0
    picture = Image.open(tmp_path / "out.png")
    assert min(picture.size) > 300
    assert len(picture.convert("L").getcolors()) > 50
    assert "out.png" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1, 1), (8000, 1000), (8000, 40), (3, 500)])
def test_odd_sizes(ask, tmp_path, size):
    Image.new("RGB", size, "red").save("odd.png")
    assert ask("odd.png", "Which glyph?", "--reflect", "--heatmap", "out.png") == 0
    assert Image.open(tmp_path / "out.png").width > 300


def test_a_heatmap_without_reflection_is_not_drawn(ask, picture_file, capsys, tmp_path):
    assert ask(picture_file, "Which glyph?", "--no-reflect", "--heatmap", "out.png") == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "without a reflection" in err and "--reflect" in err
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_a_scene_is_drawn(ask, capsys, tmp_path):
    assert ask("--seed", 5, "--reflect") == 0
    out = capsys.readouterr().out
    assert "--seed 5" in out and "Which glyph" in out and "scene.png" in out and "heatmap.png" in out
    assert "(right)" in out or "(wrong, it is " in out
    drawn = Image.open(tmp_path / "scene.png").convert("RGB")
    assert drawn.tobytes() == make_scene(scene_seed("test", 5), "chains").image.tobytes()
    assert Image.open(tmp_path / "heatmap.png").width > 300


def test_every_fresh_scene_is_another_one(ask, capsys):
    ask()
    first = capsys.readouterr().out.splitlines()[0]
    ask()
    assert capsys.readouterr().out.splitlines()[0] != first


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["PICTURE"], "question is missing"),
        (["PICTURE", "  "], "question is missing"),
        (["missing.png", "Where?"], "missing.png: no such file"),
        ([".", "Where?"], "is a folder"),
        (["text.png", "Where?"], "not a picture"),
        (["cut.png", "Where?"], "damaged"),
        (["long.png", "Where?"], "pixels"),
        (["PICTURE", "Where?", "--seed", "1"], "--seed"),
        (["PICTURE", "Where?", "--per-step"], "--heatmap"),
        (["PICTURE", "Where?", "--heatmap", "nowhere/out.png"], "can't be written"),
        (["PICTURE", "Where?", "--heatmap", "out.docx"], "must end in"),
        (["PICTURE", "Where?", "--heatmap", "folder.png"], "can't be written"),
        (["PICTURE", "Where?", "--reflect", "--heatmap", "full.png"], "full.png: can't be written (No space left"),
        (["PICTURE", "Where?", "--reflect", "--latent-steps", "0"], "contradict"),
        (["PICTURE", "Where?", "--reflect", "--latent-steps", "20"], "max_new_tokens"),
        (["PICTURE", "Where?", "--device", "abacus"], "abacus"),
        (["--seed", str(2**50)], "--seed"),
    ],
)
def test_mistakes(ask, picture_file, capsys, tmp_path, arguments, fragment):
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "cut.png").write_bytes(picture_file.read_bytes()[:700])
    Image.new("RGB", (3000, 10)).save(tmp_path / "long.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "full.png").symlink_to("/dev/full")
    code = ask(*(picture_file if argument == "PICTURE" else argument for argument in arguments))
    out = capsys.readouterr()
    assert code == 2
    assert out.err.startswith("vreflection: ") and out.err.count("\n") == 1, out.err
    assert fragment in out.err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("arguments", [["--latent-steps", "-1"], ["--max-new-tokens", "0"], ["--latent-feedback", "x"], ["--source", "x"], ["--latent-steps", "many"]])  # fmt: skip
def test_impossible_values_are_refused_by_the_parser(picture_file, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(["ask", str(picture_file), "Where?", *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def broken(folder, tiny_folder, how):
    """A copy of the stand-in with something wrong."""
    shutil.copytree(tiny_folder, folder)
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no json":
        (folder / "config.json").write_text("{")
    elif how == "wrong config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"query_position": "sideways"}))
    elif how == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["intermediate_size"] //= 2
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "processor is no json":
        (folder / "processor_config.json").write_text("{")


@pytest.mark.parametrize("how", ["no config", "config is no json", "wrong config", "other sizes", "no weights", "cut weights", "no tokenizer", "processor is no json"])  # fmt: skip
def test_broken_checkpoints(tiny_folder, picture_file, capsys, tmp_path, how):
    broken(tmp_path / "broken", tiny_folder, how)
    fails(capsys, main(["ask", str(picture_file), "Where?", "--model", "broken"]), "broken")


def test_folders_that_are_no_checkpoint(backbone, picture_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model, fragment in (
        (tmp_path, "no config.json"),
        (backbone, "qwen2_5_vl"),
        (picture_file, "not a checkpoint"),
        ("nobody/nothing", "nobody/nothing"),
        ("not/an/id", "no such folder"),
    ):
        fails(capsys, main(["ask", str(picture_file), "Where?", "--model", str(model)]), fragment)


def test_a_folder_that_may_not_be_read(ask, picture_file, capsys, monkeypatch):
    def forbid(folder):
        raise PermissionError(13, "Permission denied", "locked")

    monkeypatch.setattr(
        "vreflection_hub_card.inference.checkpoints.checkpoint_folder", forbid
    )  # as root nothing is unreadable
    fails(capsys, ask(picture_file, "Where?"), "locked: Permission denied")


def test_dac_is_demanded_of_a_checkpoint_without_it(no_dac_folder, picture_file, capsys):
    arguments = ["ask", str(picture_file), "Where?", "--model", str(no_dac_folder), "--heatmap", "out.png"]
    fails(capsys, main([*arguments, "--source", "dac"]), "no DAC")


def test_dac_feedback_is_demanded_of_a_checkpoint_without_it(no_dac_folder, picture_file, capsys):
    arguments = ["ask", str(picture_file), "Where?", "--model", str(no_dac_folder), "--latent-feedback", "dac"]
    fails(capsys, main(arguments), "DAC")


def test_a_checkpoint_without_dac_shows_the_llms_attention(no_dac_folder, picture_file, capsys, tmp_path):
    arguments = ["--model", str(no_dac_folder), "--reflect", "--heatmap", "out.png", "--max-new-tokens", "12"]
    assert main(["ask", str(picture_file), "Where?", *arguments]) == 0
    assert (tmp_path / "out.png").exists()
    assert "by the LLM's attention" in capsys.readouterr().out


def test_no_remote_code_runs(tiny_folder, picture_file, tmp_path):
    shutil.copytree(tiny_folder, "hostile")
    for file in (tmp_path / "hostile").glob("*.py"):
        file.write_text("raise SystemExit('remote code ran')")
    assert main(["ask", str(picture_file), "Where?", "--model", "hostile", "--max-new-tokens", "2"]) == 0


def test_randomness_is_left_alone(ask, picture_file):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ask(picture_file, "Where?", "--reflect", "--heatmap", "out.png")
    assert torch.rand(1) == expected


def test_the_embedded_checkpoint_answers_and_looks(capsys, tmp_path):
    assert EMBEDDED.is_dir(), f"the embedded checkpoint is missing: {EMBEDDED}"
    assert main(["ask", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert out.count("the shape ") == 2 and "(right)" in out  # a chain of two hops
    looks = [line.replace(",", "").split() for line in out.splitlines() if line.endswith("%")]
    assert [look[1] for look in looks] == ["1", "2", "3-8"]  # at the shapes of the chain, in their order
    for look, shape in zip(looks, draw_chain("test", 7)[1].path, strict=True):
        x0, y0, x1, y1 = (int(corner) / 168 for corner in look[2:6])
        assert shape.box[0] <= (x0 + x1) / 2 <= shape.box[2] and shape.box[1] <= (y0 + y1) / 2 <= shape.box[3]
    assert (tmp_path / "heatmap.png").exists(), "it answered without a reflection"
    assert main(["evaluate", "--limit", "50", "--split", "validation"]) == 0
    result = json.loads((tmp_path / "glyphsearch.json").read_text())["tasks"]["glyphsearch"]
    assert result["accuracy"]["overall"]["share"] >= 0.95
    for replaced in ("zeroed", "noise", "shuffled"):
        assert result["interventions"][replaced]["accuracy"]["overall"]["share"] <= 0.5
    assert result["reflection_rate"]["share"] >= 0.95


def test_a_picture_unlike_a_scene_gets_a_note_beside_the_embedded_models_answer(ask, picture_file, capsys):
    make_scene(3).image.save("drawn.png")
    Image.new("RGB", (90, 60), "white").save("white.png")
    short = ["--max-new-tokens", "2", "--no-reflect"]
    for model, picture, noted in (("vreflection_tiny", "drawn.png", False), (str(EMBEDDED), "white.png", True)):
        assert main(["ask", picture, "Which glyph?", "--model", model, *short]) == 0
        assert (NOTE in capsys.readouterr().out.splitlines()) == noted
    assert main(["ask", "white.png", "Which glyph?", "--json", *short]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == NOTE
    ask("white.png", "Which glyph?", "--json")
    assert json.loads(capsys.readouterr().out)["note"] is None
