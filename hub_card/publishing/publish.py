"""A checked folder onto the Hub: one commit, a look at what arrived, a tag."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    tqdm,
    validate_repo_id,
)

from ..card import TRAINING_FACTS, check_card, write_card
from ..conversion.convert import convert
from ..errors import InputError
from .checks import check_checkpoint
from .clean_process import try_checkpoint
from .files import CARD, find_files
from .hub_errors import NO_TOKEN, one_line


TAG = re.compile(r"[A-Za-z0-9][\w.-]*")
BRANCH = "main"
HUBS_OWN = ".gitattributes"  # which files are large; the Hub writes it


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes.

    Args:
        repo_id (`str`): The repository, with its namespace.
        private (`bool`): Whether one that has to be made is private; else the namespace's default.
        tag (`str`, *optional*): The tag to set.
    """

    repo_id: str
    private: bool = False
    tag: str | None = None


def find_destination(api: HfApi, repo_id: str, private: bool, tag: str | None) -> Destination:
    """Asks the Hub who publishes and what is there; changes nothing.

    Raises:
        InputError: No token, or a wrong one; a tag that exists; a public repository that is to be private; no network.
    """
    check_names(repo_id, tag)
    if get_token() is None:
        raise InputError(NO_TOKEN)
    with one_line(repo_id):
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
    """Checks that a repository and a tag may be called so.

    Raises:
        InputError: They may not.
    """
    with one_line(repo_id):
        validate_repo_id(repo_id)
    if tag is not None and (not TAG.fullmatch(tag) or tag.endswith((".", ".lock")) or ".." in tag or tag == BRANCH):
        raise InputError(f"{tag!r} can't be the name of a tag: take letters, digits, dots, dashes and underscores")


def publish(folder: Path, destination: Destination, api: HfApi, tell: Callable[[str], None] = print) -> str:
    """Checks a folder and publishes it.

    The commit holds all files, and removes those that the folder doesn't have: readers see the old revision or the new one.
    Where anything fails before it, the repository is as it was. The tag comes last, after the checkpoint was loaded from the
    Hub, so that the same call can be repeated wherever it was interrupted.

    Args:
        folder (`Path`): The checkpoint.
        destination (`Destination`): Where to, see `find_destination`.
        api (`HfApi`): The Hub.
        tell (`Callable`): Takes a line about each step.

    Returns:
        `str`: The commit.

    Raises:
        InputError: See `check_checkpoint`, `upload`, `read_back`; a tag that the Hub doesn't take.
    """
    files = check_checkpoint(folder)
    tell(f"Checked: {len(files)} files.")
    commit = upload(files, destination, api)
    tell(f"Uploaded: {destination.repo_id} at {commit}.")
    read_back(destination.repo_id, commit, files, api)
    tell("Loaded from the Hub.")
    if destination.tag is not None:
        with one_line(destination.repo_id, f"{commit} is uploaded, and not tagged"):
            api.create_tag(destination.repo_id, tag=destination.tag, revision=commit)
        tell(f"Tagged: {destination.tag}.")
    return commit


def upload(files: dict[str, Path], destination: Destination, api: HfApi) -> str:
    """Makes the repository if need be, and one commit of all files; the client retries what can be retried.

    Returns:
        `str`: The commit; the last one, if nothing has changed since.

    Raises:
        InputError: The Hub refuses, can't be reached, or has got a commit of somebody else meanwhile.
    """
    repo_id = destination.repo_id
    with one_line(repo_id), progress_bars():
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
        parent = api.model_info(repo_id, revision=BRANCH).sha
        old = set(api.list_repo_files(repo_id, revision=parent))
        operations = [CommitOperationDelete(name) for name in sorted(old - set(files) - {HUBS_OWN})]
        operations += [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        tag = f" {destination.tag}" if destination.tag else ""
        return api.create_commit(
            repo_id, operations, commit_message=f"Publish{tag} with vreflection", parent_commit=parent
        ).oid


def read_back(repo_id: str, commit: str, files: dict[str, Path], api: HfApi) -> None:
    """Loads what was published as a stranger does; with the token only where strangers can't.

    Raises:
        InputError: Files are missing, or the checkpoint doesn't load.
    """
    with one_line(repo_id, f"{commit} is uploaded, and not looked at yet"):
        about = api.model_info(repo_id, revision=commit)
        missing = sorted(set(files) - set(api.list_repo_files(repo_id, revision=commit)))
    if missing:
        raise InputError(f"{repo_id} at {commit}: {missing[0]} is missing there, and the commit has no tag")
    try:
        try_checkpoint(repo_id, commit, get_token() if about.private or about.gated else None)
    except InputError as error:
        raise InputError(f"{error}; {BRANCH} is at this commit, {commit}, and it has no tag") from error


@contextmanager
def inference_only(folder: Path, repo_id: str, tell: Callable[[str], None] = print) -> Iterator[Path]:
    """Yields a temporary copy of a checkpoint without BCM and DAC, with a card that says so.

    Raises:
        InputError: The folder isn't fit to be published itself; weights that can't be converted.
    """
    files, card = find_files(folder), check_card(folder).data
    with TemporaryDirectory(prefix="vreflection-") as parent:
        copy = Path(parent) / folder.resolve().name
        convert(folder, copy, inference_only=True)
        for name in (TRAINING_FACTS, "LICENSE"):
            if name in files:
                shutil.copy(files[name], copy / name)
        base = card.base_model if isinstance(card.base_model, str) else None
        write_card(
            copy,
            repo_id,
            base_model=base,
            license=card.license if card.license != "other" else card.get("license_name"),
            datasets=card.datasets or (),
            tags=card.tags or (),
        )
        note = f"{CARD} is written anew"
        if card.eval_results or any(name.startswith(".eval_results/") for name in files):
            note += ", without the results, which were measured on the whole weights"
        tell(f"BCM and DAC are left out; {note}.")
        yield copy


@contextmanager
def progress_bars() -> Iterator[None]:
    """Shows the client's own bars, which the command turns off for everything else."""
    were_disabled = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        yield
    finally:
        for bar in list(getattr(tqdm, "_instances", ())):  # the client leaves them open where an upload fails
            bar.close()
        if were_disabled:
            disable_progress_bars()
