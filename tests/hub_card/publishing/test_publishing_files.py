"""What is in a published folder, and what must not be in it; no Hub needed."""

import json
import os
import shutil
import socket

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.publishing import upload as publishing
from vreflection_hub_card.publishing.files import find_files
from vreflection_hub_card.publishing.leaks import check_leaks
from vreflection_hub_card.publishing.smoke_test import smoke_test
from vreflection_training.cli import main


TOKEN = "hf_" + "k9" * 17  # made up


def check(folder):
    files = find_files(folder)
    check_leaks(files, folder)
    return files


def test_all_files_are_found(ready):
    assert set(check(ready)) == {str(path.relative_to(ready)) for path in ready.rglob("*") if path.is_file()}


def test_pictures_results_and_a_licence_belong_to_a_checkpoint(checkpoint):
    (checkpoint / "LICENSE").write_text("Apache")
    (checkpoint / ".eval_results").mkdir()
    (checkpoint / ".eval_results" / "glyphsearch.yaml").write_text("[]")
    (checkpoint / "images").mkdir()
    Image.new("RGB", (2, 2)).save(checkpoint / "images" / "look.png")
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "HEAD").write_text("ref")
    with pytest.raises(InputError, match="images/look.png: no part"):
        check(checkpoint)
    with (checkpoint / "README.md").open("a") as card:
        card.write("\n![look](images/look.png)\n")
    assert {"LICENSE", ".eval_results/glyphsearch.yaml", "images/look.png"} < set(check(checkpoint))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("pytorch_model.bin", "pickle"),
        ("extra.pt", "pickle"),
        ("weights.pkl", "pickle"),
        ("training_args.bin", "state of a training run"),
        ("optimizer.pt", "state of a training run"),
        ("scheduler.pt", "state of a training run"),
        ("rng_state.pth", "state of a training run"),
        ("rng_state_3.pth", "state of a training run"),
        ("trainer_state.json", "state of a training run"),
        ("adapter_model.safetensors", "merge"),
        ("notes.txt", "no part"),
        ("train.py", "no part"),
        ("samples/step-3.png", "no part"),
        ("sub/config.json", "no part"),
        (".eval_results/more/deep.yaml", "no part"),
        ("model-00001-of-00002.safetensors", "earlier save"),
    ],
)
def test_other_files_are_refused_by_name(checkpoint, name, reason):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(b"x")
    with pytest.raises(InputError, match=reason) as error:
        check(checkpoint)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_what_a_run_leaves_beside_its_checkpoint_is_passed_over(checkpoint):
    names = set(check(checkpoint))
    (checkpoint / "checkpoint-100").mkdir()
    (checkpoint / "checkpoint-100" / "optimizer.pt").write_bytes(b"x")
    (checkpoint / ".lock").touch()
    (checkpoint / "samples").mkdir()
    (checkpoint / "samples" / "step-250-row-1.png").write_bytes(b"x")
    assert set(check(checkpoint)) == names


@pytest.mark.parametrize("name", ["heatmap.png", "map.png"])
def test_pictures_that_the_card_only_names_are_refused(checkpoint, name):
    """Its snippets name files that `vreflection ask` writes into the working folder."""
    with (checkpoint / "README.md").open("a") as card:
        card.write("\n`vreflection ask --heatmap heatmap.png`\n")
    Image.new("RGB", (2, 2)).save(checkpoint / name)
    with pytest.raises(InputError, match=f"{name}: no part"):
        check(checkpoint)


def test_links_out_of_the_folder_are_refused(checkpoint, tmp_path):
    (tmp_path / "private").write_text("x")
    (checkpoint / "LICENSE").symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match="LICENSE is a link out of the folder"):
        check(checkpoint)


def test_a_download_is_links_into_its_cache(checkpoint, tmp_path):
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "abc"
    shutil.copytree(checkpoint, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert set(check(snapshot)) == set(check(checkpoint))


def test_links_to_nowhere_and_to_folders_are_no_files(checkpoint, tmp_path):
    (checkpoint / "LICENSE").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="LICENSE is no file"):
        check(checkpoint)
    (checkpoint / "LICENSE").unlink()
    (checkpoint / "linked").symlink_to(tmp_path)
    with pytest.raises(InputError, match="linked: no part"):
        check(checkpoint)


