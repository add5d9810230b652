"""Publishes a checkpoint's folder on the Hub: checks, one commit, a read-back, a tag."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id

from ..card import CARD, TRAINING_FACTS, check_card, write_card
from ..conversion.converter import convert
from ..errors import InputError
from ..inference.checkpoints import checkpoint_config
from .files import SMALL, HashedFile, find_files
from .hub_errors import LOGIN, explain_hub_error, hide_token, hub_errors
from .leaks import check_leaks
from .license import FIELDS, check_license
from .smoke_test import TIME_LIMIT, smoke_test
from .timeouts import set_timeouts


TAG = re.compile(r"[A-Za-z0-9][\w.-]*")
BRANCH = "main"
HUB_FILES = {".gitattributes"}  # which files are large; the Hub writes it
SLOWEST = 10**6  # bytes of weights a second: what is slower in the smoke test counts as hanging


@dataclass(frozen=True)
class Destination:
    """A repository with its namespace, whether to make it private if it has to be made, and the tag to set."""

    repo_id: str
    private: bool = False
    tag: str | None = None


def check_before_publishing(folder: Path) -> dict[str, HashedFile]:
    """Checks all that can be checked without the Hub.

    Returns:
        `dict[str, HashedFile]`: The files to publish as they were before their checks, by their names in the repository.

    Raises:
        InputError: No checkpoint; files that aren't published; local paths or secrets in one; a card that isn't complete;
            a checkpoint that doesn't load, or doesn't reflect, in a clean process.
    """
    checkpoint_config(folder)
    files = {name: HashedFile.read(path) for name, path in find_files(folder).items()}
    check_leaks({name: file.path for name, file in files.items()}, folder)
    check_card(folder)
    smoke_test(folder, seconds=longest_test(files))
    check_unchanged(files)
    return files


def check_unchanged(files: dict[str, HashedFile], sent: dict[str, str] | None = None) -> None:
    """Raises an `InputError` for a file that has changed since its checks began, or of which another SHA-256 was `sent`."""
    for name, file in files.items():
        if not file.is_unchanged() or (sent is not None and sent[name] != file.sha256):
            raise InputError(f"{file.path} has changed since its checks began; nothing was changed on the Hub")


def longest_test(files: dict[str, HashedFile]) -> float:
    """How many seconds a smoke test may take."""
    return TIME_LIMIT + sum(file.size for file in files.values()) / SLOWEST


def find_destination(api: HfApi, repo_id: str, private: bool, tag: str | None) -> Destination:
    """Asks the Hub who publishes and what is there; changes nothing. Sets the client's time-outs, see `set_timeouts`.

    Raises:
        InputError: No token, or a wrong one; a tag that exists; a public repository that is to be private; no network.
    """
    check_names(repo_id, tag)
    if get_token() is None:
        raise InputError(f"no Hub token: {LOGIN}")
    set_timeouts()
    with hub_errors(repo_id):
        name = api.whoami()["name"]
        if "/" not in repo_id:
            repo_id = f"{name}/{repo_id}"
        try:
            about = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return Destination(repo_id, private, tag)
        refs = api.list_repo_refs(repo_id)
    if private and not about.private:
        raise InputError(f"{repo_id} exists and is public: make it private in its settings, or leave --private out")
    if tag in {ref.name for ref in (*refs.tags, *refs.branches)}:
        raise InputError(f"{repo_id} has a revision {tag} already: choose another name, nothing was uploaded")
    return Destination(repo_id, private, tag)


def check_names(repo_id: str, tag: str | None) -> None:
    """Raises an `InputError` where a repository or a tag can't be called so."""
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if tag is not None and (not TAG.fullmatch(tag) or tag.endswith((".", ".lock")) or ".." in tag or tag == BRANCH):
        raise InputError(f"{tag!r} can't be the name of a tag: take letters, digits, dots, dashes and underscores")


