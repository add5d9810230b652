"""The files that visitors leave in gradio's folder: who may ask about which, and how much room they take together."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path


# Bytes on disk of all visitors together: uploads, the heatmaps that were sent, and what broken uploads leave.
MAX_DISK = 2**30
# A file or folder counts as at least this many bytes, so that many tiny ones go, too.
LEAST_SIZE = 2**16


@cache
def private_folder() -> tempfile.TemporaryDirectory:
    """Makes gradio keep its files in a folder of this process only; its usual one is shared by all of a user's pages."""
    base = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    Path(base).mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="vreflection-", dir=base, ignore_cleanup_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return folder


class Uploads:
    """Which visitor may ask about which file.

    gradio's upload doesn't say whose it is, and equal pictures of two visitors are one file. So each upload of a path
    lets one visitor take it: the page does so at once, by the check that follows an upload.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.examples: set[str] = set()  # everybody's, and never deleted
        self._visitors: dict[str, list[str | None]] = {}  # of each path; None: nobody took this upload yet

    def add(self, paths: Iterable[str]) -> None:
        """Notes files that were just uploaded."""
        for path in paths:
            self._visitors.setdefault(path, []).append(None)

    def allows(self, path: str, visitor: str | None) -> bool:
        """Whether a visitor, named by gradio's session hash, may ask about a file."""
        if path in self.examples:
            return True
        visitors = self._visitors.get(path, [])
        if visitor and visitor not in visitors and None in visitors:
            visitors[visitors.index(None)] = visitor
        return bool(visitor) and visitor in visitors

    def delete_oldest(self) -> None:
        """Deletes the oldest files until the rest fits `MAX_DISK`, and forgets whose they were."""
        entries = []
        for folder, folders, files in os.walk(self.folder):
            for path in (os.path.join(folder, name) for name in folders + files):
                with suppress(FileNotFoundError):  # gradio deletes what is an hour old
                    stat = os.lstat(path)
                    if path not in self.examples:
                        entries.append((stat.st_mtime_ns, max(stat.st_size, LEAST_SIZE), path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= MAX_DISK:
                break
            with suppress(OSError):  # a folder that still holds something
                os.rmdir(path) if os.path.isdir(path) else os.remove(path)
                total -= size
        for path in list(self._visitors):
            if not os.path.exists(path):
                del self._visitors[path]
