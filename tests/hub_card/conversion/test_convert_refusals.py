"""What can't be converted is named, exits with 2, and leaves nothing behind."""

import json
import resource
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from filelock import FileLock
from released_checkpoints import FIELDS, WIDTH, edit, save_shards, write
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vreflection_hub_card.inference.checkpoints import EMBEDDED
from vreflection_training.cli import main


DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def source(tmp_path):
    """A checkpoint of the authors' layout in `in`, to be spoilt, and nothing else in the folder."""
    write(tmp_path / "in")
    return tmp_path / "in"


def refuse(source, capsys, *options) -> list[str]:
    """Converts, expects one line of blame after the listed weights, and nothing written; returns the lines of stderr."""
    before = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")}
    assert main(["convert", str(source), str(source.parent / "out"), *options]) == 2
    assert {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")} == before
    *listed, blame = capsys.readouterr().err.splitlines()
    assert blame.startswith("vreflection: ") and not [line for line in listed if line.startswith("vreflection: ")]
    return [*listed, blame]


def all_weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_unknown_missing_and_misshapen_weights_are_all_listed(source, capsys):
    weights = all_weights(source)
    for name in (
        "box_feature_resampler.vision_proj.weight",  # what the authors' modules have for features of another width
        "student_resampler.kv_proj.weight",
        "student_resampler.queries",
        "lvr_head.mlp.0.weight",
        "visualiser.weight",
        "model.bcm.queries",
        "model.layers.9.mlp.up_proj.weight",
    ):
        weights[name] = torch.zeros(WIDTH, WIDTH)
    del weights["student_resampler.output_norm.bias"], weights["model.visual.merger.ln_q.weight"]
    del weights["box_feature_resampler.cross_attn.in_proj_bias"]
    weights["box_feature_resampler.queries"] = torch.zeros(1, 4, WIDTH)
    weights["student_resampler.cross_attn.in_proj_weight"] = torch.zeros(2 * WIDTH, WIDTH)
    save_shards(source, weights, 2)
    *listed, blame = refuse(source, capsys)
    assert sorted(listed) == sorted(
        [
            "box_feature_resampler.vision_proj.weight: unknown, there is no place for it",
            "student_resampler.kv_proj.weight: unknown, there is no place for it",
            "student_resampler.queries: unknown, there is no place for it",
            "lvr_head.mlp.0.weight: unknown, there is no place for it",
            "visualiser.weight: unknown, there is no place for it",
            "model.bcm.queries: the same as box_feature_resampler.queries",
            "model.layers.9.mlp.up_proj.weight: unknown, there is no place for it",
            "model.dac.norm.bias: missing",
            "model.visual.merger.ln_q.weight: missing",
            "model.bcm.q_proj.bias: missing",
            "model.bcm.k_proj.bias: missing",
            "model.bcm.v_proj.bias: missing",
            "box_feature_resampler.queries: of shape [1, 4, 192], and [1, 8, 192] is needed",
            "student_resampler.cross_attn.in_proj_weight: of shape [384, 192], and [576, 192] is needed",
        ]
    )
    assert blame.endswith("14 weights don't fit, nothing was written")


def test_both_ages_of_one_weight(source, capsys):
    weights = all_weights(source)
    weights["visual.merger.ln_q.weight"] = weights["model.visual.merger.ln_q.weight"].clone()
    save_shards(source, weights, 2)
    listed = refuse(source, capsys)
    assert len(listed) == 2 and "visual.merger.ln_q.weight: the same as" in listed[0]


def test_announced_modules_that_are_not_there(source, capsys):
    weights = {
        name: tensor for name, tensor in all_weights(source).items() if not name.startswith("student_resampler.")
    }
    save_shards(source, weights)
    *listed, _ = refuse(source, capsys)
    assert len(listed) == 10 and all(line.startswith("model.dac.") and line.endswith(": missing") for line in listed)
    # What inference needs is all there.
    assert main(["convert", str(source), str(source.parent / "lean"), "--inference-only"]) == 0


def test_modules_without_tokens(tmp_path, capsys):
    write(tmp_path / "in", kind="stock")
    weights = all_weights(tmp_path / "in")
    save_shards(tmp_path / "in", weights | {"box_feature_resampler.queries": torch.zeros(1, 8, WIDTH)})
    assert refuse(tmp_path / "in", capsys)[0] == "box_feature_resampler.queries: unknown, there is no place for it"


def test_a_head_of_its_own_where_config_json_ties_it(source, capsys):
    edit(source, tie_word_embeddings=True)
    assert refuse(source, capsys)[0].startswith("lm_head.weight: config.json ties it")


def spoil_ids(folder):
    edit(folder, lvr_id=7)


def spoil_tokenizer(folder):
    write(folder.parent / "stock", kind="stock")
    for path in folder.glob("tokenizer*"):
        path.write_text((folder.parent / "stock" / path.name).read_text())


def lose_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def spoil_type(folder):
    edit(folder, model_type="llama")


def spoil_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, text_config={**config["text_config"], "vocab_size": 388})


def spoil_width(folder):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, text_config={**config["text_config"], "hidden_size": 190})


def spoil_decoding(folder):
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5}')


def list_instead(folder):
    (folder / "config.json").write_text("[]")


def spoil_json(folder):
    (folder / "config.json").write_text("{")


