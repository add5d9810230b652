"""What is asked: GlyphSearch's questions, with pictures of any size."""

import torch
from transformers import BatchFeature

from modeling_vreflection import VReflectionProcessor

from ..glyphsearch import draw_question
from .shapes import CELL


def draw_conversations(first: int, count: int, side: int | None = None) -> list[list[dict]]:
    """Questions about the test scenes from `first` on, one a scene.

    Args:
        first (`int`): Index of the first scene.
        count (`int`): Questions.
        side (`int`, *optional*): Side of the pictures in merged patches; as GlyphSearch draws them, if left out.
    """
    conversations = []
    for index in range(first, first + count):
        scene, question = draw_question("test", index)
        image = scene.image if side is None else scene.image.resize((side * CELL, side * CELL))
        content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
        conversations.append([{"role": "user", "content": content}])
    return conversations


def make_inputs(
    processor: VReflectionProcessor, conversations: list[list[dict]], device: torch.device
) -> BatchFeature:
    """A batch of prompts, padded on the left."""
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(device)
