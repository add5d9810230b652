"""The checkpoint that comes with the package is a published one: small, without pickles, with today's code."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import modeling_vreflection
from vreflection_hub_card.inference.checkpoints import EMBEDDED


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
