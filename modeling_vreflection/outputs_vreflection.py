"""What `forward` returns, beside the usual fields.

Symbols in shapes: B rows, T tokens, G reflection segments of the batch, S latent steps, D hidden size, L merged patches of
all images of a segment's sample before it (the largest count among the segments; the others are padded with zeros).
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class LatentOutput:
    """What was seen at the reflection segments, in the order of the segments in the batch.

    Args:
        latent_states (`torch.Tensor` of shape `(G, S, D)`): H, the states that predict the slots.
        teacher_latents (`torch.Tensor` of shape `(G, S, D)`): Z_T (Eq. 1), of each step's box. `None` without boxes or BCM.
        student_latents (`torch.Tensor` of shape `(G, S, D)`): Z_S (Eq. 3). `None` without images or DAC.
        teacher_attention (`torch.FloatTensor` of shape `(G, S, L)`): Â_T (Eq. 4), zero outside of the image of the step's
            box; uniform over the box where there is no BCM. `None` without boxes.
        student_attention (`torch.FloatTensor` of shape `(G, S, L)`): A_S.
        inside_box (`torch.BoolTensor` of shape `(G, S, L)`): The patches that the step's box overlaps. `None` without boxes.
    """

    latent_states: torch.Tensor | None = None
    teacher_latents: torch.Tensor | None = None
    student_latents: torch.Tensor | None = None
    teacher_attention: torch.FloatTensor | None = None
    student_attention: torch.FloatTensor | None = None
    inside_box: torch.BoolTensor | None = None


@dataclass
class VReflectionModelOutputWithPast(LatentOutput, BaseModelOutputWithPast):
    """The backbone's usual fields, and those of [`LatentOutput`]."""


@dataclass
class VReflectionCausalLMOutputWithPast(LatentOutput, CausalLMOutputWithPast):
    """The usual fields, those of [`LatentOutput`], and `last_hidden_state` (B, T, D)."""

    last_hidden_state: torch.Tensor | None = None
