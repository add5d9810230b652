"""Do the latents matter? Decoding with other latents than the model's own.

Symbols in shapes: B rows, S latent steps, D hidden size.
"""

import torch

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration

from ..inference.attention_maps import find_reflections


# What a reflection's slots are fed instead of the model's own latents.
INTERVENTIONS = {
    "zeroed": "zeros for latents",
    "noise": "noise of the latents' norms",
    "shuffled": "another sample's latents",
    "other_picture": "the latents of the same question about another picture",
    "filler": "the slot token's embedding, nothing fed back",
    "first_look": "the first latent in all slots",
    "reversed": "the latents in reverse order",
}
# Those that need another sample.
EXCHANGED = ("shuffled", "other_picture")
# How `generate` reflects in every answer, whatever else is set.
ALWAYS = {"reflect": True, "reflect_threshold": None, "max_reflections": None}
# Points of accuracy that any replacement costs where the answers need their latents.
NEEDED = 30
# Those that still feed latents which the model made for this question.
OWN = ("first_look", "reversed")


def reflection_latents(
    latents: torch.Tensor, tokens: torch.LongTensor, config: VReflectionConfig
) -> list[list[torch.Tensor]]:
    """For each row of new tokens (B, N), the latents (S, D) of its complete reflections; `latents` are `generate`'s."""
    found: list[list[torch.Tensor]] = [[] for _ in tokens]
    for row, _, count in find_reflections(tokens, config):
        first = sum(map(len, found[row]))
        found[row].append(latents[row, first : first + count])
    return found


def first_latents(
    latents: torch.Tensor, tokens: torch.LongTensor, config: VReflectionConfig
) -> dict[int, torch.Tensor]:
    """By row, the latents (S, D) of the first complete reflection among new tokens (B, N), in rows that have one."""
    return {row: found[0] for row, found in enumerate(reflection_latents(latents, tokens, config)) if found}


def fit_steps(latents: torch.Tensor, steps: int) -> torch.Tensor:
    """Latents (S, D) of a reflection as (steps, D): cut, or its last one repeated, as where `latent_tolerance` ended it early."""
    return torch.cat([latents[:steps], latents[-1:].expand(max(0, steps - len(latents)), -1)])


def replace_reflections(
    name: str,
    own: list[torch.Tensor],
    model: VReflectionForConditionalGeneration,
    other: list[torch.Tensor] | None,
    generator: torch.Generator,
    slots: int,
) -> torch.Tensor:
    """What an intervention feeds to all slots (slots, D) of an answer, the n-th reflection for the n-th.

    After the last reflection its replacement is repeated, so that an answer which reflects more often isn't fed its own latents.

    Args:
        name (`str`): A key of `INTERVENTIONS`.
        own (`list[torch.Tensor]`): The latents (S, D) of each reflection in the answer.
        model (`VReflectionForConditionalGeneration`): The model.
        other (`list[torch.Tensor]`, *optional*): For `EXCHANGED`, those of another answer, at least one; where it has fewer
            reflections, its last one is used again.
        generator (`torch.Generator`): Draws the noise.
        slots (`int`): How many there may be.
    """
    replaced = []
    for number, latents in enumerate(own):
        exchanged = None
        if name in EXCHANGED:
            exchanged = fit_steps(other[min(number, len(other) - 1)], len(latents))
        replaced.append(replace_latents(name, latents, model, exchanged, generator))
    missing = max(0, slots - sum(map(len, replaced)))
    repeats = -(-missing // len(replaced[-1]))
    return torch.cat([*replaced, *replaced[-1:] * repeats])[:slots]


def replace_latents(
    name: str,
    latents: torch.Tensor,
    model: VReflectionForConditionalGeneration,
    exchanged: torch.Tensor | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """What an intervention feeds in place of latents (..., S, D).

    Args:
        name (`str`): A key of `INTERVENTIONS`.
        latents (`torch.Tensor` of shape `(..., S, D)`): The model's own.
        model (`VReflectionForConditionalGeneration`): The model.
        exchanged (`torch.Tensor` of shape `(..., S, D)`, *optional*): For `EXCHANGED`, those to feed instead.
        generator (`torch.Generator`): Draws the noise.
    """
    if name in EXCHANGED:
        return exchanged
    if name == "zeroed":
        return torch.zeros_like(latents)
    if name == "noise":
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return noise * (latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    if name == "filler":
        slot = torch.tensor(model.config.latent_token_id, device=latents.device)
        return model.get_input_embeddings()(slot).detach().expand_as(latents)
    if name == "first_look":
        return latents[..., :1, :].expand_as(latents)
    if name == "reversed":
        return latents.flip(-2)
    raise ValueError(f"Unknown intervention {name!r}; choose one of {', '.join(INTERVENTIONS)}.")
