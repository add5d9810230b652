"""A damaged checkpoint is refused in one line that names its file, whatever the libraries raise."""

import json
import shutil

import pytest

from vreflection_hub_card.conversion.converter import convert
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.inference.checkpoint_files import check_whole, find_shards
from vreflection_hub_card.inference.checkpoints import EMBEDDED, checkpoint_config, load_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded checkpoint, to be damaged."""
    return shutil.copytree(EMBEDDED, tmp_path / "checkpoint")


JSON = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe{\x00}\x00", b'{"a": "\\ud800"}', b"[" * 9999]
)
def test_a_file_that_is_no_json_object(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: can't be read"):
        check_whole(folder)


def test_weights_that_are_missing_or_cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="model.safetensors: damaged or incomplete"):
        check_whole(folder)
    weights.unlink()
    for content in (
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
    ):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InputError, match="model.safetensors.index.json|aren't there: gone"):
            find_shards(folder)


def test_an_adapter_is_to_be_merged_first(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="vreflection merge"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="vreflection merge"):
        checkpoint_config(folder)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"num_latent_tokens": "eight"}, "num_latent_tokens"),
        ("config.json", {"latent_token_id": 10**6}, "latent_token_id"),
        ("config.json", {"text_config": "x"}, "config.json"),
        ("generation_config.json", {"eos_token_id": "x"}, "checkpoint: "),
        ("generation_config.json", {"suppress_tokens": "x"}, "can't answer a question"),
        ("processor_config.json", {"image_processor": {"patch_size": 7}}, "patch_size"),
    ],
)
def test_values_that_nothing_can_work_with(folder, file, change, message):
    content = json.loads((folder / file).read_text())
    if "image_processor" in change:
        change = {"image_processor": content["image_processor"] | change["image_processor"]}
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=message):
        load_checkpoint(folder, "cpu")


def test_a_template_that_is_none(folder):
    (folder / "chat_template.jinja").write_text("{% for")
    with pytest.raises(InputError, match="chat template"):
        load_checkpoint(folder, "cpu")


def test_code_that_a_checkpoint_carries_never_runs(folder, tmp_path, monkeypatch):
    """Not even where somebody would answer transformers' question with yes."""
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import Qwen2VLImageProcessor as Own\n"
    )
    path = folder / "processor_config.json"
    fields = json.loads(path.read_text())
    fields["image_processor"] |= {"image_processor_type": "Nope", "auto_map": {"AutoImageProcessor": "own.Own"}}
    path.write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    for load in (load_checkpoint, lambda folder: convert(folder, tmp_path / "out", inference_only=True)):
        with pytest.raises(InputError):
            load(folder)
    assert not (tmp_path / "ran").exists()
