"""Paths of this machine and secrets in files that are about to become public."""

import os
import re
from pathlib import Path

from huggingface_hub import get_token
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..inference.checkpoints import first_line


# Somebody's folders; a URL with such a part, or a token of a vocabulary, is none.
PATHS = re.compile(
    rb"(?<![\w.-])/(?:home|Users|root|tmp|mnt|scratch|workspace|var/folders)/[\w.@+-]+|\b[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}\w+"
)
SECRETS = {
    "a Hugging Face token": rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": rb"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,})",
    "a GitLab token": rb"\bglpat-[\w-]{20,}",
    "a Google key": rb"\bAIza[\w-]{35}",
    "an OpenAI or Anthropic key": rb"\bsk-[A-Za-z0-9_-]{32,}",
    "a Slack token": rb"\bxox[abprs]-[\w-]{20,}",
}
SECRET_NAME = re.compile(r".*(TOKEN|KEY|SECRET|PASSWORD)", re.IGNORECASE)
SECRET_LENGTH = 16


def check_leaks(files: dict[str, Path], folder: Path) -> None:
    """Checks that no file holds a local path or a secret; of weights, the names and the metadata.

    Args:
        files (`dict[str, Path]`): Names and where they lie.
        folder (`Path`): The folder that they are of, whose own path is looked for too.

    Raises:
        InputError: The first leak of each file, without the secret.
    """
    own_paths = [os.fsencode(path) for path in (Path.home(), folder.resolve()) if len(path.parts) > 2]
    own_secrets = [value.encode() for value in secrets_here() if len(value) >= SECRET_LENGTH]
    leaks = [
        f"{name} holds {leak}" for name, path in files.items() if (leak := find_leak(path, own_paths, own_secrets))
    ]
    if leaks:
        raise InputError(f"{folder}: {'; '.join(leaks)}")


def secrets_here() -> list[str]:
    """The Hub token in use, and what the environment keeps under names of secrets."""
    return [get_token() or "", *(value for name, value in os.environ.items() if SECRET_NAME.fullmatch(name))]


def find_leak(path: Path, own_paths: list[bytes], own_secrets: list[bytes]) -> str | None:
    """Says what a file holds that it shouldn't; `None` if nothing."""
    content = header(path) if path.suffix == ".safetensors" else path.read_bytes()
    # In JSON, a backslash is two, and a slash may have one.
    content = content.replace(rb"\/", b"/")
    for kind, pattern in SECRETS.items():
        if re.search(pattern, content):
            return kind
    if any(secret in content for secret in own_secrets):
        return "a secret of this machine's environment"
    found = PATHS.search(content)
    own = next((own for own in own_paths if own in content), None)
    if found or own:
        local = found[0] if found else own
        return f"the local path {local.decode('utf-8', 'replace')}"
    return None


def header(path: Path) -> bytes:
    """Names and metadata of a file of weights."""
    try:
        with safe_open(path, "pt") as weights:
            metadata = weights.metadata() or {}
            return "\n".join([*weights.keys(), *metadata, *metadata.values()]).encode()
    except SafetensorError as error:
        raise InputError(f"{path}: no safetensors, or damaged ({first_line(error)})") from error
