"""One question about pictures: the answer, and where the model looked for it."""

from dataclasses import dataclass

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from .attention_maps import SOURCES, Reflection, generate_and_look
from .encoding import answer_texts, encode_prompts
from .look_boxes import LookBox


@dataclass(frozen=True)
class Look:
    """An answer and the reflections in it, in their order; none if the model answered at once."""

    answer: str
    reflections: list[Reflection]

    @property
    def looks(self) -> list[LookBox]:
        """Where the model looked, in order, over all reflections: for each look its steps, its box and its share."""
        return [look for reflection in self.reflections for look in reflection.looks]


def look(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    messages: list[dict],
    sources: tuple[str, ...] = SOURCES,
    **options,
) -> Look:
    """Answers the last question of a conversation and returns the attention of each latent step.

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        processor (`VReflectionProcessor`): Its processor.
        messages (`list[dict]`): The conversation, with pictures as parts `{"type": "image", "image": picture}`.
        sources (`tuple[str, ...]`, *optional*): Of `SOURCES`, those to return maps of; none makes it a plain question.
        options: See [`generate_and_look`].

    Returns:
        [`Look`]: The answer; reflections hold a map (S, h, w) for each source and each picture of the conversation.
    """
    inputs = encode_prompts(processor, messages, model.device)
    tokens, _, reflections = generate_and_look(model, inputs, sources, **options)
    return Look(answer_texts(processor, tokens)[0], reflections[0])
