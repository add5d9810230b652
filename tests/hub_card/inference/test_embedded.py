"""The checkpoint that comes with the package is a published one: small, without pickles, with today's code."""

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

import modeling_vreflection
import vreflection_hub_card
from vreflection_hub_card import embedded
from vreflection_hub_card.embedded import EMBEDDED, is_embedded
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.inference.checkpoints import checkpoint_folder
from vreflection_training.cli import main


CODE = Path(modeling_vreflection.__file__).parent


@pytest.mark.parametrize("path", sorted(EMBEDDED.glob("*.py")), ids=lambda path: path.name)
def test_its_code_is_the_packages(path):
    assert path.read_text() == (CODE / path.name).read_text()


def test_it_is_complete_small_and_without_pickles():
    files = {path.name: path.stat().st_size for path in EMBEDDED.iterdir()}
    code = {path.name for path in CODE.glob("*_vreflection.py") if "qwen3" not in path.name}
    assert code == {name for name in files if name.endswith(".py")}  # and no other backbone's
    assert sum(files.values()) < 10_000_000
    assert {Path(name).suffix for name in files} <= {".json", ".jinja", ".md", ".py", ".safetensors"}


def test_its_weights_are_bfloat16_and_hold_both_modules():
    with safe_open(EMBEDDED / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {"model.bcm.queries", "model.dac.q_proj.weight"} <= names


def test_its_configs_hold_no_training_and_no_path():
    config, generation = (
        json.loads((EMBEDDED / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert generation["latent_steps"] == config["num_latent_tokens"] == 8
    assert not [key for key in config if "lambda" in key or "loss" in key]
    assert "/" not in json.dumps({key: value for key, value in config.items() if key != "auto_map"})


def test_one_name_is_its_folder_and_a_folder_of_this_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        checkpoint_folder("vreflection_tiny")
        == checkpoint_folder()
        == vreflection_hub_card.checkpoint_folder()
        == EMBEDDED
    )
    assert is_embedded(checkpoint_folder()) and not is_embedded("vreflection_tiny") and not is_embedded(tmp_path)
    with pytest.raises(InputError, match="only a model on the Hub has revisions"):
        checkpoint_folder("vreflection_tiny", "v1")
    (tmp_path / "vreflection_tiny").mkdir()
    assert checkpoint_folder("vreflection_tiny") == Path("vreflection_tiny") and not is_embedded("vreflection_tiny")


@pytest.mark.parametrize(
    "command",
    [
        "ask picture.png Where? --model vreflection_tiny",
        "ask",
        "card vreflection_tiny",
        "publish vreflection_tiny me/it --dry-run",
        "convert vreflection_tiny out",
        "evaluate vreflection_tiny --limit 1",
        "evaluate",
        "train path_tiny --model_name_or_path vreflection_tiny --use_cpu true",
        "check path_tiny --model_name_or_path vreflection_tiny",
    ],
)
def test_a_command_that_is_given_the_name_takes_the_folder(command, monkeypatch, tmp_path, capsys):
    """Seen by what it says of a folder that holds nothing."""
    empty = tmp_path / "installed"
    empty.mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "picture.png")
    monkeypatch.setattr(embedded, "EMBEDDED", empty)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    assert str(empty) in capsys.readouterr().err