def test_shards_are_those_of_the_index(checkpoint):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weights = load_file(checkpoint / "model.safetensors")
    halves = dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])
    for name, half in zip(names, halves):
        save_file(half, checkpoint / name, {"format": "pt"})
    weight_map = {key: name for name, half in zip(names, halves) for key in half}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(InputError, match="00001-of-00002.safetensors, .*left from an earlier save"):
        check(checkpoint)  # of the two, model.safetensors is what is loaded
    (checkpoint / "model.safetensors").unlink()
    assert set(names) < set(check(checkpoint))
    (checkpoint / names[1]).unlink()
    with pytest.raises(InputError, match=f"incomplete or damaged.*{names[1]}"):
        check(checkpoint)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("/home/ann/data", "the local path /home/ann"),
        ("file:///root/run1", "the local path /root/run1"),
        ("/tmp/x1", "the local path /tmp/x1"),
        ("/Users/ann/x", "the local path /Users/ann"),
        ("C:\\Users\\ann", "the local path"),
        (TOKEN, "a secret of this machine"),
    ],
)
@pytest.mark.parametrize("where", ["README.md", "config.json", "model.safetensors", "look.png"])
def test_paths_and_secrets_are_found_and_not_repeated(checkpoint, monkeypatch, text, reason, where):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = checkpoint / where
    if where == "README.md":
        path.write_text(path.read_text() + text)
    elif where == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"note": text}))
    elif where == "model.safetensors":
        save_file(load_file(path), path, {"format": "pt", "note": text})
    else:
        note = PngInfo()
        note.add_text("note", text)
        Image.new("RGB", (2, 2)).save(path, pnginfo=note)
        with (checkpoint / "README.md").open("a") as card:
            card.write(f"\n![]({where})\n")
    with pytest.raises(InputError) as error:
        check(checkpoint)
    assert f"{where} holds {reason}" in str(error.value)
    if "path" not in reason:
        assert text not in str(error.value)


def test_the_own_home_folder_and_secrets_are_found_wherever_they_are(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/ann")
    for name in ("SOME_API_KEYS", "DB_PASSWD", "GITHUB_PAT"):
        monkeypatch.setenv(name, f"abcdefgh12345678{name}")
    card = (checkpoint / "README.md").read_text()
    for leak, reason in (
        ("/srv/people/ann", "the local path"),
        *((f"abcdefgh12345678{name}", "secret") for name in ("SOME_API_KEYS", "DB_PASSWD", "GITHUB_PAT")),
    ):
        (checkpoint / "README.md").write_text(card + leak)
        with pytest.raises(InputError, match=reason):
            check(checkpoint)


@pytest.mark.parametrize("text", ["https://example.org/home/page", "the tokens /home and /tmp/", "hf_hub", "a/tmp/b"])
def test_what_is_no_leak(checkpoint, text):
    with (checkpoint / "README.md").open("a") as card:
        card.write(f"\n{text}\n")
    check(checkpoint)


def test_weights_that_are_none(checkpoint):
    torch.save({"a": torch.ones(1)}, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match="damaged"):
        check(checkpoint)


def break_checkpoint(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "no auto_map":
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    elif how == "code needs the package":
        with (folder / "modeling_vreflection.py").open("a") as code:
            code.write("\nimport vreflection_hub_card\n")
    elif how == "weights missing":
        weights = load_file(folder / "model.safetensors")
        save_file(dict(list(weights.items())[1:]), folder / "model.safetensors", {"format": "pt"})
    elif how == "unknown weights":
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"model.spare": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, reason",
    [
        ("code needs the package", "vreflection_hub_card"),
        ("weights missing", "1 weights are missing, unknown"),
        ("unknown weights", "model.spare first"),
        ("no auto_map", "vreflection"),
        ("no tokenizer", ""),
    ],
)
def test_a_clean_process_refuses(checkpoint, how, reason):
    break_checkpoint(checkpoint, how)
    with pytest.raises(InputError, match="trust_remote_code alone") as error:
        smoke_test(checkpoint)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_dry_run_lists_the_files_and_needs_no_hub(ready, capsys, monkeypatch):
    def no_network(*args):
        raise AssertionError("a dry run opened a connection")

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert main(["publish", str(ready), "ann/tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for path in ready.iterdir():
        assert f"{path.stat().st_size:,}  {path.name}\n" in out
    assert "nothing was uploaded" in out


@pytest.mark.parametrize(
    "repo, options, fragment",
    [
        ("a/b/c", [], "a/b/c"),
        ("ann/tiny", ["--revision", "main"], "'main'"),
        ("ann/tiny", ["--revision", "v 1"], "'v 1'"),
        ("ann/tiny", ["--revision", "../v1"], "'../v1'"),
    ],
)
def test_impossible_names(ready, capsys, repo, options, fragment):
    assert main(["publish", str(ready), repo, "--dry-run", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vreflection: ") and err.count("\n") == 1 and fragment in err


@pytest.mark.parametrize("how", ["nothing", "no card", "stub card", "file"])
def test_folders_that_are_not_fit(checkpoint, capsys, monkeypatch, how):
    monkeypatch.setattr(
        publishing, "smoke_test", lambda *_, **__: pytest.fail("the slow check came before a quick one")
    )
    if how == "nothing":
        shutil.rmtree(checkpoint)
    elif how == "no card":
        (checkpoint / "README.md").unlink()
    elif how == "stub card":
        (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\n[More Information Needed]\n")
    else:
        (checkpoint / "optimizer.pt").write_bytes(os.urandom(9))
    assert main(["publish", str(checkpoint), "ann/tiny", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vreflection: ") and err.count("\n") == 1, err
    assert {"nothing": "config.json", "no card": "README.md", "stub card": "placeholder", "file": "optimizer.pt"}[
        how
    ] in err
