"""Do the latents matter? Decoding with other latents than the model's own.

Symbols in shapes: B rows, S latent steps, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration

from ..inference.attention_maps import RecordedStep, find_reflections


# What a reflection's slots are fed instead of the model's own latents.
INTERVENTIONS = {
    "zeroed": "zeros for latents",
    "noise": "noise of the latents' norms",
    "shuffled": "another sample's latents",
    "other_picture": "the latents of the same question about another picture",
    "filler": "the slot token's embedding, nothing fed back",
}
# Those that need another sample.
EXCHANGED = ("shuffled", "other_picture")


class LatentInterventionModel(VReflectionForConditionalGeneration):
    """A V-Reflection model whose latents can be replaced while it decodes; otherwise the plain one."""

    _given: torch.Tensor | None = None

    @contextmanager
    def feeding(self, latents: torch.Tensor) -> Iterator[None]:
        """Lets `generate` feed latents (B, S, D) into the slots of every reflection of the rows; no beams."""
        self._given = latents
        try:
            yield
        finally:
            self._given = None

    # The keywords are spelled out because `generate` reads them off the signature to know what it may be given.
    def prepare_inputs_for_generation(self, input_ids, *args, reflection=None, global_features=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, reflection=reflection, global_features=global_features, **kwargs
        )
        state = inputs.get("latent_state")
        if state is None or self._given is None:
            return inputs
        rows = (input_ids[:, -1] == self.config.latent_token_id).nonzero().flatten()
        step = reflection.options.latent_steps - reflection.left[rows]
        state = state.clone()
        state[rows, 0] = self._given[rows, step].to(state)
        return {**inputs, "latent_state": state}


def first_latents(
    steps: list[RecordedStep], tokens: torch.LongTensor, config: VReflectionConfig
) -> dict[int, torch.Tensor]:
    """By row, the latents (S, D) that were fed in the first complete reflection of its new tokens (B, N)."""
    latents = {}
    for row, first, count in find_reflections(tokens, config):
        if row not in latents:
            # Step i + 1 is fed what stands at new token i.
            latents[row] = torch.cat([step.embeds[row] for step in steps[first + 1 : first + 1 + count]])
    return latents


def replace_latents(
    name: str,
    latents: torch.Tensor,
    model: LatentInterventionModel,
    other_picture: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """What an intervention feeds in place of latents (B, S, D).

    Args:
        name (`str`): A key of `INTERVENTIONS`.
        latents (`torch.Tensor` of shape `(B, S, D)`): The model's own.
        model (`LatentInterventionModel`): The model.
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
    raise ValueError(f"Unknown intervention {name!r}; choose one of {', '.join(INTERVENTIONS)}.")
