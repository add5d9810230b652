"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it for the block; an `InputError` if another process does. A process that dies lets go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder}: another process is writing there; wait for it, or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
