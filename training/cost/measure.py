"""Runs the arms in turns, packs against padding, and holds the figures against the goals."""

import importlib.metadata
import math
import os
import statistics
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np
import torch
from tqdm import tqdm

from vreflection_hub_card.efficiency.goals import judge_figure
from vreflection_hub_card.efficiency.models import count_parameters
from vreflection_hub_card.efficiency.observers import Clock
from vreflection_hub_card.efficiency.rounds import in_turns
from vreflection_hub_card.efficiency.shapes import CELL, Shape
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions
from vreflection_hub_card.evaluation.statistics import median_interval, spread

from ..data.packing import pack_dataset
from .bench import ARMS, BATCH_SIZE, PLAIN, Bench
from .samples import PAPER, VISUAL_COT_NOTE, make_dataset


PACKED_BATCHES = 4  # of BATCH_SIZE samples each, in a round of packing against padding
SIZES = ("tokens", "positions", "labels")
LENGTHS = ("smallest", "median", "percentile_90", "largest")
# Steps of an arm's turn that warm up, and that are timed: on a GPU the trainer empties the cache before each turn.
TURNS = {"cpu": (0, 1), "cuda": (2, 5)}
# The arm, its figure and the bound, against trl's plain fine-tuning and, more strictly, against ours.
GOALS = (
    ("stage1", "speed", ">=", 0.95),
    ("stage2_bcm", "speed", ">=", 0.95),
    ("stage2_dac", "speed", ">=", 0.5),
    ("stage1", "peak_memory", "<=", 1.05),
    ("stage2_bcm", "peak_memory", "<=", 1.05),
)
PACKING_GOAL = 1.3
FIGURES = {"speed": "speed on the same samples", "peak_memory": "peak memory"}


