"""Which files a published checkpoint consists of; any other stops the publication, so that nothing is left out in silence."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.utils.sha import git_hash

from ..card import CARD, TRAINING_FACTS
from ..errors import InputError, reading
from ..evaluation.provenance import sha256


ALLOWED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors",
    "model.safetensors.index.json",
    "*_vreflection.py",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TRAINING_FACTS,
    CARD,
    "LICENSE",
    ".eval_results/*.yaml",
    ".gitattributes",
)
PICTURES = (".gif", ".jpeg", ".jpg", ".png", ".svg", ".webp")
# What git, a download and a training run leave beside the repository's files: passed over.
BESIDE = re.compile(r"(\.git|\.cache|checkpoint-\d+)(/.*)?|samples/step-\d+-row-\d+\.png|\.lock")
# Why files have no place in a published checkpoint, the worst first: patterns of names, and what to do.
REFUSED = (
    (
        r"(.*/)?(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|global_step|zero_to_fp32|latest)[^/]*",
        "the state of a training run: publish the folder of the finished run, or delete them",
    ),
    (
        r".*\.(bin|ckpt|pickle|pkl|pt|pth)",
        "pickle, which runs code when it is read: only safetensors are published; delete them",
    ),
    (r"(.*/)?adapter_[^/]*", "an adapter: make a checkpoint of it first, vreflection merge ADAPTER OUTPUT"),
    (r".*", "no part of a published checkpoint: move them elsewhere (pictures stay if README.md shows them)"),
)
NAMES_SHOWN = 8
SMALL = 10 * 2**20  # bytes; the Hub takes no larger file but as LFS or Xet


@dataclass(frozen=True)
class HashedFile:
    """A file, and what was in it when its checks began. The Hub names small files by git's hash, large ones by SHA-256."""

    path: Path
    size: int
    mtime_ns: int
    sha256: str
    blob_id: str | None

    @classmethod
    def read(cls, path: Path) -> "HashedFile":
        stat = path.stat()
        blob_id = git_hash(path.read_bytes()) if stat.st_size <= SMALL else None
        return cls(path, stat.st_size, stat.st_mtime_ns, sha256(path), blob_id)

    def is_unchanged(self) -> bool:
        """Whether nobody has written to it since, as far as its size and time say."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


def find_files(folder: Path) -> dict[str, Path]:
    """What is to be published: paths in the repository, and where they lie.

    Any file that doesn't belong there, or isn't loaded, raises an `InputError`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not BESIDE.fullmatch(name.as_posix()) and (path.is_symlink() or not path.is_dir()):
            found[name.as_posix()] = path
    card = found[CARD].read_text(encoding="utf-8", errors="replace") if CARD in found else ""
    if foreign := [name for name in found if not is_allowed(name, card)]:
        raise InputError(f"{folder}: {explain_foreign(foreign)}")
    # A download's files are links into the cache of their own repository.
    root, cached = folder.resolve(), folder.resolve().parent
    roots = (root, cached.parent / "blobs") if cached.name == "snapshots" else (root,)
    for name, path in found.items():
        if not path.is_file():
            raise InputError(f"{folder}: {name} is no file that can be read")
        if not any(path.resolve().is_relative_to(one) for one in roots):
            raise InputError(f"{folder}: {name} is a link out of the folder: put a copy in its place, or delete it")
    check_shards(folder, set(found))
    return found


def is_allowed(name: str, card: str) -> bool:
    """Whether a file belongs to a checkpoint by its name, or is a picture that the card shows."""
    if name.endswith(PICTURES):
        shown = rf"\]\((?:\./)?{re.escape(name)}[)\s]|src=[\"'](?:\./)?{re.escape(name)}[\"']"
        return re.search(shown, card) is not None
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in ALLOWED)


def explain_foreign(foreign: list[str]) -> str:
    """Says which files have no place in a published checkpoint, the worst of them first, and what to do."""
    listings = [([name for name in foreign if re.fullmatch(pattern, name)], why) for pattern, why in REFUSED]
    listing, why = next(found for found in listings if found[0])
    more = f" and {len(listing) - NAMES_SHOWN} more" if len(listing) > NAMES_SHOWN else ""
    return f"{', '.join(listing[:NAMES_SHOWN])}{more}: {why}"


def check_shards(folder: Path, names: set[str]) -> None:
    """Raises an `InputError` for missing or damaged weights, and for shards of an earlier save, which nothing loads."""
    with reading(folder, "its weights are missing, incomplete or damaged"):
        needed = set(get_local_safetensors_metadata(folder).files_metadata)
    if extra := sorted(name for name in names if name.endswith(".safetensors") and name not in needed):
        raise InputError(
            f"{folder}: {', '.join(extra[:NAMES_SHOWN])}: left from an earlier save, nothing refers to it; delete it"
        )
