"""One question answered with latent steps, with zeroed latents and by the plain backbone, as text that grows."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from ..evaluation.interventions import replace_latents
from ..inference.attention_maps import offered_sources
from ..inference.encoding import user_turn
from ..inference.look import Look, look


MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Progress:
    """What is known of the answers so far; nothing in it lives on a GPU, since ZeroGPU hands it to another process."""

    answer: str  # with latent steps
    maps: list[np.ndarray] | None = None  # (S, h, w) of each of its reflections, once it is whole
    zeroed: str | None = None  # with zeros for latents, once it has begun
    plain: str | None = None  # without latent steps, once it has begun


def answer_each_way(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    picture: Image.Image,
    question: str,
    latent_steps: int,
    latent_feedback: str,
    always_reflect: bool = False,
    zeroed: bool = False,
) -> Iterator[Progress]:
    """Answers with latent steps, with zeros in their place if `zeroed`, and without any.

    Yields a `Progress` for each piece of text, and one when the maps are there.

    Raises a `ValueError` for options that `generate` refuses.
    """
    messages = user_turn([picture], question)
    source = offered_sources(model.config)[0]
    options = {"latent_steps": latent_steps, "latent_feedback": latent_feedback, "reflect": always_reflect or None}
    for seen in stream_look(model, processor, messages, (source,), **options):
        yield Progress(seen.answer)
    done = Progress(seen.answer, [reflection.maps[source][0].numpy() for reflection in seen.reflections])
    yield done
    if zeroed:
        own = torch.empty(1, MAX_NEW_TOKENS, model.config.get_text_config().hidden_size)  # a slot is a new token
        zeros = replace_latents("zeroed", own, model, None, None)
        for seen in stream_look(model, processor, messages, (), latents=zeros, **options):
            done = replace(done, zeroed=seen.answer)
            yield done
    for seen in stream_look(model, processor, messages, (), latent_steps=0):
        yield replace(done, plain=seen.answer)


def stream_look(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    messages: list[dict],
    sources: tuple[str, ...],
    **options,
) -> Iterator[Look]:
    """`look`, before whose result come the text so far, again and again, without reflections.

    `look` reads the model's attention by a hook and switches its implementation for a moment, so a model answers one
    question at a time. A caller that stops iterating ends the decoding.
    """
    left = threading.Event()

    def caller_has_left(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), left.is_set(), device=input_ids.device)

    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    criteria = StoppingCriteriaList([caller_has_left])
    options = {"max_new_tokens": MAX_NEW_TOKENS, "streamer": streamer, "stopping_criteria": criteria, **options}
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(look, model, processor, messages, sources, **options)
        run.add_done_callback(lambda _: streamer.end())  # an error, too, must end the loop below
        text = ""
        try:
            for piece in streamer:
                if piece:
                    text += piece
                    yield Look(text, [])
            yield run.result()
        finally:
            left.set()
