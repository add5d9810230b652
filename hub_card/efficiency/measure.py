"""Runs both classes in turns, and holds the figures against the goals."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import is_flash_attn_2_available

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor

from ..errors import InputError
from ..evaluation.provenance import describe_machine, describe_model, describe_versions
from ..evaluation.statistics import median_interval, spread
from .contenders import CLASSES, PHASES, Contender, Variant
from .goals import judge_figure
from .headroom import measure_forward_share, measure_one_graph, measure_projection
from .loading import measure_loading
from .models import count_parameters, draw_weights, weight_bytes
from .observers import Clock, PeakMemory
from .questions import draw_conversations, make_inputs
from .rounds import in_turns
from .shapes import Shape, build_config, build_processor


ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
CACHES = ("dynamic", "static")
# The largest is also the number of questions whose answers are compared.
BATCH_SIZES = (1, 8, 32)
# Questions of a timed round at batch 1: as many as in one batch of the next size.
SINGLE_QUESTIONS = 8
DEFAULT = Variant("sdpa", "dynamic")
COMPILED = Variant("sdpa", "static", True)
TITLES = {"prefill": "prefill", "text_step": "text step", "latent_step": "latent step"}
GOALS = (
    ("prefill", "<=", 1.02),
    ("text_step", "<=", 1.02),
    ("latent_step", "<=", 1.0),
    ("latent_step", "<", 0.95),
)
MEMORY_GOAL = 1.01
EQUAL = 1.001  # the fed-back state itself is a few kilobytes
BATCH_GOAL = 4.0
LOADING_GOAL = 1.1
PROJECTIONS = 20
# Below it, what loading itself needs hides the weights.
LOADING_JUDGED_FROM = 500_000_000


@dataclass(frozen=True)
class Subject:
    """What is measured: one set of weights.

    Args:
        weights (`dict[str, torch.Tensor]`): Our model's state dict, on the device.
        config (`VReflectionConfig`): Its configuration.
        processor (`VReflectionProcessor`): Its processor.
        description (`dict`): What a result says of it.
        folder (`Path`): The checkpoint's folder.
        side (`int`, *optional*): Side of the pictures in merged patches.
    """

    weights: dict[str, torch.Tensor]
    config: VReflectionConfig
    processor: VReflectionProcessor
    description: dict
    folder: Path
    side: int | None = None


def checkpoint_subject(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    folder: Path,
    name: str | None = None,
    side: int | None = None,
) -> Subject:
    """A loaded checkpoint."""
    return Subject(model.state_dict(), model.config, processor, describe_model(model, folder, name), folder, side)


def shape_subject(
    name: str, shape: Shape, device: torch.device, seed: int, folder: Path, side: int | None = None
) -> Subject:
    """Random weights of a shape, written into `folder` and loaded from there: on a CPU the file is all that holds them.

    Raises:
        InputError: No room for them.
    """
    processor = build_processor()
    drawn = draw_weights(build_config(shape, processor), getattr(torch, shape.dtype), device, seed)
    try:
        drawn.save_pretrained(folder, max_shard_size="5GB")
    except (OSError, SafetensorError) as error:
        size = weight_bytes(drawn) / 1e9
        raise InputError(
            f"{folder}: {size:.1f} GB of weights can't be written there ({error}); TMPDIR=FOLDER sets another folder"
        ) from error
    del drawn
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype="auto").to(device)
    description = {
        "name": name,
        "shape": asdict(shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": shape.dtype,
    }
    return Subject(model.state_dict(), model.config, processor, description, folder, side or shape.side)


def measure(
    subject: Subject,
    device: torch.device,
    repeats: int = 9,
    seed: int = 0,
    text_steps: int = 16,
    compiled: bool = False,
    attentions: tuple[str, ...] = ATTENTIONS,
    caches: tuple[str, ...] = CACHES,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
) -> dict:
    """Measures our class beside the stock one.

    Args:
        subject (`Subject`): The weights.
        device (`torch.device`): Where they lie.
        repeats (`int`, *optional*, defaults to 9): Timed rounds.
        seed (`int`, *optional*, defaults to 0): Which of GlyphSearch's test scenes are asked about.
        text_steps (`int`, *optional*, defaults to 16): Text steps of an answer, after its reflection.
        compiled (`bool`, *optional*, defaults to `False`): Compile, too, where the cache is static.
        attentions (`tuple[str, ...]`, *optional*): Attention implementations beside the first of `ATTENTIONS`.
        caches (`tuple[str, ...]`, *optional*): Kinds of cache beside `"dynamic"`.
        batch_sizes (`tuple[int, ...]`, *optional*): Batch sizes, 1 among them.

    Returns:
        `dict`: Figures, and what they were measured with; `render` makes tables of it.

    Raises:
        ValueError: No round, no text step.
        InputError: Pictures of a size that the processor doesn't leave as it is.
    """
    for name, value in (("repeats", repeats), ("text_steps", text_steps)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    count = max(batch_sizes)
    conversations = draw_conversations(seed * count, count, subject.side)

    def inputs(first: int, size: int):
        return make_inputs(subject.processor, conversations[first : first + size], device)

    def contender(ours: bool, variant: Variant) -> Contender:
        return Contender(subject.weights, subject.config, ours, variant, device)

    prompt = inputs(0, 1)
    image_tokens = int((prompt["input_ids"] == subject.config.image_token_id).sum())
    if subject.side is not None and image_tokens != subject.side**2:
        raise InputError(
            f"pictures of {subject.side} by {subject.side} merged patches: the processor makes {image_tokens} patches of one"
        )
    variants, not_run = list_variants(subject, device, compiled, attentions, caches)
    steps = measure_steps(contender, variants, not_run, prompt, repeats, text_steps)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "repeats": repeats,
        "versions": describe_versions(),
        "machine": describe_machine(device) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "model": subject.description,
        "decoding": {
            "device": device.type,
            "clock": Clock(device).name,
            "dtype": str(subject.weights["lm_head.weight"].dtype).removeprefix("torch."),
            "prompt_tokens": prompt["input_ids"].shape[1],
            "image_tokens": image_tokens,
            "latent_steps": subject.config.num_latent_tokens,
            "text_steps": text_steps,
        },
        "parameters": describe_parameters(subject.weights),
        "variants": steps,
        "not_run": not_run,
        "memory": measure_memory(subject, contender, prompt, text_steps, device),
        "batches": measure_batches(subject, contender, inputs, batch_sizes, repeats, text_steps),
        "headroom": measure_headroom(contender, steps, prompt, batch_sizes, repeats, text_steps),
        "loading": measure_loading(subject.folder),
    }
    return {**result, "goals": judge(result)}


def describe_parameters(weights: dict[str, torch.Tensor]) -> dict:
    """Our parameters, and what BCM and DAC add to the stock model's."""
    counts = count_parameters(weights)
    overhead = counts["bcm"] + counts["dac"]
    stock = counts["all"] - overhead
    return {
        **counts,
        "stock": stock,
        "overhead": overhead,
        "overhead_share": overhead / stock,
        "overhead_megabytes_bf16": 2 * overhead / 1e6,
    }