def measure(shape: Shape, device: str = "cpu", repeats: int = 9, seed: int = 0) -> dict:
    """Measures all arms, and packing against padding.

    Args:
        shape (`Shape`): The backbone, of `SHAPES` or another.
        device (`str`, *optional*, defaults to `"cpu"`): `"cpu"` or `"cuda"`.
        repeats (`int`, *optional*, defaults to 9): Rounds.
        seed (`int`, *optional*, defaults to 0): Of weights and samples.

    Returns:
        `dict`: Figures, and what they were measured with; `render` makes a table of it.

    Raises:
        ValueError: No such device, or no round.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: set `--device cpu`, with `--shape small`.")
    place = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shape, place, seed, folder)
        arms = measure_arms(bench, repeats)
        packing = measure_packing(bench, repeats)
    counts = count_parameters(bench.weights)
    packages = ("trl", "accelerate", "datasets")
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "repeats": repeats,
        "steps_per_turn": dict(zip(("warm_up", "timed"), TURNS[device])),
        "versions": describe_versions() | {name: importlib.metadata.version(name) for name in packages},
        "machine": describe_machine(place) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "shape": asdict(shape) | {"parameters": counts},
        "training": {
            "device": device,
            "clock": Clock(place).name,
            "dtype": shape.dtype,
            "autocast": "bfloat16" if device == "cuda" else None,
            "attention": bench.attention,
            "optimiser": "SGD without momentum, gradients clipped to norm 1",
            "frozen": "the vision encoder and its merger, in all arms",
            "labels": "the assistant's tokens, in trl's arm too (`assistant_only_loss`)",
            "batch_size": BATCH_SIZE,
        },
        "arms": arms,
        "packing": packing,
    }
    return {**result, "goals": judge(result)}


def measure_arms(bench: Bench, repeats: int) -> dict:
    """Runs all arms in turns: a warm-up, in which memory is measured, and `repeats` timed rounds."""
    warm_up, timed = TURNS[bench.device.type]
    runners = {name: bench.runner(arm.options, arm.stock) for name, arm in ARMS.items()}

    def datasets(number: int, count: int) -> dict:
        rows = bench.rows(number, count * BATCH_SIZE)
        return {True: make_dataset(rows, False), False: make_dataset(rows, True)}

    data = datasets(0, 2)
    observed = {
        name: runners[name].observe(data[arm.stock]) for name, arm in tqdm(ARMS.items(), desc="Warm-up, memory")
    }
    rounds = {name: [] for name in ARMS}
    for number in tqdm(range(1, repeats + 1), desc="Rounds"):
        data = datasets(number, warm_up + timed)
        for name in in_turns(ARMS, number):
            steps = runners[name].run(data[ARMS[name].stock])
            rounds[name].append(summarise_round(steps[warm_up:]))
    return {name: describe_arm(name, observed, rounds) for name in ARMS}


def summarise_round(steps: list[dict]) -> dict:
    """Sums of sizes and seconds, and the median step."""
    total = {key: sum(step[key] for step in steps) for key in steps[0]}
    return {**total, "step_seconds": statistics.median(step["seconds"] for step in steps), "steps": len(steps)}


def describe_arm(name: str, observed: dict, rounds: dict) -> dict:
    """All figures of an arm; ratios are taken within each round."""
    arm, own = ARMS[name], rounds[name]
    against = {}
    for other in arm.against:
        pairs = list(zip(own, rounds[other], strict=True))
        against[other] = {
            "speed": median_interval([theirs["step_seconds"] / ours["step_seconds"] for ours, theirs in pairs]),
            "tokens_per_second": median_interval([throughput(ours) / throughput(theirs) for ours, theirs in pairs]),
            "peak_memory": observed[name]["peak_memory_bytes"] / observed[other]["peak_memory_bytes"],
        }
    return {
        "title": arm.title,
        "options": arm.options,
        "gradient_checkpointing": arm.options.get("gradient_checkpointing", True),
        "step_seconds": spread([one["step_seconds"] for one in own]),
        "tokens_per_second": spread([throughput(one) for one in own]),
        **{f"{size}_per_step": sum(one[size] for one in own) / sum(one["steps"] for one in own) for size in SIZES},
        **observed[name],
        "against": against,
    }


def measure_packing(bench: Bench, repeats: int) -> dict:
    """Stage 1 on Visual CoT's mix of lengths: packs of at most 4 samples against padded batches of 4, of the same samples."""
    divisor = bench.shape.mix_divisor
    limits = {name: PAPER[name] // divisor for name in ("max_length", "long_sample_length")}
    packing = {"sample_packing": True, "max_samples_per_pack": BATCH_SIZE, "per_device_train_batch_size": 1, **limits}
    runners = {"padded": bench.runner({"stage": "1"}), "packed": bench.runner({"stage": "1", **packing})}
    rounds = {name: [] for name in runners}
    lengths = []
    for number in tqdm(range(repeats + 1), desc="Packing"):
        rows = make_dataset(bench.mixed_rows(number, (PACKED_BATCHES if number else 1) * BATCH_SIZE), True)
        packs, _ = pack_dataset(rows, bench.processor, runners["packed"].trainer.args)
        data = {"padded": rows, "packed": packs}
        for name in sorted(runners, reverse=number % 2 == 0):
            steps = runners[name].run(data[name])
            if number:  # the first is a warm-up
                rounds[name].append(summarise_round(steps))
        if number:
            lengths += [math.prod(side // CELL for side in row["images"][0].size) for row in rows]
    return {
        "distribution": VISUAL_COT_NOTE,
        "divisor": divisor,
        "limits": limits,
        "batch_size": BATCH_SIZE,
        "samples_per_round": PACKED_BATCHES * BATCH_SIZE,
        "patches": {name: float(value) for name, value in zip(LENGTHS, np.percentile(lengths, (0, 50, 90, 100)))},
        **{
            name: {
                "tokens_per_second": spread([throughput(one) for one in own]),
                "padding": 1 - sum(one["tokens"] for one in own) / sum(one["positions"] for one in own),
                "steps_per_round": sum(one["steps"] for one in own) / len(own),
            }
            for name, own in rounds.items()
        },
        "speed": median_interval(
            [throughput(packed) / throughput(padded) for packed, padded in zip(rounds["packed"], rounds["padded"])]
        ),
    }


def throughput(one: dict) -> float:
    """Useful tokens a second, without padding."""
    return one["tokens"] / one["seconds"]


def judge(result: dict) -> list[dict]:
    """Compares the figures with the goals."""
    found = []
    for arm, figure, relation, bound in GOALS:
        for other in PLAIN:
            value = result["arms"][arm]["against"][other][figure]
            value = value["median"] if figure == "speed" else value
            found.append((f"`{arm}`: {FIGURES[figure]}, `{other}` = 1", value, relation, bound))
    for name, arm in result["arms"].items():
        if not ARMS[name].stock:
            tensor = arm["largest_vocabulary_tensor"]
            share = tensor["rows"] / tensor["positions"]
            found.append((f"`{name}`: vocabulary-wide rows, share of the positions", share, "<", 1))
    found.append(("packing: useful tokens/s, padding = 1", result["packing"]["speed"]["median"], ">=", PACKING_GOAL))
    return [judge_figure(*one) for one in found]
