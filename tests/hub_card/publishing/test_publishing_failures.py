"""Publishing where the Hub hangs, loses its replies or sends false ones, and where files change meanwhile."""

import os
import time

import pytest
from huggingface_hub import HfApi
from test_publishing import contents, hashed, on_disk

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.publishing import upload as publishing
from vreflection_hub_card.publishing.smoke_test import smoke_test
from vreflection_hub_card.publishing.upload import Destination, upload
from vreflection_training.cli import main


WEIGHTS = "model.safetensors"
NONSENSE = [(b"<html>gateway</html>", 200), ({}, 200), ([], 200), (b"", 502), (b"null", 200)]


@pytest.fixture
def publish(checkpoint, capsys, monkeypatch):
    """Publishes a checkpoint in this process, without the smoke tests; returns the exit code, stdout and an error's line."""
    monkeypatch.setattr(publishing, "check_before_publishing", hashed)
    monkeypatch.setattr(publishing, "smoke_test", lambda *arguments, **options: "")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")

    def run(repo, *options):
        code = main(["publish", str(checkpoint), repo, *options])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("vreflection: ")]
        assert len(lines) == (code != 0) and "Traceback" not in err, err
        assert os.environ["HF_TOKEN"] not in out + err
        return code, out, "".join(lines)

    return run


def is_published(repo, checkpoint, commit=None):
    files = contents(repo, commit or repo.head)
    files.pop(".gitattributes", None)
    return files == on_disk(checkpoint)


# Files that change.


