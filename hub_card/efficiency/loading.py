"""What loading a checkpoint holds in memory at its peak, seen from outside a process of its own."""

import re
import select
import subprocess
import sys
import time
from pathlib import Path

from ..errors import InputError


LOADS = """
import sys
import torch
from modeling_vreflection import VReflectionForConditionalGeneration

torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
model = VReflectionForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
for parameter in model.parameters():
    parameter.sum()  # reads it: what is only mapped isn't in memory before
print(sum(parameter.nbytes for parameter in model.parameters()), flush=True)
sys.stdin.readline()
"""
INTERVAL = 0.002


def measure_loading(folder: Path) -> dict | None:
    """Loads a checkpoint onto the CPU, in the dtype of its weights, reads them, and watches how much memory it takes.

    Anonymous memory is what the process has written itself. Pages of the mapped file, which the system can drop at any
    time, are counted in all resident memory only.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        `dict`: Bytes of the weights, and at the peak, beyond what the process held before; `None` where the system doesn't
        tell (it isn't Linux).

    Raises:
        InputError: A checkpoint that can't be loaded.
    """
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, "-c", LOADS, str(folder.resolve())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.readline()
        before = resident(process.pid)
        peak = dict(before)
        began = time.monotonic()
        print(file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], INTERVAL)[0]:
            now = resident(process.pid)
            peak = {kind: max(peak[kind], now[kind]) for kind in peak}
        seconds = time.monotonic() - began
        weights = process.stdout.readline()  # then it waits
        kept = resident(process.pid)
        _, errors = process.communicate("\n")
    if not weights:
        raise InputError(f"{folder}: can't be loaded ({errors.strip().splitlines()[-1]})")
    return {
        "weights_bytes": int(weights),
        "seconds": seconds,
        **{f"peak_{kind}_bytes": max(peak[kind], kept[kind]) - before[kind] for kind in peak},
        **{f"kept_{kind}_bytes": kept[kind] - before[kind] for kind in peak},
    }


def resident(process_id: int) -> dict[str, int]:
    """Bytes of a process's anonymous memory and of all of its resident memory."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:  # it has ended
        return {"anonymous": 0, "resident": 0}
    found = {name: int(size) * 1024 for name, size in re.findall(r"(RssAnon|VmRSS):\s+(\d+) kB", status)}
    return {"anonymous": found.get("RssAnon", 0), "resident": found.get("VmRSS", 0)}