def list_variants(
    subject: Subject, device: torch.device, compiled: bool, attentions: tuple[str, ...], caches: tuple[str, ...]
) -> tuple[list[Variant], dict[str, str]]:
    """The variants to measure, the default first, and why others are not."""
    found = [DEFAULT]
    not_run = {name: "not asked for" for name in ATTENTIONS if name not in (*attentions, DEFAULT.attention)}
    not_run |= {f"{name} cache": "not asked for" for name in CACHES if name not in (*caches, DEFAULT.cache)}
    half = subject.weights["lm_head.weight"].dtype in (torch.float16, torch.bfloat16)
    for attention in attentions:
        if attention == "flash_attention_2" and not (is_flash_attn_2_available() and device.type == "cuda" and half):
            missing = "needs the package flash-attn, a GPU and weights in half precision"
            not_run[attention] = missing
            continue
        found += [Variant(attention, cache) for cache in caches]
        if "static" in caches and attention != "flash_attention_2":
            if compiled:
                found.append(Variant(attention, "static", True))
            else:
                not_run[Variant(attention, "static", True).title] = "not asked for (`--compile`)"
    return list(dict.fromkeys(found)), not_run


def measure_steps(
    contender: Callable[[bool, Variant], Contender],
    variants: list[Variant],
    not_run: dict[str, str],
    prompt: dict,
    repeats: int,
    text_steps: int,
) -> dict:
    """Times the phases of an answer at batch 1, both classes in turns; `not_run` gets the variants that failed."""
    contenders = {}
    for variant in tqdm(variants, desc="Warm-up"):
        pair = {(variant.title, name): contender(name == "ours", variant) for name in CLASSES}
        try:
            for one in pair.values():
                for _ in range(3 if variant.compiled else 1):
                    one.answer(prompt, text_steps)
        except Exception as error:  # whatever a compiler says; a variant that should run without one must
            if not variant.compiled:
                raise
            not_run[variant.title] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        contenders |= pair
    rounds = {key: [] for key in contenders}
    for number in tqdm(range(repeats), desc="Rounds"):
        for key in in_turns(contenders, number):
            rounds[key].append(contenders[key].answer(prompt, text_steps)[1])
    return {
        variant.title: {**asdict(variant), **describe_pair(*(rounds[variant.title, name] for name in CLASSES))}
        for variant in variants
        if (variant.title, "ours") in rounds
    }


