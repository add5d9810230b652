"""Decoding beside the stock Qwen2.5-VL on the same weights: time of each phase of an answer, answers a second, memory.

`python -m experiments.benchmark.decoding --backbone small --device cpu --output FILE`

A step is timed where it runs, in `generate`: its time holds the forward pass and all around it. Both classes get the same
stopping criterion, which reads the clock at four moments of an answer, and write the same number of tokens: the end token is
one that no vocabulary holds. Ours begins with a reflection: the start token, S slots, the end token, then text. A latent step
is one whose input is a slot; it is compared with the stock class's text step at the same position. In a round all arms take
turns, and ratios are taken within the round.

The result file is written after every round. Called again with the same options, the program adds the rounds that are missing.
"""

import argparse
import shlex
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from tqdm import tqdm
from transformers import BatchFeature, CompileConfig, StoppingCriteria, StoppingCriteriaList

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.decoding_vreflection import LATENT_FEEDBACK
from vreflection_hub_card.embedded import EMBEDDED_NAME
from vreflection_hub_card.evaluation.provenance import describe_model
from vreflection_hub_card.glyphsearch import draw_question
from vreflection_hub_card.inference.checkpoints import checkpoint_folder, find_device, load_checkpoint
from vreflection_hub_card.inference.encoding import encode_prompts, user_turn

from .backbones import (
    BACKBONES,
    CELL,
    RUNNABLE,
    Backbone,
    count_parameters,
    model_on,
    random_model,
    weight_bytes,
)
from .rounds import PeakMemory, open_result, paired_ratio, pick_clock, rotated, save_result, spread


CLASSES = ("stock", "ours")
PHASES = ("prefill", "text_step", "latent_step")


@dataclass(frozen=True)
class Variant:
    """An attention implementation, a kind of cache, and whether steps are compiled."""

    attention: str
    cache: str = "dynamic"
    compiled: bool = False

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.attention}, {self.cache} cache" + (", compiled" if self.compiled else "")

    @property
    def options(self) -> dict:
        """Arguments of `generate`."""
        options = {"disable_compile": not self.compiled}  # on a GPU a static cache alone would compile
        if self.cache == "static":
            options["cache_implementation"] = "static"
        if self.compiled:
            options["compile_config"] = CompileConfig()
            options["compile_config"]._compile_all_devices = True  # a CPU, too
        return options


VARIANTS = {
    "sdpa": Variant("sdpa"),
    "sdpa_static": Variant("sdpa", "static"),
    "sdpa_compiled": Variant("sdpa", "static", True),
    "eager": Variant("eager"),
    "eager_static": Variant("eager", "static"),
    "eager_compiled": Variant("eager", "static", True),
    "flash_attention_2": Variant("flash_attention_2"),
}
DEFAULT = VARIANTS["sdpa"]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, its processor and folder, what a result says of it, the side of its pictures in merged patches."""

    model: VReflectionForConditionalGeneration
    processor: VReflectionProcessor
    folder: Path
    description: dict
    side: int | None = None


def random_subject(name: str, backbone: Backbone, device: torch.device, seed: int, folder: Path) -> Subject:
    """Random weights, written into `folder` and loaded from there: on a CPU the file is all that holds them."""
    drawn, processor = random_model(backbone, device, seed)
    drawn.save_pretrained(folder)
    del drawn
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype="auto").to(device)
    return Subject(model, processor, folder, {"name": name, "shape": asdict(backbone)}, backbone.side)


class PhaseTimer(StoppingCriteria):
    """Reads the clock once the tokens number `moments` are chosen, and never stops an answer."""

    def __init__(self, clock, moments: tuple[int, ...]):
        self.clock, self.moments = clock, moments
        self.tokens = 0
        self.readings: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.tokens in self.moments:
            self.readings.append(self.clock())
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class DecodingArm:
    """A model of one of the two classes, over our model's weights, that answers in one way."""

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        config: VReflectionConfig,
        name: str,
        variant: Variant,
        latent_feedback: str = "hidden",
    ):
        self.variant = variant
        self.model = model_on(weights, config, name == "stock", variant.attention).eval()
        self.clock = pick_clock(self.model.device)[1]
        self.latent_steps = config.num_latent_tokens
        text = config.text_config
        self.options = variant.options | {
            "do_sample": False,
            "eos_token_id": text.vocab_size,  # no answer stops early
            "pad_token_id": text.pad_token_id,
            "suppress_tokens": [config.latent_start_token_id],  # no reflection but the one that is asked for
        }
        if name != "stock":
            self.options |= {"reflect": True, "latent_steps": self.latent_steps, "latent_feedback": latent_feedback}

    def answer(self, inputs: BatchFeature, text_steps: int) -> dict[str, float]:
        """Answers with the tokens of a reflection and `text_steps` more.

        Returns:
            `dict`: Seconds of the prefill, of a text step, of a latent step, and of the whole answer.
        """
        first, last = 1, self.latent_steps + 1  # the forward passes that read the start token, and the last slot
        timer = PhaseTimer(self.clock, (0, first, last, last + text_steps))
        new_tokens = last + text_steps + 1
        began = self.clock()
        self.model.generate(
            **inputs, **self.options, max_new_tokens=new_tokens, stopping_criteria=StoppingCriteriaList([timer])
        )
        ended = self.clock()
        prompt_read, started, latents_read, text_read = timer.readings
        return {
            "prefill": prompt_read - began,
            "text_step": (text_read - latents_read) / text_steps,
            "latent_step": (latents_read - started) / self.latent_steps,
            "whole": ended - began,
        }


