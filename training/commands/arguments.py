"""What the commands share: numbers for argparse, and files that can be written."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vreflection_hub_card.embedded import resolve_embedded
from vreflection_hub_card.errors import InputError


# The model's own names, here without importing the model: the command line must parse quickly.
LATENT_FEEDBACK = ("hidden", "dac")
ATTENTION_SOURCES = ("dac", "llm")


def quiet_transformers() -> None:
    """Turns transformers' log and progress bars off: the command prints what there is to know."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_writable(path: Path) -> None:
    """Checks before the long work that a file can be written after it; leaves no empty file behind."""
    existed = path.exists()
    with writing(path):
        path.open("ab").close()
    if not existed:
        path.resolve().unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file that can't be written: a full disk says nothing about it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error})") from error


def checkpoint_path(text: str) -> Path:
    """A checkpoint's folder, for argparse."""
    return Path(resolve_embedded(text))


def natural(text: str) -> int:
    """An integer from 0 on, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive(text: str) -> int:
    """An integer from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