def describe_pair(stock: list[dict], ours: list[dict]) -> dict:
    """The seconds of both, and the ratios, which are taken within each round."""
    return {
        "stock": {phase: spread([one[phase] for one in stock]) for phase in PHASES},
        "ours": {phase: spread([one[phase] for one in ours]) for phase in PHASES},
        "ratios": {
            phase: median_interval([own[phase] / theirs[phase] for own, theirs in zip(ours, stock, strict=True)])
            for phase in PHASES
        },
    }


def measure_memory(
    subject: Subject,
    contender: Callable[[bool, Variant], Contender],
    prompt: dict,
    text_steps: int,
    device: torch.device,
) -> dict:
    """Bytes of the weights and, at the peak of an answer, beyond them."""
    plain = VReflectionConfig.from_dict({**subject.config.to_dict(), "has_bcm": False, "has_dac": False})
    contenders = {
        "stock": contender(False, DEFAULT),
        "ours": contender(True, DEFAULT),
        "inference_only": Contender(subject.weights, plain, True, DEFAULT, device),
    }
    found = {}
    for name, one in tqdm(contenders.items(), desc="Memory"):
        with PeakMemory(device) as memory:
            one.answer(prompt, text_steps)
        weights = weight_bytes(one.model)
        found[name] = {"weights_bytes": weights, "peak_bytes": memory.bytes, "all_bytes": weights + memory.bytes}
    for name in ("ours", "inference_only"):
        for kind in ("peak", "all"):
            found[name][f"{kind}_ratio"] = found[name][f"{kind}_bytes"] / found["stock"][f"{kind}_bytes"]
    return found


