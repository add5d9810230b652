"""Paired rounds on a noisy machine: a clock, peak memory, medians with intervals, and a result file that grows."""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions


CONFIDENCE = 0.95


def pick_clock(device: torch.device) -> tuple[str, Callable[[], float]]:
    """A clock's name, and a function that returns its seconds.

    With a single thread on a CPU it is the processor's time, which other programs don't lengthen by waiting; else the wall's,
    read by torch's benchmark utilities when the device has done its work.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "processor time", time.process_time
    return "wall time", benchmark.timer


def rotated(names: Iterable[str], number: int) -> list[str]:
    """The order of a round: each round begins with another one."""
    names = list(names)
    begin = number % len(names)
    return names[begin:] + names[:begin]


class PeakMemory:
    """Context that finds the peak of the bytes that torch's allocator gave out within it; `.bytes` after it.

    What was held before doesn't count. On a CPU it is the profiler's record of the allocator: resident memory doesn't tell,
    since what one arm frees the process keeps for the next one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.stop()
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        self.bytes = max(itertools.accumulate(changes, initial=0))


def spread(values: list[float]) -> dict:
    """The median and the quartiles."""
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return {"median": median, "quartile_1": low, "quartile_3": high, "values": values}


def paired_ratio(first: list[float], second: list[float]) -> dict:
    """The median of first / second, taken within each round, with an interval that holds whatever their distribution is.

    The k-th smallest and the k-th largest of n values enclose the median but for the probability that fewer than k lie on
    one side of it. The narrowest interval with 95 % is taken; with fewer than 6 values, the widest, and `coverage` says
    what it is worth.
    """
    values = [a / b for a, b in zip(first, second, strict=True)]
    ordered, count = sorted(values), len(values)
    coverages = [
        1 - 2 * sum(math.comb(count, index) for index in range(rank)) / 2**count
        for rank in range(1, (count + 1) // 2 + 1)
    ]
    rank = max((rank for rank, coverage in enumerate(coverages, 1) if coverage >= CONFIDENCE), default=1)
    interval = {"low": ordered[rank - 1], "high": ordered[-rank], "coverage": coverages[rank - 1]}
    return {"median": statistics.median(values), **interval, "values": values}


def open_result(path: Path, command: str, device: torch.device, settings: dict) -> dict:
    """The result file of these settings on this machine to go on with, or a new one.

    Raises:
        ValueError: A file that holds figures of other settings, versions or another machine.
    """
    settings = settings | {
        "versions": describe_versions() | settings.get("versions", {}),
        "machine": describe_machine(device) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "clock": pick_clock(device)[0],
    }
    settings = json.loads(json.dumps(settings))  # as a file holds them
    result = json.loads(path.read_text()) if path.is_file() else {"command": command, **settings, "repeats": 0}
    if different := [name for name, value in settings.items() if result.get(name) != value]:
        raise ValueError(
            f"{path}: holds figures with {different[0]} = {result.get(different[0])!r}, not {settings[different[0]]!r}. "
            "Choose another --output."
        )
    return result | {"command": command}


def save_result(path: Path, result: dict) -> None:
    """Writes a result file, whole or not at all."""
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)
