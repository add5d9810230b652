"""Where the model looks while it reflects: attention maps of the latent steps, recorded while it generates.

Symbols in shapes: B rows, N new tokens, S latent steps, D hidden size, L merged patches of all of a row's images, h x w
merged patches of one image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration
from modeling_vreflection.compression_vreflection import pad_features
from modeling_vreflection.generation_vreflection import CACHE
from modeling_vreflection.regions_vreflection import merged_grids

from ..errors import InputError
from .look_boxes import LookBox, merge_looks


# DAC's attention, with the model's states as queries; and the language model's own, from the slots to the image tokens.
SOURCES = ("dac", "llm")

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Reflection:
    """One reflection of an answer.

    Args:
        steps (`int`): S, its latent steps.
        maps (`dict[str, list[torch.Tensor]]`): For each source, a map (S, h, w) for each image of the conversation, on
            the CPU in float32: the share of a step's attention that falls on each patch. Over all images a step of
            `"dac"` sums to one, and of `"llm"` to what the language model doesn't spend on text.
    """

    steps: int
    maps: dict[str, list[torch.Tensor]]

    @property
    def source(self) -> str:
        """Whose maps tell where it looked: the first of `SOURCES` that it has maps of."""
        return next(source for source in SOURCES if source in self.maps)

    @cached_property
    def looks(self) -> list[LookBox]:
        """Where it looked, in order, by the maps of `source`; see [`merge_looks`]."""
        return merge_looks(self.maps[self.source])


@dataclass(frozen=True)
class RecordedStep:
    """What the language model got and gave in one decoding step; T = 1, but the prompt's step keeps all of `embeds`."""

    embeds: torch.Tensor  # (B, T, D)
    positions: torch.Tensor  # (3 or 4, B, 1)
    state: torch.Tensor  # (B, 1, D)


def offered_sources(config: VReflectionConfig) -> tuple[str, ...]:
    """The sources of `SOURCES` that a checkpoint has: one without DAC has the language model's attention only."""
    return SOURCES if config.has_dac else ("llm",)


def generate_and_look(
    model: VReflectionForConditionalGeneration, inputs: dict, sources: tuple[str, ...] = SOURCES, **options
) -> tuple[torch.LongTensor, torch.Tensor, list[list[Reflection]]]:
    """Decodes greedily and returns the attention of every latent step.

    The states that query DAC, and what the slots were fed, are recorded from the decoding itself. The language model's
    attention is read afterwards: the S slots of a reflection run once more, by eager attention, on the cache cut back to
    where the reflection began. So nothing of the size of the prompt squared is ever held, and decoding itself runs
    with whatever attention the model was loaded with.

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        inputs (`dict`): What the processor made of B conversations, padded on the left.
        sources (`tuple[str, ...]`, *optional*): Of `SOURCES`, those to return maps of.
        options: `latent_steps`, `latent_feedback`, `reflect` and `max_new_tokens` of the model's `generate`.

    Returns:
        `tuple`: The new tokens (B, N), the latents that `generate` returns (B, M, D), and for each row the reflections in its
        answer, without one that the length limit cut, about which `generate` warns.

    Raises:
        InputError: `"dac"` among the sources, and a checkpoint without DAC.
        ValueError: Options that `generate` refuses.
    """
    if missing := set(sources) - set(offered_sources(model.config)):
        raise InputError(f"the checkpoint has no DAC, so there is no attention of source {', '.join(missing)}")
    with recorded_steps(model) as steps:
        output = model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True)
    prompt = inputs["input_ids"]
    tokens = output.sequences[:, prompt.shape[1] :]
    found = find_reflections(tokens, model.config)
    is_image = prompt == model.config.image_token_id
    grids = image_grids(is_image, inputs.get("image_grid_thw"), model.config)

    attention = {}
    if "dac" in sources:
        attention["dac"] = [dac_attention(model, steps, is_image, grids, *segment) for segment in found]
    if "llm" in sources:
        mask = inputs["attention_mask"]
        attention["llm"] = language_attention(model, steps, is_image, mask, output[CACHE], found)

    reflections: list[list[Reflection]] = [[] for _ in prompt]
    for number, (row, _, count) in enumerate(found):
        maps = {source: split_by_image(rows[number], grids[row]) for source, rows in attention.items()}
        reflections[row].append(Reflection(count, maps))
    return tokens, output.latents, reflections


