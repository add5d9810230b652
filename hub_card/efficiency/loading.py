"""How much memory loading takes beyond the files: a checkpoint's weights should not be held twice."""

import json
import subprocess
import sys
from pathlib import Path

from ..errors import InputError


# Runs in a process of its own, whose memory nothing else has used before. Pages of mapped files are not counted: they are
# the files' own, and the system takes them back when it needs to.
PROBE = """
import json, re, sys, threading
from modeling_vreflection import VReflectionForConditionalGeneration

def anonymous():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1])

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

done, seen = threading.Event(), [before := anonymous()]
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = VReflectionForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
done.set()
watcher.join()
weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
print(json.dumps({"weights_bytes": weights, "anonymous_bytes": max(*seen, anonymous()) - before}))
"""


def measure_loading(folder: Path) -> dict | None:
    """Loads a checkpoint on the CPU in a fresh process.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        `dict` or `None`: `weights_bytes`, and `anonymous_bytes`, the most that was allocated beyond mapped files; nothing
            where the system doesn't tell.

    Raises:
        InputError: A checkpoint that can't be loaded.
    """
    if not Path("/proc/self/status").is_file():
        return None
    ran = subprocess.run([sys.executable, "-c", PROBE, str(folder)], capture_output=True, text=True)
    if ran.returncode:
        raise InputError(f"{folder} can't be loaded: {ran.stderr.strip().splitlines()[-1]}")
    return json.loads(ran.stdout.strip().splitlines()[-1])
