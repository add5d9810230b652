"""One question answered twice, with latent steps and by the plain backbone, as text that grows while it is written."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from ..inference.attention_maps import Reflection, offered_sources
from ..inference.encoding import user_turn
from ..inference.look import Look, look


MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Progress:
    """What is known of the two answers so far; it holds nothing that lives on a GPU.

    Args:
        answer (`str`): The text of the answer with latent steps.
        maps (`list[np.ndarray]`, *optional*): Once that answer is whole: the map (S, h, w) of each of its reflections.
        plain (`str`, *optional*): The plain backbone's text, once it has begun.
    """

    answer: str
    maps: list[np.ndarray] | None = None
    plain: str | None = None


class Cancelled(StoppingCriteria):
    """Ends the decoding when `event` is set: whoever asked has left, and others wait."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def shown_source(model: VReflectionForConditionalGeneration) -> str:
    """The source of attention that is shown: DAC's, or the language model's own where the checkpoint has no DAC."""
    return offered_sources(model.config)[0]


def answer_twice(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    picture: Image.Image,
    question: str,
    latent_steps: int,
    latent_feedback: str,
    always_reflect: bool = False,
) -> Iterator[Progress]:
    """Answers with latent steps, then without; the maps come from the run that gave the first answer.

    Args:
        model (`VReflectionForConditionalGeneration`): The model. Two runs at once would mix: see `stream_look`.
        processor (`VReflectionProcessor`): Its processor.
        picture (`Image.Image`): The picture, RGB.
        question (`str`): The question.
        latent_steps (`int`): S, at least 1.
        latent_feedback (`str`): `"hidden"` or `"dac"`.
        always_reflect (`bool`, *optional*, defaults to `False`): Whether to begin with a reflection, else the model
            decides.

    Returns:
        `Iterator[Progress]`: One for each piece of text, and one when the maps are there.

    Raises:
        ValueError: Options that `generate` refuses.
    """
    messages = user_turn([picture], question)
    source = shown_source(model)
    options = {"latent_steps": latent_steps, "latent_feedback": latent_feedback, "reflect": always_reflect or None}
    for seen in stream_look(model, processor, messages, (source,), **options):
        yield Progress(seen if isinstance(seen, str) else seen.answer)
    done = Progress(seen.answer, [as_array(reflection, source) for reflection in seen.reflections])
    yield done
    for seen in stream_look(model, processor, messages, (), latent_steps=0):
        yield Progress(done.answer, done.maps, seen if isinstance(seen, str) else seen.answer)


def as_array(reflection: Reflection, source: str) -> np.ndarray:
    """The map (S, h, w) of a reflection about a single picture."""
    return reflection.maps[source][0].numpy()


def stream_look(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    messages: list[dict],
    sources: tuple[str, ...],
    **options,
) -> Iterator[str | Look]:
    """`look`, with the text so far again and again before what `look` returns.

    `look` reads the model's attention by a hook and switches its implementation for a moment, so a model answers one
    question at a time. A caller that stops iterating ends the decoding.
    """
    left = threading.Event()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    criteria = StoppingCriteriaList([Cancelled(left)])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "streamer": streamer, "stopping_criteria": criteria, **options}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(look, model, processor, messages, sources, **options)
        run.add_done_callback(lambda _: streamer.end())  # an error, too, must end the loop below
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield text
            yield run.result()
        finally:
            left.set()