def publish(folder: Path, destination: Destination, api: HfApi) -> str:
    """Checks a folder and publishes it, and prints a line about each step; sets the client's time-outs, see `set_timeouts`.

    The commit holds all files, and removes those that the folder doesn't have: readers see the old revision or the new one.
    What is sent is what was checked. Where anything fails before it, the repository is as it was. The tag comes last, after
    the checkpoint was loaded from the Hub, so that the same call can be repeated wherever it was interrupted.

    Returns:
        `str`: The commit.

    Raises:
        InputError: The folder isn't fit, see `check_before_publishing` and `check_license`; what a step on the Hub says.
    """
    set_timeouts()
    check_license(folder, api)
    files = check_before_publishing(folder)
    print(f"Checked: {len(files)} files.")
    commit = upload(files, destination, api)
    print(f"Uploaded: {destination.repo_id} at {commit}.")
    read_back(destination.repo_id, commit, files, api)
    print("Loaded from the Hub.")
    if destination.tag is not None:
        set_tag(destination, commit, api)
        print(f"Tagged: {destination.tag}.")
    return commit


def upload(files: dict[str, HashedFile], destination: Destination, api: HfApi) -> str:
    """Makes the repository if need be, and one commit of all files; the client retries what can be retried.

    Returns:
        `str`: The commit; the last one, if nothing has changed since.

    Raises:
        InputError: The Hub refuses, can't be reached, or has got a commit of somebody else meanwhile; a file has changed
            since it was checked.
    """
    repo_id = destination.repo_id
    check_unchanged(files)
    parent = make_repository(destination, api)
    try:
        # Small files are read now, once. The client hashes large ones as it uploads them, and the commit names the hash.
        additions = [
            CommitOperationAdd(name, file.path.read_bytes() if file.size <= SMALL else str(file.path))
            for name, file in files.items()
        ]
        with hub_errors(repo_id):
            old = set(api.list_repo_files(repo_id, revision=parent))
            api.preupload_lfs_files(repo_id, additions, revision=BRANCH, free_memory=False)
    except (OSError, ValueError):
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # the client leaves its bars open, and the error would be on their line
        check_unchanged(files)  # this says more than the client, or the Hub, does about half a file
        raise
    check_unchanged(files, {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in additions})
    operations = [*additions, *(CommitOperationDelete(name) for name in sorted(old - set(files) - HUB_FILES))]
    message = f"Publish{f' {destination.tag}' if destination.tag else ''} with vreflection"
    try:
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent).oid
    except Exception as error:  # whatever it is, the Hub may have made the commit
        return find_commit(error, parent, files, repo_id, api)


def make_repository(destination: Destination, api: HfApi) -> str:
    """Makes the repository if it doesn't exist, and returns the head of its branch.

    Raises:
        InputError: It doesn't exist afterwards; it is public and should be private.
    """
    repo_id = destination.repo_id
    failure = None
    try:
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
    except Exception as error:  # the Hub may have made it all the same
        failure = error
    try:
        about = api.model_info(repo_id, revision=BRANCH)
    except Exception as error:
        state = "whether the repository was made can't be found out, nothing was uploaded"
        if isinstance(error, RepositoryNotFoundError):
            state = "nothing was changed"
        raise InputError(f"{repo_id}: {explain_hub_error(failure or error)}; {state}") from error
    if destination.private and not about.private:
        raise InputError(f"{repo_id} is public: make it private in its settings; nothing was uploaded")
    if about.sha is None:  # a commit without a parent would go over anybody's
        raise InputError(f"{repo_id}: the Hub names no commit of {BRANCH}; nothing was uploaded")
    return about.sha


