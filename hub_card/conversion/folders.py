"""A folder that is either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import InputError


def check_free(out: Path) -> None:
    """Checks that a folder can be made: nothing is there, or an empty folder."""
    if out.is_dir():
        if any(out.iterdir()):
            raise InputError(f"{out}: the folder isn't empty; name one that doesn't exist")
    elif out.exists():
        raise InputError(f"{out}: a file; name a folder that doesn't exist")


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which takes its place in the end; a failure, or the next run, removes it."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.incomplete")
    lock = FileLock(temporary.with_name(f"{temporary.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{out}: another process is writing it") from error
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        check_free(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
