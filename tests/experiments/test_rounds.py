"""What paired rounds rest on: turns, ratios with intervals, peak memory, a result file that grows."""

import json
import math
import random
import time

import pytest
import torch

from experiments.benchmark.rounds import (
    PeakMemory,
    open_result,
    paired_ratio,
    pick_clock,
    rotated,
    save_result,
    spread,
)


CPU = torch.device("cpu")


def test_each_arm_is_first_once():
    orders = [rotated("abc", number) for number in range(3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert sorted(order[0] for order in orders) == ["a", "b", "c"]


def test_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["quartile_1"], found["median"], found["quartile_3"]) == (2, 3, 4)


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in one round doesn't disturb the ratio."""
    found = paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0])
    assert found["values"] == [2, 2, 2] and (found["low"], found["median"], found["high"]) == (2, 2, 2)
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    "count, low, high, coverage",
    [(9, 2, 8, 1 - 20 / 512), (8, 1, 8, 1 - 2 / 256), (6, 1, 6, 1 - 2 / 64), (3, 1, 3, 0.75), (1, 1, 1, 0.0)],
)
def test_interval_of_the_median(count, low, high, coverage):
    values = [float(value) for value in range(1, count + 1)]
    random.Random(0).shuffle(values)
    found = paired_ratio(values, [1.0] * count)
    assert (found["median"], found["low"], found["high"]) == ((count + 1) / 2, low, high)
    assert found["coverage"] == pytest.approx(coverage)


def test_interval_covers_the_median_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        found = paired_ratio([rng.expovariate(1) for _ in range(9)], [1.0] * 9)
        hits += found["low"] <= math.log(2) <= found["high"]
    assert hits / 2000 == pytest.approx(found["coverage"], abs=0.015)


def test_peak_memory_is_what_was_held_at_once():
    before = torch.zeros(2_000_000)
    with PeakMemory(CPU) as memory:
        one = torch.empty(1_000_000)  # 4 MB
        three = torch.empty(3, 1_000_000)  # 16 MB together: the peak so far
        del one, before  # what was held before doesn't count
        two = torch.empty(2_000_000)  # 20 MB together: a higher one
        del three
        torch.empty(1_000_000)  # 12 MB
    assert 20_000_000 <= memory.bytes < 20_010_000
    with PeakMemory(CPU) as second:  # whatever the first context left
        torch.empty(1_000_000)
    assert 4_000_000 <= second.bytes < 4_010_000
    assert two.numel() == 2_000_000


def test_one_thread_is_timed_by_the_processor(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    name, clock = pick_clock(CPU)
    began = clock()
    time.sleep(0.05)
    assert name == "processor time" and clock() - began < 0.04
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    name, clock = pick_clock(CPU)
    began = clock()
    time.sleep(0.05)
    assert name == "wall time" and clock() - began >= 0.05


def test_a_result_file_is_gone_on_with_or_refused(tmp_path):
    path = tmp_path / "new" / "result.json"
    result = open_result(path, "first", CPU, {"seed": 0, "sizes": (1, 8)})
    assert result["repeats"] == 0 and not path.exists()
    save_result(path, result | {"repeats": 3})
    again = open_result(path, "second", CPU, {"seed": 0, "sizes": (1, 8)})
    assert again["repeats"] == 3 and again["command"] == "second" and "date" in again
    with pytest.raises(ValueError, match=r"result.json: holds figures with seed = 0, not 1\. Choose another --output"):
        open_result(path, "third", CPU, {"seed": 1, "sizes": (1, 8)})
    save_result(path, json.loads(path.read_text()) | {"versions": {}})
    with pytest.raises(ValueError, match="versions"):
        open_result(path, "fourth", CPU, {"seed": 0, "sizes": (1, 8)})
