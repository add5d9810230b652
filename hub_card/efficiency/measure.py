"""Rounds in which both models take turns, and what their ratios say."""

import datetime
import importlib.util

import torch
from tqdm import tqdm

from ..evaluation.provenance import describe_machine, describe_versions
from ..evaluation.statistics import median_interval, spread
from .bench import Pair, Timing
from .instruments import PeakMemory


FIGURES = ("prefill", "text_step", "latent_step")
BATCH_SIZES = (1, 8, 32)
# Words after the reflection whose steps are timed.
WORDS = 16
# The figure, the bound of the median ratio to the stock class; a goal on GPUs alone.
GOALS = {"prefill": 1.02, "text_step": 1.02, "latent_step": 1.00, "peak_memory": 1.01}
BATCH_GOAL = 4.0


def ways(device: torch.device) -> tuple[list[tuple[str, dict]], list[str]]:
    """Attention and `generate`'s options of each way to decode that is measured, and the names of those that can't be."""
    plain = [("eager", {}), ("sdpa", {}), ("sdpa", {"cache_implementation": "static", "disable_compile": True})]
    compiled, flash = ("sdpa", {"cache_implementation": "static"}), ("flash_attention_2", {})
    if device.type != "cuda":  # transformers compiles by itself on GPUs only
        return plain, [way_name(*compiled), way_name(*flash)]
    if importlib.util.find_spec("flash_attn") is None:
        return [*plain, compiled], [way_name(*flash)]
    return [*plain, compiled, flash], []


def way_name(attention: str, options: dict) -> str:
    """A way's name in results."""
    cache = options.get("cache_implementation", "dynamic")
    compiled = ", compiled" if cache == "static" and not options.get("disable_compile") else ""
    return f"{attention}, {cache} cache{compiled}"


@torch.no_grad()
def measure(pair: Pair, rounds: int = 7, batch_sizes: tuple[int, ...] = BATCH_SIZES, latent_steps: int = 8) -> dict:
    """Measures a pair.

    Args:
        pair (`Pair`): Both models.
        rounds (`int`, *optional*, defaults to 7): Rounds of each way and batch size, after one that warms up.
        batch_sizes (`tuple[int]`, *optional*): Whole answers are timed at these.
        latent_steps (`int`, *optional*, defaults to 8): S.

    Returns:
        `dict`: The figures, ready for JSON; `render` makes tables of it.
    """
    device = pair.ours.device
    chosen, left_out = ways(device)
    figures = {}
    with tqdm(total=(len(chosen) + len(batch_sizes)) * (rounds + 1), unit="round") as progress:
        for attention, options in chosen:
            pair.set_attention(attention)
            name = way_name(attention, options)
            progress.set_description(name)
            figures[name] = measure_steps(pair, rounds, latent_steps, options, progress)
        pair.set_attention("sdpa")
        answers = {}
        for batch_size in batch_sizes:
            progress.set_description(f"batch size {batch_size}")
            answers[str(batch_size)] = measure_answers(pair, rounds, latent_steps, batch_size, progress)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": pair.seed,
        "rounds": rounds,
        "clock": pair.clock.name,
        "versions": describe_versions(),
        "machine": describe_machine(device),
        "dtype": str(pair.ours.dtype).removeprefix("torch."),
        "prompt": {"words": pair.words, "picture_tokens": pair.side**2},
        "latent_steps": latent_steps,
        "words": WORDS,
        "vocabulary": pair.ours.config.get_text_config().vocab_size,
        "parameters": count_parameters(pair),
        "peak_memory": measure_memory(pair, latent_steps),
        "steps": figures,
        "answers": answers,
        "not_run": left_out,
    }
    return result | {"goals": judge(result)}