def spoil_heads(folder):
    edit(folder, num_latent_tokens=0)


def lose_config(folder):
    (folder / "config.json").unlink()


def lose_image_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def lose_a_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_a_shard(folder):
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def point_outside(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def pickle(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")


def adapt(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")


def quantise(folder):
    save_shards(folder, all_weights(folder) | {"model.layers.0.scale": torch.zeros(2, dtype=torch.int8)}, 2)


def store_twice(folder):
    path = folder / "model-00002-of-00003.safetensors"
    first = load_file(folder / "model-00001-of-00003.safetensors")
    save_file(load_file(path) | dict([next(iter(first.items()))]), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_ids, "<|lvr|> is 7 in config.json (lvr_id) and 400 in the tokenizer"),
        (spoil_tokenizer, "the tokenizer has no token <|lvr_start|>"),
        (lose_tokenizer, "<|image_pad|> is 384 in config.json (image_token_id) and None in the tokenizer"),
        (spoil_width, "the configuration is wrong (hidden_size must be divisible by num_heads"),
        (spoil_decoding, "generation_config.json: can't be used (GenerationConfig is invalid: - `temperature`"),
        (list_instead, "can't be read"),
        (spoil_type, "its model type is 'llama', which can't be converted"),
        (spoil_vocabulary, "the id 402, and the embedding has only 388 rows"),
        (spoil_json, "can't be read"),
        (spoil_heads, "`num_latent_tokens` must be at least 1"),
        (lose_config, "it has no config.json"),
        (lose_image_processor, "can't be read"),
        (lose_a_shard, "1 of 3 files with weights aren't there: model-00002-of-00003.safetensors"),
        (cut_a_shard, "model-00003-of-00003.safetensors: damaged or incomplete"),
        (spoil_index, "model.safetensors.index.json: can't be read (it must hold a JSON object, got list)"),
        (point_outside, "names a file outside the folder"),
        (pickle, "Pickled weights (.bin, .pt) are never opened"),
        (adapt, "an adapter; merge it into its base first"),
        (quantise, "model.layers.0.scale is I8, not a float"),
        (store_twice, "is in model-00001-of-00003.safetensors and in model-00002-of-00003.safetensors"),
    ],
)
def test_sources_that_are_none(source, capsys, spoil, message):
    spoil(source)
    lines = refuse(source, capsys)
    assert len(lines) == 1 and message in lines[0], lines


def test_a_folder_of_checkpoints_names_them(source, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# All of them")
    message = refuse_plain(tmp_path, tmp_path.parent / "elsewhere", capsys)
    assert message.endswith("it has no config.json; pass one of the folders in it: in")


def refuse_plain(source, out, capsys, *options) -> str:
    assert main(["convert", str(source), str(out), *options]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_one_of_ours_has_nothing_to_convert(tmp_path, capsys):
    assert "already" in refuse_plain(EMBEDDED, tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()


def test_a_revision_of_a_folder(released, tmp_path, capsys):
    assert "revision 'v1'" in refuse_plain(released, tmp_path / "out", capsys, "--revision", "v1")


def test_an_output_that_is_in_use(released, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert "isn't empty" in refuse_plain(released, tmp_path / "full", capsys)
    assert "a file" in refuse_plain(released, tmp_path / "file", capsys)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with FileLock(tmp_path / ".out.incomplete.lock"):
        assert "another process" in refuse_plain(released, tmp_path / "out", capsys)
    (tmp_path / "out").mkdir()  # empty: taken
    assert main(["convert", str(released), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "out"]
    assert "isn't empty" in refuse_plain(released, tmp_path / "out", capsys)


def test_a_full_disk_leaves_nothing(released, tmp_path, capsys):
    """A limit on the size of files stands for a full disk: writing fails in the same place."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        message = refuse_plain(released, tmp_path / "out", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "can't be written" in message and str(tmp_path / "out") in message
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_seen_before(released, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "vreflection_hub_card.conversion.converter.disk_usage", lambda _: DiskUsage(2**30, 2**30, 2**20)
    )
    assert "0.0 GiB are free" in refuse_plain(released, tmp_path / "out", capsys)
    assert not list(tmp_path.iterdir())


def test_an_output_below_a_file(released, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "can't be written" in refuse_plain(released, tmp_path / "file" / "out", capsys)


KILLED = """
import os, signal, sys
from pathlib import Path
from vreflection_hub_card.conversion import shards
from vreflection_hub_card.conversion.converter import convert

save, written = shards.save_file, []

def die_in_the_second(tensors, path, **kwargs):
    save(tensors, path, **kwargs)
    written.append(path)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

shards.save_file = die_in_the_second
convert(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size="2MB")
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_at_out_and_the_next_run_replaces_the_rest(released, converted, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(released), str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() and (tmp_path / ".out.incomplete").is_dir()
    (tmp_path / ".out.incomplete" / "stale.py").write_text("")
    assert main(["convert", str(released), str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in converted.iterdir()
    }


def test_fields_of_the_authors_are_what_they_are(released):
    """The checkpoint that the tests start from has the four ids of the released training script, in its order."""
    ids = [json.loads((released / "config.json").read_text())[name] for name in FIELDS]
    assert ids == list(range(ids[0], ids[0] + 4)) and ids[-1] == len(AutoTokenizer.from_pretrained(released)) - 1
