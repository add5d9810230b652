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
# Those that still feed latents which the model made for this question.
OWN = ("first_look", "reversed")


def first_latents(
    latents: torch.Tensor, tokens: torch.LongTensor, config: VReflectionConfig
) -> dict[int, torch.Tensor]:
    """By row, the latents (S, D) of the first complete reflection among new tokens (B, N); `latents` are `generate`'s."""
    first = {}
    for row, _, count in find_reflections(tokens, config):
        first.setdefault(row, latents[row, :count])
    return first


def replace_latents(
    name: str,
    latents: torch.Tensor,
    model: VReflectionForConditionalGeneration,
    other_picture: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """What an intervention feeds in place of latents (B, S, D).

    Args:
        name (`str`): A key of `INTERVENTIONS`.
        latents (`torch.Tensor` of shape `(B, S, D)`): The model's own.
        model (`VReflectionForConditionalGeneration`): The model.
        other_picture (`torch.Tensor` of shape `(B, S, D)`): Its own, with each row's question about another picture.
        generator (`torch.Generator`): Draws the noise.
    """
    if name == "zeroed":
        return torch.zeros_like(latents)
    if name == "noise":
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return noise * (latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    if name == "shuffled":
        return latents.roll(1, 0)
    if name == "other_picture":
        return other_picture
    if name == "filler":
        slot = torch.tensor(model.config.latent_token_id, device=latents.device)
        return model.get_input_embeddings()(slot).detach().expand_as(latents)
    if name == "first_look":
        return latents[:, :1].expand_as(latents)
    if name == "reversed":
        return latents.flip(1)
    raise ValueError(f"Unknown intervention {name!r}; choose one of {', '.join(INTERVENTIONS)}.")
