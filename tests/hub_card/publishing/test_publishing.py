"""`vreflection publish` and `push_to_hub` against the Hub fixture, over HTTP, with the real client."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.publishing import upload as publishing
from vreflection_hub_card.publishing.files import HashedFile, find_files
from vreflection_hub_card.publishing.upload import Destination, upload
from vreflection_training.cli import main


HERE = Path(__file__).parent
COMMAND = "import sys; from vreflection_training.cli import main; sys.exit(main())"


def run(arguments, environment, folder):
    """Runs Python in an empty folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


def visit(repo_id, revision, environment, folder):
    """What a stranger gets."""
    ran = run([HERE / "stranger.py", repo_id, revision], environment, folder)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def contents(repo, revision="main"):
    return {name: file.content for name, file in repo.commits[repo.find(revision)].items()}


def hashed(folder):
    return {name: HashedFile.read(path) for name, path in find_files(folder).items()}


def on_disk(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writes(server, start=0):
    """Requests that could change something."""
    harmless = ("/api/validate-yaml",)
    return [request for request in server.requests[start:] if request[0] != "GET" and request[1] not in harmless]


@pytest.mark.slow
def test_a_checkpoint_is_published_and_loads(hub_server, hub_environment, ready, tmp_path):
    token = hub_server.add_user("bob")
    ran = run(
        ["-c", COMMAND, "publish", ready, "bob/whole", "--private", "--revision", "v1"],
        hub_environment(token),
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    repo = hub_server.repos["model", "bob/whole"]
    assert repo.private
    assert len(repo.history()) == 2  # the Hub's own first commit, and one for everything
    assert repo.tags == {"v1": repo.head}
    published = contents(repo)
    assert published.pop(".gitattributes")
    assert published == on_disk(ready)
    assert repo.commits[repo.head]["model.safetensors"].lfs
    assert repo.head in ran.stdout and f"{hub_server.url}/bob/whole" in ran.stdout
    assert token not in ran.stdout + ran.stderr
    downloads = [path for method, path in hub_server.requests if method == "GET" and "/resolve/" in path]
    assert f"/bob/whole/resolve/{repo.head}/model.safetensors" in downloads  # it was read back

    seen = visit("bob/whole", "v1", hub_environment(token), tmp_path)
    assert seen["class"] == "VReflectionForConditionalGeneration" and seen["processor"] == "VReflectionProcessor"
    assert seen["latents"] == 8 and seen["text"] == seen["piped"]


@pytest.fixture
def quick(monkeypatch):
    """Skips the two processes that load the checkpoint: these tests are about the Hub."""
    monkeypatch.setattr(publishing, "check_before_publishing", hashed)
    monkeypatch.setattr(publishing, "smoke_test", lambda *arguments, **options: "")


@pytest.fixture
def publish(ready, capsys, quick):
    """Publishes the checkpoint in this process; returns the exit code and the one line of an error."""

    def run(repo, *options, folder=ready):
        code = main(["publish", str(folder), repo, *options])
        err = capsys.readouterr().err
        if code == 0:
            return 0, ""
        lines = [line for line in err.splitlines() if line.startswith("vreflection: ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err, err
        assert os.environ.get("HF_TOKEN", "no token") not in err
        return code, lines[0]

    return run


def test_files_that_are_gone_go_in_the_same_commit(hub, publish, checkpoint):
    repo = hub.add_repo("ann/again")
    old = {name: repo.commits[repo.head][".gitattributes"] for name in (".gitattributes", "model-00001-of-00001.safetensors", "old/x.txt")}  # fmt: skip
    before = repo.commit("main", old)
    assert publish("ann/again", folder=checkpoint) == (0, "")
    assert repo.history()[1] == before
    assert set(contents(repo)) == set(on_disk(checkpoint)) | {".gitattributes"}
    assert set(contents(repo, before)) == set(old)

    head = repo.head
    assert publish("ann/again", "--revision", "v1", folder=checkpoint) == (0, "")
    assert repo.head == head and repo.tags == {"v1": head}  # nothing to commit, only a tag to set
    with (checkpoint / "README.md").open("a") as card:
        card.write("\nMore.\n")
    assert publish("ann/again", "--revision", "v2", folder=checkpoint) == (0, "")
    assert repo.tags == {"v1": head, "v2": repo.head} and repo.history()[1] == head


def test_inference_only_leaves_bcm_and_dac_out(hub, publish, checkpoint, tmp_path):
    with (checkpoint / "README.md").open("a") as card:
        card.write("\nA remark.\n")
    file = checkpoint / "generation_config.json"  # where it decodes by its hidden states
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_feedback": "hidden"}))
    before = on_disk(checkpoint)
    assert publish("ann/light", "--inference-only", folder=checkpoint) == (0, "")
    assert on_disk(checkpoint) == before
    files = contents(hub.repos["model", "ann/light"])
    assert set(files) == set(before) | {".gitattributes"}
    config = json.loads(files["config.json"])
    assert not config["has_bcm"] and not config["has_dac"]
    ours, whole = load(files["model.safetensors"]), load(before["model.safetensors"])
    modules = {name for name in whole if name.startswith(("model.bcm.", "model.dac."))}
    assert modules and set(ours) == set(whole) - modules
    assert all(ours[name].equal(whole[name]) for name in ours)
    assert files["README.md"] != before["README.md"] and b"ann/light" in files["README.md"]


def test_a_name_without_a_namespace_is_ones_own(hub, publish):
    assert publish("alone") == (0, "")
    assert not hub.repos["model", "ann/alone"].private
    assert publish("lab/ours", "--private") == (0, "")
    assert hub.repos["model", "lab/ours"].private


def test_a_tag_that_exists_stops_it_before_anything_is_uploaded(hub, publish):
    repo = hub.add_repo("ann/tagged")
    repo.tags["v1"] = repo.head
    repo.branches["dev"] = repo.head
    start = len(hub.requests)
    for revision in ("v1", "dev"):
        code, line = publish("ann/tagged", "--revision", revision)
        assert code == 2 and f"revision {revision} already" in line
    assert not writes(hub, start)


def test_a_public_repository_does_not_become_private(hub, publish):
    hub.add_repo("ann/public")
    start = len(hub.requests)
    code, line = publish("ann/public", "--private")
    assert code == 2 and "is public" in line and not writes(hub, start)


def test_no_token_wrong_token_no_network(hub, publish, monkeypatch):
    start = len(hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    assert publish("ann/x")[1].endswith("no Hub token: run `hf auth login`, or set HF_TOKEN to one that may write")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 7)
    code, line = publish("ann/x")
    assert code == 2 and "doesn't accept the token" in line and "hf auth login" in line
    assert not writes(hub, start)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)
        code, line = publish("ann/x")
    assert code == 2 and f"the Hub at {nobody} can't be reached" in line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in publish("ann/x")[1]


def test_namespaces_that_are_not_ones_own(hub, publish):
    code, line = publish("nobody/x")
    assert code == 2 and "may not write there" in line and ("model", "nobody/x") not in hub.repos
    repo = hub.add_repo("carl/theirs")
    head = repo.head
    code, line = publish("carl/theirs")
    assert code == 2 and "may not write there" in line and repo.head == head
    hub.add_repo("carl/secret", private=True)
    assert "may not write there" in publish("carl/secret")[1]
    hub.fail("POST /api/repos/create", 404)
    assert "no such namespace" in publish("ann/x")[1]


@pytest.mark.parametrize("route", ["/preupload/", "/objects/batch", "^PUT /lfs/", "/lfs/verify"])
def test_the_client_repeats_what_failed_once(hub, quick, checkpoint, route):
    name = "ann/retry"
    repo = hub.add_repo(name)
    hub.blobs.clear()
    hub.fail(route, 503)
    commit = upload(hashed(checkpoint), Destination(name), HfApi())
    assert repo.head == commit and set(contents(repo)) == set(on_disk(checkpoint)) | {".gitattributes"}
    assert not hub.faults[-1]["times"]


def test_a_connection_that_is_cut_is_taken_up_again(hub, quick, checkpoint):
    repo = hub.add_repo("ann/cut")
    hub.blobs.clear()
    hub.cut_upload(after=2**20)
    commit = upload(hashed(checkpoint), Destination("ann/cut"), HfApi())
    assert contents(repo, commit)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert not hub.faults[-1]["times"]


@pytest.mark.parametrize(
    "route, status, said",
    [
        ("whoami", 500, "fails with 500"),
        ("/commit/", 500, "fails with 500"),
        ("^PUT /lfs/", 507, "fails with 507"),  # the client repeats no such error, and wraps it
        ("validate-yaml", 502, "fails with 502"),
    ],
)
def test_a_hub_that_fails_leaves_the_old_revision(hub, publish, route, status, said):
    repo = hub.add_repo("ann/old")
    head = repo.head
    hub.blobs.clear()
    hub.fail(route, status, page=b"<html>Bad gateway</html>" if status == 502 else None)
    code, line = publish("ann/old", "--revision", "v1")
    assert code == 2 and said in line and "nothing was changed" in line
    assert repo.head == head and not repo.tags
    assert publish("ann/old", "--revision", "v1") == (0, "")
    assert repo.history()[1] == head and repo.tags == {"v1": repo.head}


def test_a_repository_that_is_not_made(hub, publish):
    hub.fail("POST /api/repos/create", 500)
    code, line = publish("ann/unmade")
    assert code == 2 and "fails with 500" in line and "nothing was changed" in line
    assert ("model", "ann/unmade") not in hub.repos


def test_a_failure_after_the_commit_can_be_repeated(hub, publish, monkeypatch):
    repo = hub.add_repo("ann/late")
    hub.fail("/tag/", 500)
    code, line = publish("ann/late", "--revision", "v1")
    assert code == 2 and "uploaded, and not tagged" in line
    head = repo.head
    assert publish("ann/late", "--revision", "v1") == (0, "")
    assert repo.head == head and repo.tags == {"v1": head}

    def fails(*arguments, **options):
        raise InputError("it can't be used")

    monkeypatch.setattr(publishing, "smoke_test", fails)
    code, line = publish("ann/late", "--revision", "v2")
    assert code == 2 and head in line and "it has no tag" in line and "v2" not in repo.tags


def test_somebody_elses_commit_is_not_lost(hub, publish, monkeypatch):
    repo = hub.add_repo("ann/shared")

    class SlowApi(HfApi):  # between its look at the repository and its commit, somebody pushes
        def create_commit(self, *arguments, **options):
            repo.commit("main", dict(repo.commits[repo.head]))
            return super().create_commit(*arguments, **options)

    monkeypatch.setattr("huggingface_hub.HfApi", SlowApi)
    code, line = publish("ann/shared")
    assert code == 2 and "somebody else has committed" in line
    assert set(contents(repo)) == {".gitattributes"} and len(repo.history()) == 2


def test_private_repositories_are_for_their_owners(hub):
    hub.add_repo("ann/mine", private=True)
    assert HfApi().list_repo_files("ann/mine") == [".gitattributes"]
    for token in (False, hub.add_user("eve")):
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info("ann/mine", token=token)
        with pytest.raises(RepositoryNotFoundError):
            HfApi().list_repo_files("ann/mine", token=token)


UPLOAD = """\
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may have been told to ignore
from pathlib import Path
from huggingface_hub import HfApi
from vreflection_hub_card.publishing.files import HashedFile, find_files
from vreflection_hub_card.publishing.upload import Destination, upload
files = {name: HashedFile.read(path) for name, path in find_files(Path(sys.argv[1])).items()}
upload(files, Destination(sys.argv[2]), HfApi())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_upload_that_is_killed_can_be_repeated(hub, quick, hub_environment, checkpoint, tmp_path, how):
    name = f"ann/killed-{how}"
    repo = hub.add_repo(name)
    head = repo.head
    hub.blobs.clear()
    reached, go_on = hub.hold_upload()
    environment = hub_environment(os.environ["HF_TOKEN"])
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, str(checkpoint), name],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert reached.wait(120)
        process.send_signal(how)
        assert process.wait(60) != 0
    finally:
        process.kill()
        go_on.set()
    assert repo.head == head and not hub.blobs
    commit = upload(hashed(checkpoint), Destination(name), HfApi())
    assert repo.head == commit and repo.history() == [commit, head]
    assert contents(repo)["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
