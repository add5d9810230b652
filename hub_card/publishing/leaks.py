"""Paths and secrets of this machine in files that are about to become public. For anybody's secrets the Hub scans each push."""

import os
import re
from pathlib import Path

from huggingface_hub import get_token
from safetensors import safe_open

from ..errors import InputError


# Somebody's folders; a URL with such a part, or a token of a vocabulary, is none.
PATHS = re.compile(
    rb"(?<![\w.-])/(?:home|Users|root|tmp|mnt|scratch|workspace|var/folders)/[\w.@+-]+|\b[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}\w+"
)
SECRET_NAME = re.compile(r".*(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|_PASS|_PAT)S?", re.IGNORECASE)
SECRET_LENGTH = 16


def check_leaks(files: dict[str, Path], folder: Path) -> None:
    """Raises an `InputError` for files that hold a local path or a secret of this machine, which it doesn't repeat."""
    own_paths = [os.fsencode(path) for path in (Path.home(), folder.resolve()) if len(path.parts) > 2]
    values = [get_token() or "", *(value for name, value in os.environ.items() if SECRET_NAME.fullmatch(name))]
    secrets = [value.encode() for value in values if len(value) >= SECRET_LENGTH]
    leaks = []
    for name, path in files.items():
        # In JSON, a backslash is two, and a slash may have one.
        content = read_text(path).replace(rb"\/", b"/")
        local = [match[0] for match in PATHS.finditer(content)] + [own for own in own_paths if own in content]
        if any(secret in content for secret in secrets):
            leaks.append(f"{name} holds a secret of this machine: the Hub token, or one of its environment")
        elif local:
            leaks.append(f"{name} holds the local path {local[0].decode('utf-8', 'replace')}")
    if leaks:
        raise InputError(f"{folder}: {'; '.join(leaks)}")


def read_text(path: Path) -> bytes:
    """A file's content; of weights, their names and metadata."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as weights:
        metadata = weights.metadata() or {}
        return "\n".join([*weights.keys(), *metadata, *metadata.values()]).encode()
