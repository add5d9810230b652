"""Starts the probe where nothing of this installation is left but the libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import InputError


PROBE = Path(__file__).with_name("probe.py")
OURS = ("modeling_vreflection", "vreflection_hub_card", "vreflection_training")
# Where a library would find a cache, a token, or an order not to use the network.
PERSONAL = (
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_MODULES_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "TRANSFORMERS_CACHE",
    "TRANSFORMERS_OFFLINE",
)


def try_checkpoint(model: str | Path, revision: str | None = None, token: str | None = None) -> str:
    """Loads a checkpoint by `trust_remote_code` alone and makes it reflect, in a new process with an empty cache.

    Args:
        model (`str` or `Path`): A folder, which is tried without a network, or a Hub id.
        revision (`str`, *optional*): A Hub id's revision.
        token (`str`, *optional*): For what isn't public.

    Returns:
        `str`: What it said.

    Raises:
        InputError: It can't be loaded, or doesn't reflect; the reason in one line.
    """
    local = isinstance(model, Path)
    with TemporaryDirectory(prefix="vreflection-") as empty:
        environment = {name: value for name, value in os.environ.items() if name not in PERSONAL}
        environment |= {"HF_HOME": empty, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if local:
            environment["HF_HUB_OFFLINE"] = "1"
        if token is not None:
            environment["HF_TOKEN"] = token
        # -I: neither the current folder nor what a person added to Python's path.
        command = [sys.executable, "-I", str(PROBE), str(model.resolve() if local else model), revision or "", *OURS]
        ran = subprocess.run(
            command, cwd=empty, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    try:
        result = json.loads(ran.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lines = ran.stderr.strip().splitlines()
        reason = f": {lines[-1]}" if lines else ""
        raise InputError(f"the process that loads {model} ended with {ran.returncode}{reason}") from None
    if "error" in result:
        raise InputError(f"{model}: it can't be used by trust_remote_code alone ({result['error']})")
    return result["text"]