def spoil(path, how):
    """Changes a file; the size stays, and where it says so, the time, too."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "truncated":
        with path.open("r+b") as file:
            file.truncate(len(content) // 2)
    elif how == "replaced":
        new = path.with_name("new")
        new.write_bytes(content)
        new.replace(path)
    elif how == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.write(content)
    if how == "same time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name, how", [(WEIGHTS, "same time"), (WEIGHTS, "truncated"), ("config.json", "same time"), ("config.json", "gone")])  # fmt: skip
def test_a_file_that_changed_after_its_check_is_not_sent(hub, publish, checkpoint, monkeypatch, name, how):
    def check(folder):
        files = hashed(folder)
        spoil(folder / name, how)
        return files

    monkeypatch.setattr(publishing, "check_before_publishing", check)
    repo = hub.add_repo("ann/changed")
    head = repo.head
    code, out, line = publish("ann/changed")
    assert code == 2 and name in line and "changed since" in line and "Uploaded" not in out
    assert repo.head == head


def test_large_files_are_hashed_as_they_are_sent(hub, publish, checkpoint, monkeypatch):
    # As the test above, with weights too large to be read into memory, which these would be.
    monkeypatch.setattr(publishing, "SMALL", 10)

    def check(folder):
        files = hashed(folder)
        spoil(folder / WEIGHTS, "same time")
        return files

    monkeypatch.setattr(publishing, "check_before_publishing", check)
    repo = hub.add_repo("ann/large")
    head = repo.head
    code, _, line = publish("ann/large")
    assert code == 2 and f"{WEIGHTS} has changed" in line and repo.head == head


@pytest.mark.parametrize("how", ["truncated", "replaced", "in place"])
def test_a_file_that_changes_during_its_upload_is_not_committed(hub, publish, checkpoint, monkeypatch, how):
    monkeypatch.setattr(publishing, "SMALL", 10)
    hub.blobs.clear()
    repo = hub.add_repo("ann/during")
    head = repo.head
    hub.during_upload(lambda: spoil(checkpoint / WEIGHTS, how))
    code, _, line = publish("ann/during")
    assert code == 2 and f"{WEIGHTS} has changed" in line and repo.head == head


def test_files_that_changed_during_their_checks(checkpoint, monkeypatch):
    monkeypatch.setattr(publishing, "smoke_test", lambda folder, **_: spoil(folder / "config.json", "in place"))
    with pytest.raises(InputError, match="config.json has changed"):
        publishing.check_before_publishing(checkpoint)


# A Hub that hangs.


@pytest.mark.parametrize("route", ["whoami", "POST /api/repos/create", "validate-yaml", "/commit/", "GET .*/refs"])
def test_a_hub_that_never_answers_ends_with_one_line(hub, publish, route):
    if "refs" in route:
        hub.add_repo("ann/hangs")
    hub.stall(route, times=9)
    start = time.monotonic()
    code, _, line = publish("ann/hangs", "--revision", "v1")
    assert time.monotonic() - start < 20
    if route == "POST /api/repos/create":  # the Hub made it, and only then fell silent
        assert code == 0
    elif route == "/commit/":
        assert code == 0 and hub.repos["model", "ann/hangs"].tags
    else:
        assert code == 2 and "stopped answering" in line and "nothing was changed" in line


def test_a_hub_that_stops_in_the_middle_of_an_upload(hub, publish, checkpoint):
    hub.blobs.clear()
    hub.stall_upload()
    assert publish("ann/middle")[0] == 0  # the client gives up after a second, and tries again
    assert is_published(hub.repos["model", "ann/middle"], checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["GET /api/models/.*/tree/", "GET .*/resolve/.*/model.safetensors"])
def test_a_read_back_that_hangs_ends_with_one_line(hub, checkpoint, monkeypatch, route):
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    commit = upload(hashed(checkpoint), Destination("ann/readback"), HfApi())
    hub.stall(route, after=1000 if "resolve" in route else 0, times=99)
    with pytest.raises(InputError) as error:
        smoke_test("ann/readback", commit, seconds=120)
    assert "more than 120 s" not in str(error.value) and "\n" not in str(error.value)


def test_a_smoke_test_that_takes_too_long(checkpoint):
    with pytest.raises(InputError, match="more than 1 s"):
        smoke_test(checkpoint, seconds=1)


# Replies that are lost, or say what isn't so.


@pytest.mark.parametrize("route", ["POST /api/repos/create", "/commit/", "POST .*/tag/"])
@pytest.mark.parametrize("reply", [None, *NONSENSE], ids=str)
def test_what_was_done_counts_and_not_the_reply(hub, publish, checkpoint, route, reply):
    if reply is None:
        hub.lose_reply(route)
    else:
        hub.forge_reply(route, *reply)
    code, out, _ = publish("ann/lost", "--revision", "v1")
    repo = hub.repos["model", "ann/lost"]
    assert code == 0 and is_published(repo, checkpoint) and repo.tags == {"v1": repo.head}
    assert len(repo.history()) == 2 and "Tagged: v1." in out


def test_a_commit_that_is_lost_is_not_nothing_where_nobody_can_look(hub, publish):
    repo = hub.add_repo("ann/unknown")
    hub.lose_reply("/commit/")
    hub.fail("GET /api/models/ann/unknown/tree/", 403, times=9, skip=1)  # the look before the commit succeeds
    code, _, line = publish("ann/unknown")
    assert code == 2 and len(repo.history()) == 2
    assert "nothing was changed" not in line and "can't be found out" in line and "/commits/main" in line


def test_a_lost_reply_to_somebody_elses_commit(hub, publish):
    repo = hub.add_repo("ann/theirs")

    def push():
        repo.commit("main", dict(repo.commits[repo.head]))
        return False

    hub.before("/commit/", push)
    code, _, line = publish("ann/theirs")
    assert code == 2 and "somebody else has committed" in line and repo.head in line


def test_a_commit_that_never_came(hub, publish):
    repo = hub.add_repo("ann/never")
    head = repo.head
    hub.before("/commit/", lambda: False)  # replies `{}`
    code, _, line = publish("ann/never")
    assert code == 2 and repo.head == head and "has no new commit" in line


def test_a_commit_that_is_only_said(hub, publish):
    hub.add_repo("ann/said")
    hub.before("/commit/", lambda: False)
    hub.forge_reply("/commit/", {"commitOid": "0" * 40, "commitUrl": f"{hub.url}/ann/said/commit/0"})
    code, out, line = publish("ann/said", "--revision", "v1")
    assert code == 2 and "0" * 40 in line and "not read back" in line and "Tagged" not in out


def test_a_parent_that_is_not_named(hub, publish):
    repo = hub.add_repo("ann/orphan")
    hub.forge_reply("GET /api/models/ann/orphan/revision/main", {"id": "ann/orphan", "private": False})
    code, _, line = publish("ann/orphan")
    assert code == 2 and "names no commit" in line and len(repo.history()) == 1  # it would commit over anybody's


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_tag_that_is_only_said(hub, publish, elsewhere):
    repo = hub.add_repo("ann/tagged")
    first = repo.head

    def tag():
        if elsewhere:
            repo.tags["v1"] = first
        return False

    hub.before("POST .*/tag/", tag)
    code, out, line = publish("ann/tagged", "--revision", "v1")
    assert code == 2 and "Tagged" not in out and f"{repo.head} is uploaded, and not tagged" in line
    assert (f"v1 is at {first}" if elsewhere else "no such tag") in line


def test_a_tag_that_cannot_be_seen(hub, publish):
    hub.add_repo("ann/unseen")
    hub.fail("GET .*/refs", 500, times=9, skip=1)
    code, out, line = publish("ann/unseen", "--revision", "v1")
    assert code == 2 and "Tagged" not in out and "can't be found out" in line


def test_a_private_repository_that_was_made_public(hub, publish):
    hub.before("POST /api/repos/create", lambda: hub.add_repo("ann/open"))
    code, _, line = publish("ann/open", "--private")
    assert code == 2 and "ann/open is public" in line and "nothing was uploaded" in line
    assert set(contents(hub.repos["model", "ann/open"])) == {".gitattributes"}


# What lies on the Hub.


@pytest.mark.parametrize("how", ["large", "small", "missing", "more"])
def test_the_hub_has_what_was_checked(hub, publish, how):
    repo = hub.add_repo("ann/kept")

    def damage():
        files = repo.commits[repo.head]
        if how == "large":
            files[WEIGHTS].content += b"x"
        elif how == "small":
            files["config.json"].content += b" "
        elif how == "missing":
            del files["config.json"]
        else:
            files["more.py"] = files["config.json"]

    hub.after("/commit/", damage)
    code, out, line = publish("ann/kept", "--revision", "v1")
    name = {"large": WEIGHTS, "more": "more.py"}.get(how, "config.json")
    assert code == 2 and name in line and repo.head in line and "no tag" in line and not repo.tags


@pytest.mark.slow
def test_other_bytes_than_the_hash_says(hub, checkpoint):
    files = hashed(checkpoint)
    commit = upload(files, Destination("ann/bytes"), HfApi())
    sha256s = {name: file.sha256 for name, file in files.items()}
    with pytest.raises(InputError, match=f"sends another {WEIGHTS}"):
        smoke_test("ann/bytes", commit, sha256s=sha256s | {WEIGHTS: "0" * 64})


@pytest.mark.parametrize(
    "route, status", [("whoami", 401), ("/preupload/", 400), ("POST .*/tag/", 500), ("validate-yaml", 400)]
)
def test_a_token_that_the_hub_repeats_is_not_printed(hub, publish, route, status):
    token = os.environ["HF_TOKEN"]
    hub.forge_reply(route, {"error": f"no rights for {token}, says\n {token}"}, status, times=9)
    hub.before("POST .*/tag/", lambda: False)
    assert publish("ann/token", "--revision", "v1")[0] == 2  # the fixture looks for the token