def draw_prompts(subject: Subject, first: int, count: int) -> BatchFeature:
    """A batch of GlyphSearch's questions about the test scenes from `first` on, padded on the left."""
    conversations = []
    for index in range(first, first + count):
        scene, question = draw_question("test", index)
        size = scene.image.size if subject.side is None else (subject.side * CELL,) * 2
        conversations.append(user_turn([scene.image.resize(size)], question.text))
    return encode_prompts(subject.processor, conversations, subject.model.device)


def measure_decoding(
    subject: Subject,
    output: Path,
    *,
    command: str = "",
    repeats: int = 9,
    seed: int = 0,
    text_steps: int = 16,
    variants: tuple[str, ...] = ("sdpa",),
    batch_sizes: tuple[int, ...] = (1,),
    latent_feedback: str = "hidden",
) -> dict:
    """Measures our class beside the stock one, and writes the result file after every round.

    Args:
        subject (`Subject`): The weights.
        output (`Path`): The result file; one of the same settings is gone on with.
        command (`str`, *optional*): What a result says that it was measured by.
        repeats (`int`, *optional*, defaults to 9): Rounds that the file holds at the end.
        seed (`int`, *optional*, defaults to 0): Which of GlyphSearch's test scenes are asked about.
        text_steps (`int`, *optional*, defaults to 16): Text steps of an answer, after its reflection.
        variants (`tuple[str, ...]`, *optional*): Keys of `VARIANTS` beside `"sdpa"`, all at batch 1.
        batch_sizes (`tuple[int, ...]`, *optional*): Batch sizes beside 1, with `"sdpa"`.
        latent_feedback (`str`, *optional*, defaults to `"hidden"`): What a latent step feeds back, or `"dac"`.

    Raises:
        ValueError: A result file of other settings.
    """
    sizes = sorted({1, *batch_sizes})
    chosen = list(dict.fromkeys([DEFAULT, *(VARIANTS[name] for name in variants)]))
    prompts = {size: draw_prompts(subject, seed * max(sizes), size) for size in sizes}
    weights, config, device = subject.model.state_dict(), subject.model.config, subject.model.device
    settings = {
        "seed": seed,
        "model": subject.description,
        "parameters": count_parameters(weights),
        "decoding": {
            "device": device.type,
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "prompt_tokens": prompts[1]["input_ids"].shape[1],
            "image_tokens": int((prompts[1]["input_ids"] == config.image_token_id).sum()),
            "latent_steps": config.num_latent_tokens,
            "latent_feedback": latent_feedback,
            "text_steps": text_steps,
            "variants": [variant.title for variant in chosen],
            "batch_sizes": sizes,
        },
    }
    result = open_result(output, command, device, settings)
    models = {
        (variant.title, name): DecodingArm(weights, config, name, variant, latent_feedback)
        for variant in chosen
        for name in CLASSES
    }
    arms = {(title, 1, name): arm for (title, name), arm in models.items()}
    arms |= {(DEFAULT.title, size, name): models[DEFAULT.title, name] for size in sizes for name in CLASSES}
    for (_, size, _), arm in tqdm(arms.items(), desc="Warm-up"):
        for _ in range(3 if arm.variant.compiled else 1):
            arm.answer(prompts[size], text_steps)
    if "memory" not in result:
        plain = VReflectionConfig.from_dict(
            {**config.to_dict(), "has_bcm": False, "has_dac": latent_feedback == "dac"}
        )
        three = {name: models[DEFAULT.title, name] for name in CLASSES}
        three["inference_only"] = DecodingArm(weights, plain, "inference_only", DEFAULT, latent_feedback)
        result["memory"] = {name: measure_answer_memory(arm, prompts[1], text_steps) for name, arm in three.items()}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result["loading"] = pool.submit(measure_loading, subject.folder).result()
        save_result(output, result)
    seconds = result.setdefault("seconds", {})
    for number in tqdm(range(result["repeats"], repeats), desc="Rounds"):
        measured = {arm: arms[arm].answer(prompts[arm[1]], text_steps) for arm in rotated(arms, number)}
        for (title, size, name), phases in measured.items():
            kept = seconds.setdefault(f"{title}, batch {size}", {}).setdefault(name, {})
            for phase, value in phases.items():
                kept.setdefault(phase, []).append(value)
        result["repeats"] = number + 1
        save_result(output, summarise_decoding(result, chosen, sizes))
    return result


