"""Replaying what `generate` recorded: latents into the slots of whole sequences, and what the model would feed there now.

Symbols in shapes: B rows, T tokens, M latents of a row, D hidden size, L merged patches of all images of a row.
"""

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .compression_vreflection import pad_features
from .outputs_vreflection import VReflectionModelOutputWithPast
from .segments_vreflection import features_of, is_packed


class ReplayMixin:
    """The part of a backbone with BCM and DAC that replays recorded latents."""

    def _replay(
        self,
        inputs: dict,
        embeds: torch.Tensor,
        encoded: ModelOutput | None,
        latents: torch.Tensor,
        latent_inputs: str | None,
        kwargs: dict,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> VReflectionModelOutputWithPast:
        """One pass with latents (B, M, D) in the slots, the n-th of a row in its n-th slot, and maybe a second one.

        With `latent_inputs`, a second pass holds the same values, through which gradients reach what the states of the first
        one feed: z + h - sg(h).

        Args:
            inputs (`dict`): `input_ids`, `attention_mask`, `position_ids`, `image_grid_thw`, `mm_token_type_ids`.
            embeds (`torch.Tensor` of shape `(B, T, D)`): Embeddings, the images in their places.
            encoded (`ModelOutput`): The images, see `_encode_images`.
            latents, latent_inputs, cache, use_cache: See [`ReflectionCausalLMMixin.forward`].
            kwargs (`dict`): What else the language model is given.
        """
        rows, columns, numbers = find_replayed(inputs["input_ids"], latents, self.config)
        held = latents[rows, numbers].to(embeds.dtype)
        outputs = self._run(inputs, embeds.index_put((rows, columns), held), kwargs, cache, use_cache)
        packed = is_packed(inputs["position_ids"])
        if cache is not None or packed:
            if latent_inputs is not None:
                raise ValueError(
                    "`latent_inputs` with `latents` needs whole sequences, a row each: no cache, no packs."
                )
            return outputs
        states = outputs.last_hidden_state
        states = states.new_zeros(latents.shape).index_put((rows, numbers), states[rows, columns - 1])
        looks = self._look_again(states, inputs, encoded)
        if latent_inputs is not None and len(rows):
            fed = {"hidden": states, "dac": looks}[latent_inputs]
            if fed is None:
                raise ValueError("`latent_inputs='dac'` needs a model whose DAC states query, and pictures.")
            fed = fed[rows, numbers]
            held = held + (fed - fed.detach()).to(held.dtype)
            outputs = self._run(inputs, embeds.index_put((rows, columns), held), kwargs, cache, use_cache)
        return VReflectionModelOutputWithPast(**outputs, latent_states=states, student_latents=looks)

    def _look_again(self, states: torch.Tensor, inputs: dict, encoded: ModelOutput | None) -> torch.Tensor | None:
        """What DAC sees from states (B, M, D) in all images of their rows (B, M, D); `None` where decoding wouldn't ask it."""
        if self.dac is None or encoded is None or not states.shape[1]:
            return None
        if self.config.dac_queries != "states" or self.config.query_position != "before":
            return None
        features, mask = self.features_by_row(inputs["input_ids"], features_of(encoded), inputs["image_grid_thw"])
        return self.dac(states, features, mask)[0]

    def features_by_row(
        self, input_ids: torch.LongTensor, features: list[torch.Tensor], image_grid_thw: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.BoolTensor]:
        """What DAC reads of all images of each row, padded (B, L, D or 3D), and its mask (B, L).

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): The tokens; rows may have none of images.
            features (`list[torch.Tensor]`): F_global of each image of the batch, in the order of the tokens.
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`): Their grids.
        """
        counts = (input_ids == self.config.image_token_id).sum(1)
        features = torch.cat(self.looked_at(features, self.grids(image_grid_thw)))
        padded, mask = pad_features(list(features.split(counts.tolist())))
        mask[:, 0] |= counts.to(mask.device) == 0  # a softmax over nothing would be NaN; such a row never looks
        return padded, mask


def find_replayed(
    input_ids: torch.LongTensor, latents: torch.Tensor, config
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """The slots of tokens (B, T) that latents (B, M, D) fill: their rows, columns, and numbers within their rows.

    Raises:
        ValueError: Latents of another shape, or fewer of a row than slots.
    """
    rows, size = len(input_ids), config.get_text_config().hidden_size
    if latents.ndim != 3 or (len(latents), latents.shape[2]) != (rows, size):
        raise ValueError(f"`latents` must be ({rows}, latents, {size}), got {tuple(latents.shape)}.")
    in_slot = input_ids == config.latent_token_id
    number = in_slot.cumsum(1) - 1
    given = in_slot & (number < latents.shape[1])
    # Where decoding was cut, nothing was fed to the last token.
    if (in_slot & ~given)[:, :-1].any():
        raise ValueError(
            f"Rows hold {in_slot.sum(1).tolist()} slots, and `latents` {latents.shape[1]} latents a row: pass one for each slot."
        )
    rows, columns = given.nonzero(as_tuple=True)
    return rows, columns, number[rows, columns]