def measure_steps(pair: Pair, rounds: int, latent_steps: int, options: dict, progress: tqdm) -> dict:
    """Seconds of prefill and steps at batch size 1, and ratios to the stock class within each round."""
    inputs = pair.prompts(1)
    found: list[tuple[Timing, Timing]] = []
    for number in range(rounds + 1):
        order = (True, False) if number % 2 else (False, True)
        timed = {ours: pair.time(ours, inputs, latent_steps, WORDS, **options) for ours in order}
        found.append((timed[True], timed[False]))
        progress.update()
    found = found[1:]  # the first warms up
    result = {}
    for figure in FIGURES:
        # A latent step is compared with the stock class's text step.
        theirs = "text_step" if figure == "latent_step" else figure
        pairs = [(getattr(mine, figure), getattr(stock, theirs)) for mine, stock in found]
        result[figure] = {
            "ours": spread([mine for mine, _ in pairs]),
            "stock": spread([stock for _, stock in pairs]),
            "ratio": median_interval([mine / stock for mine, stock in pairs]),
        }
    return result


def measure_answers(pair: Pair, rounds: int, latent_steps: int, batch_size: int, progress: tqdm) -> dict:
    """Whole answers a second, and whether each row's answer is the one that it gets alone."""
    inputs = pair.prompts(batch_size)
    seconds = {True: [], False: []}
    for number in range(rounds + 1):
        for ours in (True, False) if number % 2 else (False, True):
            timing = pair.time(ours, inputs, latent_steps, WORDS)
            if ours:
                sequences = timing.sequences
            if number:
                seconds[ours].append(timing.total)
        progress.update()
    alone = [pair.time(True, row, latent_steps, WORDS).sequences for row in rows_of(inputs)]
    same = [bool(torch.equal(one[0], sequences[row])) for row, one in enumerate(alone)]
    return {
        "ours": spread([batch_size / one for one in seconds[True]]),
        "stock": spread([batch_size / one for one in seconds[False]]),
        "ratio": median_interval([theirs / mine for mine, theirs in zip(seconds[True], seconds[False], strict=True)]),
        "same_as_alone": sum(same),
        "count": batch_size,
    }


def rows_of(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The prompts of a batch, each a batch of its own."""
    count = len(inputs["input_ids"])
    split = {name: tensor.chunk(count) for name, tensor in inputs.items()}
    return [{name: chunks[row] for name, chunks in split.items()} for row in range(count)]


def measure_memory(pair: Pair, latent_steps: int) -> dict:
    """The peak beyond the weights in one answer, in bytes, and the ratio with the weights counted in."""
    inputs, bytes_of = pair.prompts(1), {}
    for ours in (False, True):
        with PeakMemory(pair.ours.device) as memory:
            pair.time(ours, inputs, latent_steps, WORDS)
        bytes_of["ours" if ours else "stock"] = memory.bytes
    parameters = count_parameters(pair)
    weights = {name: parameters[name] * pair.ours.dtype.itemsize for name in ("ours", "stock")}
    # Inference-only checkpoints have the stock weights.
    return bytes_of | {
        "ratio": (bytes_of["ours"] + weights["stock"]) / (bytes_of["stock"] + weights["stock"]),
        "ratio_with_modules": (bytes_of["ours"] + weights["ours"]) / (bytes_of["stock"] + weights["stock"]),
    }


def count_parameters(pair: Pair) -> dict:
    """Parameters of both models, and what BCM and DAC add."""
    ours, stock = (sum(weight.numel() for weight in model.parameters()) for model in (pair.ours, pair.stock))
    added = ours - stock
    return {"ours": ours, "stock": stock, "added": added, "share": added / stock, "bf16_megabytes": added * 2 / 1e6}


def judge(result: dict) -> list[dict]:
    """Compares the figures of sdpa with a dynamic cache, and memory, with the goals."""
    steps = result["steps"]["sdpa, dynamic cache"]
    found = [(figure, steps[figure]["ratio"]["median"], "<=", GOALS[figure]) for figure in FIGURES]
    found.append(("peak memory, inference only", result["peak_memory"]["ratio"], "<=", GOALS["peak_memory"]))
    if "gpu" in result["machine"] and {"1", "8"} <= set(result["answers"]):
        one, eight = (result["answers"][size]["ours"]["median"] for size in ("1", "8"))
        found.append(("answers a second at batch size 8, batch size 1 = 1", eight / one, ">=", BATCH_GOAL))
    return [
        {
            "goal": name,
            "value": value,
            "bound": f"{relation} {bound}",
            "met": value <= bound if relation == "<=" else value >= bound,
        }
        for name, value, relation, bound in found
    ]