def find_commit(error: Exception, parent: str, files: dict[str, HashedFile], repo_id: str, api: HfApi) -> str:
    """Returns the commit if it was made though the client raised an error; else, or where nobody can say, an `InputError`."""
    reason = f"{repo_id}: {explain_hub_error(error)}"
    try:
        head = api.model_info(repo_id, revision=BRANCH).sha
        if head != parent and not find_differences(repo_id, head, files, api):
            return head
    except Exception as second:
        state = f"whether the commit was made can't be found out ({explain_hub_error(second)})"
        raise InputError(f"{reason}; {state}: look at {api.endpoint}/{repo_id}/commits/{BRANCH}") from error
    if head != parent:
        state = f"{BRANCH} is at {head} now, which isn't this checkpoint: somebody else has committed meanwhile"
        raise InputError(f"{reason}; {state}") from error
    answered = isinstance(error, HfHubHTTPError) and error.response.status_code not in (408, 504)
    state = "nothing was changed" if answered else f"{BRANCH} has no new commit, but the Hub may still be making it"
    raise InputError(f"{reason}; {state}: run the command again later") from error


def find_differences(repo_id: str, commit: str, files: dict[str, HashedFile], api: HfApi) -> list[str]:
    """Lists files that are missing on the Hub, are others than those that were checked, or don't belong there."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    wrong = set(there) - set(files) - HUB_FILES
    for name, file in files.items():
        entry = there.get(name)
        if entry is None or (entry.lfs.sha256 != file.sha256 if entry.lfs else entry.blob_id != file.blob_id):
            wrong.add(name)
    return sorted(wrong)


def read_back(repo_id: str, commit: str, files: dict[str, HashedFile], api: HfApi) -> None:
    """Compares what was published with what was checked, and loads it as others do; with the token only if it isn't public.

    Raises:
        InputError: Files are missing or others, or the checkpoint doesn't load.
    """
    with hub_errors(repo_id, f"the Hub says that it made the commit {commit}, which was not read back and has no tag"):
        about = api.model_info(repo_id, revision=commit)
        wrong = find_differences(repo_id, commit, files, api)
    state = f"{BRANCH} is at this commit, {commit}, and it has no tag"
    if wrong:
        raise InputError(f"{repo_id}: not what was checked ({', '.join(wrong)}); {state}")
    sha256s = {name: file.sha256 for name, file in files.items()}
    token = get_token() if about.private or about.gated else None
    try:
        smoke_test(repo_id, commit, token, sha256s, seconds=longest_test(files))
    except InputError as error:
        raise InputError(f"{hide_token(str(error))}; {state}") from error


def set_tag(destination: Destination, commit: str, api: HfApi) -> None:
    """Tags a commit, and sees the tag at this commit; else raises an `InputError`."""
    repo_id, tag = destination.repo_id, destination.tag
    failure = None
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except Exception as error:  # the Hub may have set it all the same
        failure = error
    with hub_errors(repo_id, f"{commit} is uploaded, and whether it has the tag {tag} can't be found out"):
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tags.get(tag) != commit:
        reason = explain_hub_error(failure) if failure else "the Hub says that it set the tag"
        where = f"{tag} is at {tags[tag]}" if tag in tags else "there is no such tag"
        raise InputError(f"{repo_id}: {reason}; {where}: {commit} is uploaded, and not tagged") from failure


@contextmanager
def inference_only(folder: Path, repo_id: str) -> Iterator[Path]:
    """Yields a temporary copy of a checkpoint without what decoding doesn't need, with a card that says so.

    Raises:
        InputError: The folder isn't fit to be published itself; weights that can't be converted.
    """
    files, card = find_files(folder), check_card(folder).data
    with TemporaryDirectory(prefix="vreflection-") as parent:
        copy = Path(parent) / folder.resolve().name
        config = convert(folder, copy, inference_only=True).config
        for name in (TRAINING_FACTS, "LICENSE"):
            if name in files:
                shutil.copy(files[name], copy / name)
        write_card(
            copy,
            repo_id,
            base_model=card.base_model if isinstance(card.base_model, str) else None,
            datasets=[card.datasets] if isinstance(card.datasets, str) else card.datasets or (),
            tags=card.tags or (),
            **{field: card.get(field) for field in FIELDS},
        )
        note = f"{CARD} is written anew"
        if card.eval_results or any(name.startswith(".eval_results/") for name in files):
            note += ", without the results, which were measured on the whole weights"
        print(f"{'BCM is' if config.has_dac else 'BCM and DAC are'} left out; {note}.")
        yield copy
