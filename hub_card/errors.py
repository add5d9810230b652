"""Errors that a user can put right: the command prints the message as one line, without a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A file, folder or option that can't be used; the message names it and says why."""


@contextmanager
def reading(what: str | Path, problem: str = "can't be read") -> Iterator[None]:
    """Names the file or folder that a library can't read: libraries raise anything for damaged ones, and rarely name it.

    Raises:
        InputError: Instead of any other error within.
    """
    refuse_special(what)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # tokenizers raises `Exception` itself, others KeyError, RecursionError, ...
        raise InputError(f"{what}: {problem} ({first_line(error)})") from error


def refuse_special(path: str | Path) -> None:
    """An `InputError` for a pipe or a device: it can't be read twice, and might never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path}: a pipe or a device, not a file")


def first_line(error: Exception) -> str:
    """The first line of an error's message, which may be a page; with its type where the message alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if not line or isinstance(error, (LookupError, TypeError, AttributeError)):
        return ": ".join(filter(None, (type(error).__name__, line)))
    return line