def measure_batches(
    subject: Subject,
    contender: Callable[[bool, Variant], Contender],
    inputs: Callable,
    batch_sizes: tuple[int, ...],
    repeats: int,
    text_steps: int,
) -> dict:
    """Answers a second at each batch size, both classes in turns; and whether ours answers as it does one by one."""
    contenders = {name: contender(name == "ours", DEFAULT) for name in CLASSES}
    count = max(batch_sizes)
    end_ids = (subject.config.text_config.eos_token_id, subject.config.text_config.pad_token_id)
    answers = {
        size: [
            until_end(row, end_ids)
            for first in range(0, count, size)
            for row in contenders["ours"].answer(inputs(first, min(size, count - first)), text_steps)[0].tolist()
        ]
        for size in tqdm(batch_sizes, desc="Answers")
    }
    batches = {
        size: [inputs(first, size) for first in range(0, max(size, min(count, SINGLE_QUESTIONS)), size)]
        for size in batch_sizes
    }
    for size in batch_sizes:
        contenders["stock"].answer(batches[size][0], text_steps)  # warms up
    rates = {(size, name): [] for size in batch_sizes for name in CLASSES}
    for number in tqdm(range(repeats), desc="Batches"):
        for size, name in in_turns(rates, number):
            seconds = sum(contenders[name].answer(batch, text_steps)[1]["whole"] for batch in batches[size])
            rates[size, name].append(sum(len(batch["input_ids"]) for batch in batches[size]) / seconds)
    return {
        str(size): {
            **{name: spread(rates[size, name]) for name in CLASSES},
            "ratio": median_interval([a / b for a, b in zip(rates[size, "ours"], rates[size, "stock"])]),
            "against_batch_1": median_interval([a / b for a, b in zip(rates[size, "ours"], rates[1, "ours"])]),
            "same_answers": sum(a == b for a, b in zip(answers[size], answers[1], strict=True)),
            "questions": count,
        }
        for size in batch_sizes
    }


def measure_headroom(
    contender: Callable[[bool, Variant], Contender],
    variants: dict,
    prompt: dict,
    batch_sizes: tuple[int, ...],
    repeats: int,
    text_steps: int,
) -> dict:
    """What projecting fewer rows could save, and one graph of all latent steps where `COMPILED` was measured."""
    ours = contender(True, DEFAULT)
    found = {
        "half_of_the_rows": {
            str(size): measure_projection(ours.model.lm_head, size, ours.clock, PROJECTIONS)
            for size in batch_sizes
            if size > 1
        },
        "forward_share": measure_forward_share(ours, prompt, text_steps, repeats),
    }
    if COMPILED.title in variants:
        length = prompt["input_ids"].shape[1] + text_steps
        found["one_graph"] = measure_one_graph(contender(True, COMPILED), length, PROJECTIONS)
    return found


def until_end(tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    """The tokens of an answer, without those after its end."""
    ends = [index for index, token in enumerate(tokens) if token in end_ids]
    return tokens[: ends[0]] if ends else tokens


def judge(result: dict) -> list[dict]:
    """Compares the figures with the goals."""
    ratios, memory, batches = result["variants"][DEFAULT.title]["ratios"], result["memory"], result["batches"]
    found = [(f"{TITLES[phase]}, stock = 1", ratios[phase]["median"], *bound) for phase, *bound in GOALS]
    found += [
        ("peak memory beyond the weights, stock = 1", memory["ours"]["peak_ratio"], "<=", MEMORY_GOAL),
        ("peak memory with the weights, stock = 1", memory["ours"]["all_ratio"], "<=", MEMORY_GOAL),
        ("the same, inference-only", memory["inference_only"]["all_ratio"], "<=", EQUAL),
    ]
    found += [
        (f"answers at batch {size} that are those at batch 1", one["same_answers"] / one["questions"], ">=", 1.0)
        for size, one in batches.items()
        if size != "1"
    ]
    if "8" in batches and result["decoding"]["device"] == "cuda":
        found.append(
            ("answers/s at batch 8, batch 1 = 1", batches["8"]["against_batch_1"]["median"], ">=", BATCH_GOAL)
        )
    loading = result["loading"]
    if loading is not None and loading["weights_bytes"] >= LOADING_JUDGED_FROM:
        share = loading["peak_resident_bytes"] / loading["weights_bytes"]
        found.append(("peak memory of loading, weights = 1", share, "<=", LOADING_GOAL))
    return [judge_figure(*one) for one in found]
