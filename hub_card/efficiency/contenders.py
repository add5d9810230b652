"""The two classes on one set of weights, and the times of the phases of an answer.

A step is timed where it really runs, in `generate`: its time holds the forward pass and everything around it, the hooks,
the logits processors, the choice of a token, the stopping criteria. Both classes get the same logits processor of ours,
which reads the clock at four moments of an answer, and so waits for the device only there. Both produce the same number of
tokens, however they answer: the end token is one that no vocabulary holds, and no row begins a second reflection. Ours is
made to begin with a reflection (`reflect=True`), so that the answer's tokens are the start token, S slots, the end token,
and text. A latent step is one whose input is a slot, and it is held against the stock class's text step at the same
position, with a cache of the same length; likewise the text steps after it.
"""

from dataclasses import dataclass

import torch
from transformers import (
    BatchFeature,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
)

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration

from .models import model_on
from .observers import Clock
from .shapes import stock_config


CLASSES = ("stock", "ours")
PHASES = ("prefill", "text_step", "latent_step")


@dataclass(frozen=True)
class Variant:
    """One way of computing the same.

    Args:
        attention (`str`): The attention implementation.
        cache (`str`): `"dynamic"` or `"static"`.
        compiled (`bool`, *optional*, defaults to `False`): Whether steps are compiled.
    """

    attention: str
    cache: str
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


class PhaseClock(LogitsProcessor):
    """Reads the clock after some of an answer's tokens were computed, and forbids the model to open a reflection.

    Args:
        clock (`Clock`): The clock.
        moments (`tuple[int, ...]`): Before which tokens are chosen, counted from 0.
        start_id (`int`): The token that opens a reflection.
    """

    def __init__(self, clock: Clock, moments: tuple[int, ...], start_id: int):
        self.clock = clock
        self.moments = moments
        self.start_id = start_id
        self.tokens = 0
        self.readings: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.tokens in self.moments:
            self.readings.append(self.clock.now())
        self.tokens += 1
        scores[:, self.start_id] = float("-inf")
        return scores


class Contender:
    """A model of one of the two classes that answers in one way.

    Args:
        weights (`dict[str, torch.Tensor]`): Ours, which both classes share.
        config (`VReflectionConfig`): Our model's configuration.
        ours (`bool`): Whether it is our class.
        variant (`Variant`): How it computes.
        device (`torch.device`): Where the weights lie.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        config: VReflectionConfig,
        ours: bool,
        variant: Variant,
        device: torch.device,
    ):
        self.variant = variant
        self.clock = Clock(device)
        self.latent_steps = config.num_latent_tokens
        self.start_id = config.latent_start_token_id
        if ours:
            self.model = model_on(weights, VReflectionForConditionalGeneration, config, device, variant.attention)
        else:
            stock = stock_config(config)
            self.model = model_on(weights, Qwen2_5_VLForConditionalGeneration, stock, device, variant.attention)
        self.model.eval()
        text = config.text_config
        self.options = {
            "do_sample": False,
            "eos_token_id": text.vocab_size,  # nobody stops early
            "pad_token_id": text.pad_token_id,
            **variant.options,
        }
        if ours:
            self.options |= {"reflect": True, "latent_steps": self.latent_steps, "latent_feedback": "hidden"}

    def answer(self, inputs: BatchFeature, text_steps: int) -> tuple[torch.LongTensor, dict[str, float]]:
        """Answers with the tokens of a reflection and `text_steps` more.

        Returns:
            `tuple`: The new tokens, and seconds: of the prefill, of a text step, of a latent step, of the whole answer.
        """
        first, last = 1, self.latent_steps + 1  # the forward passes that read the start token, and the last slot
        clock = PhaseClock(self.clock, (0, first, last, last + text_steps), self.start_id)
        began = self.clock.now()
        sequences = self.model.generate(
            **inputs,
            **self.options,
            max_new_tokens=last + text_steps + 1,
            logits_processor=LogitsProcessorList([clock]),
        )
        ended = self.clock.now()
        filled, started, thought, said = clock.readings
        return sequences[:, inputs["input_ids"].shape[1] :], {
            "prefill": filled - began,
            "text_step": (said - thought) / text_steps,
            "latent_step": (thought - started) / self.latent_steps,
            "whole": ended - began,
        }