def summarise_decoding(result: dict, variants: list[Variant], sizes: list[int]) -> dict:
    """Adds medians, intervals and ratios of the rounds so far."""
    seconds = result["seconds"]
    result["variants"], result["batches"] = {}, {}
    for variant in variants:
        own = seconds[f"{variant.title}, batch 1"]
        result["variants"][variant.title] = {
            **{name: {phase: spread(own[name][phase]) for phase in PHASES} for name in CLASSES},
            "ratios": {phase: paired_ratio(own["ours"][phase], own["stock"][phase]) for phase in PHASES},
        }
    whole = {size: seconds[f"{DEFAULT.title}, batch {size}"] for size in sizes}
    rates = {(size, name): [size / one for one in whole[size][name]["whole"]] for size in sizes for name in CLASSES}
    for size in sizes:
        result["batches"][str(size)] = {
            **{name: spread(rates[size, name]) for name in CLASSES},
            "ratio": paired_ratio(rates[size, "ours"], rates[size, "stock"]),
            "against_batch_1": paired_ratio(rates[size, "ours"], rates[1, "ours"]),
        }
    return result


def measure_answer_memory(arm: DecodingArm, prompt: BatchFeature, text_steps: int) -> dict:
    """Bytes of the weights, at the peak of an answer beyond them, and both."""
    with PeakMemory(arm.model.device) as memory:
        arm.answer(prompt, text_steps)
    size = weight_bytes(arm.model)
    return {"weights_bytes": size, "peak_bytes": memory.bytes, "all_bytes": size + memory.bytes}


def measure_loading(folder: Path) -> dict:
    """Bytes of a checkpoint's weights, and of resident memory at the peak of loading them onto the CPU and reading them.

    Meant for a process that has done nothing else; what it held before doesn't count.
    """
    process, loaded = psutil.Process(), threading.Event()
    held = [process.memory_info().rss]

    def watch() -> None:
        while not loaded.wait(0.002):
            held.append(process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    model = VReflectionForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for parameter in model.parameters():
        parameter.sum()  # reads it: what is only mapped isn't in memory before
    held.append(process.memory_info().rss)
    loaded.set()
    return {"weights_bytes": weight_bytes(model), "peak_resident_bytes": max(held) - held[0]}


def main(arguments: list[str] | None = None) -> None:
    """`python -m experiments.benchmark.decoding`."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark.decoding",
        description="Measures decoding beside the stock Qwen2.5-VL. With OMP_NUM_THREADS=1 on a CPU it measures the "
        "processor's time, which a busy machine disturbs less.",
    )
    parser.add_argument("model", nargs="?", help="a folder or a Hub id (default: the embedded checkpoint)")
    parser.add_argument("--backbone", choices=RUNNABLE, help="random weights of this size instead of a checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the result file")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds (default: 9)")
    parser.add_argument("--text-steps", type=int, default=16, metavar="N", help="of an answer (default: 16)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sdpa"], help="default: sdpa")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1], metavar="N", help="default: 1")
    parser.add_argument(
        "--latent-feedback",
        choices=LATENT_FEEDBACK,
        default="hidden",
        help="what a latent step is fed (default: hidden)",
    )
    parser.add_argument(
        "--side", type=int, metavar="N", help="of the pictures, in merged patches (default: the backbone's)"
    )
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default: 0)")
    options = vars(parser.parse_args(words))
    name, backbone, device = options.pop("model"), options.pop("backbone"), find_device(options.pop("device"))
    side = options.pop("side")
    if name is not None and backbone is not None:
        parser.error("give either a model or --backbone")
    with tempfile.TemporaryDirectory() as scratch:
        if backbone is not None:
            subject = random_subject(backbone, BACKBONES[backbone], device, options["seed"], Path(scratch))
        else:
            name = name or EMBEDDED_NAME
            folder = checkpoint_folder(name)
            model, processor = load_checkpoint(folder, device)
            subject = Subject(model, processor, folder, describe_model(model, folder, name))
        if side is not None:
            subject = replace(subject, side=side)
        command = shlex.join(["python", "-m", "experiments.benchmark.decoding", *words])
        measure_decoding(subject, command=command, **options)


if __name__ == "__main__":
    main()
