"""From questions about pictures to the model's inputs, and from its tokens to answers."""

from typing import Any

import torch
from transformers import BatchFeature

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.processing_vreflection import THINK_TOKENS


def user_turn(pictures: list[Any], question: str) -> list[dict]:
    """A conversation of one question after its pictures, which are anything that `open_picture` opens."""
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def encode_prompts(processor: VReflectionProcessor, conversations: list, device: str | torch.device) -> BatchFeature:
    """The inputs of `generate` for a conversation, or for a list of them, padded on the left."""
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(device)


def answer_texts(processor: VReflectionProcessor, tokens: torch.LongTensor) -> list[str]:
    """The answers in rows of new tokens (B, N), without reflections and without thoughts in words: "" where these didn't end."""
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    if processor.think_end_token_id is not None:
        texts = [text.partition(THINK_TOKENS[1])[2] for text in texts]
    return [text.strip() for text in texts]
