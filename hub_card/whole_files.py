"""Files that are written whole or not at all: a full disk, or a kill, leaves what was there before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a draft beside a file, which takes its place when the block ends; an error removes the draft.

    A link, a pipe or a device, such as /dev/stdout, can't be replaced: it is written itself.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    draft = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