@contextmanager
def recorded_steps(model: VReflectionForConditionalGeneration) -> Iterator[list[RecordedStep]]:
    """Records what goes in and out of the language model: item i of the list is the step that predicts new token i."""
    steps = []

    def record(module, args, kwargs, output):
        embeds = kwargs["inputs_embeds"] if not steps else kwargs["inputs_embeds"][:, -1:]
        steps.append(RecordedStep(embeds, kwargs["position_ids"][..., -1:], output.last_hidden_state[:, -1:].clone()))

    handle = model.model.language_model.register_forward_hook(record, with_kwargs=True)
    try:
        yield steps
    finally:
        handle.remove()


def find_reflections(tokens: torch.LongTensor, config: VReflectionConfig) -> list[tuple[int, int, int]]:
    """Finds complete reflections in new tokens (B, N): row, index of the first slot, number of slots."""
    found = []
    for row, start in (tokens == config.latent_start_token_id).nonzero().tolist():
        rest = (tokens[row, start + 1 :] != config.latent_token_id).nonzero().flatten().tolist()
        if rest and rest[0] and tokens[row, start + 1 + rest[0]] == config.latent_end_token_id:
            found.append((row, start + 1, rest[0]))
    return found


def image_grids(
    is_image: torch.BoolTensor, image_grid_thw: torch.LongTensor | None, config: VReflectionConfig
) -> list[list[tuple[int, int]]]:
    """The merged grids (h, w) of each row's images, from the batch's list of images and the mask of image tokens (B, T)."""
    if image_grid_thw is None:
        return [[] for _ in is_image]
    remaining = iter(merged_grids(image_grid_thw, config.vision_config.spatial_merge_size))
    grids = []
    for count in is_image.sum(1).tolist():
        row = []
        while sum(height * width for height, width in row) < count:
            row.append(next(remaining))
        grids.append(row)
    return grids


def split_by_image(attention: torch.Tensor, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Splits attention (S, L) over all images into maps (S, h, w)."""
    parts = attention.split([height * width for height, width in grids], dim=1)
    return [part.unflatten(1, grid) for part, grid in zip(parts, grids)]


def dac_attention(
    model: VReflectionForConditionalGeneration,
    steps: list[RecordedStep],
    is_image: torch.BoolTensor,
    grids: list[list[tuple[int, int]]],
    row: int,
    first: int,
    count: int,
) -> torch.Tensor:
    """A_S (S, L): DAC's attention over all images of the row, its queries the states of one reflection."""
    # The state of step i predicts new token i, and is the state at new token i - 1.
    offset = first + (model.config.query_position == "at")
    states = torch.cat([step.state[row] for step in steps[offset : offset + count]])
    # F_global, as it stands among the prompt's embeddings.
    features = steps[0].embeds[row, is_image[row]]
    with torch.no_grad():
        if grids[row]:
            images = features.split([height * width for height, width in grids[row]])
            features = torch.cat(model.model.looked_at(images, grids[row]))
        return model.model.dac(states[None], *pad_features([features]))[1][0].cpu()


def language_attention(
    model: VReflectionForConditionalGeneration,
    steps: list[RecordedStep],
    is_image: torch.BoolTensor,
    attention_mask: torch.LongTensor,
    cache,
    found: list[tuple[int, int, int]],
) -> list[torch.Tensor]:
    """For each reflection (S, L): the language model's attention from slots to image tokens, over layers and heads averaged.

    `cache` is that of the whole generation; it is cut back, reflection by reflection from the last one on.
    """
    prompt_length = attention_mask.shape[1]
    attention = {}
    with eager_attention(model):
        for first, count in sorted({segment[1:] for segment in found}, reverse=True):
            cache.crop(prompt_length + first - cache.get_seq_length())
            slots = steps[first + 1 : first + 1 + count]
            mask = attention_mask.new_ones(len(attention_mask), first + count)
            with torch.no_grad():
                layers = model.model.language_model(
                    inputs_embeds=torch.cat([step.embeds for step in slots], 1),
                    position_ids=torch.cat([step.positions for step in slots], -1),
                    attention_mask=torch.cat([attention_mask, mask], 1),
                    **{CACHE: cache},
                    use_cache=True,
                    output_attentions=True,
                ).attentions  # a tuple of (B, heads, S, T)
            attention[first, count] = sum(layer.float().mean(1) for layer in layers) / len(layers)
    return [attention[first, count][row, :, :prompt_length][:, is_image[row]].cpu() for row, first, count in found]


@contextmanager
def eager_attention(model: VReflectionForConditionalGeneration) -> Iterator[None]:
    """Switches the language model, within the block, to eager attention, the only one that returns its weights."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
