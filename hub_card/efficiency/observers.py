"""What is read off a computation: its time, and the peak of its memory."""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


class Clock:
    """Tells the time when the device has done its work.

    With a single thread on a CPU, what counts is the processor's time, which other programs on the machine don't lengthen
    by waiting; else the wall's.

    Args:
        device (`torch.device`): Waited for before the clock is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.name = "processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.name == "processor time" else time.perf_counter()


class PeakMemory:
    """Context that finds the peak of the bytes that torch's allocator gave out within it; `.bytes` after it.

    What was held before doesn't count. On a CPU it adds up the allocator's own record, which torch's profiler keeps: single
    tensors, kernels' buffers included.

    Args:
        device (`torch.device`): Whose memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [event for event in events if event.get("name") == "[memory]"]
        held = np.cumsum([0, *(change["args"]["Bytes"] for change in sorted(changes, key=lambda event: event["ts"]))])
        self.bytes = int(held.max())
