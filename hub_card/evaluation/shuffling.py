"""Do the latents matter? A model that gives each sample the latents of another one of its batch."""

import torch

from modeling_vreflection import VReflectionForConditionalGeneration


class LatentShufflingModel(VReflectionForConditionalGeneration):
    """A V-Reflection model with one more way to decode, [`generate_shuffled`]; in all others it is the plain one."""

    # While shuffling: for each row of the batch, the slots filled with another row's latents, and those with its own.
    _shuffled: torch.Tensor | None = None
    _kept: torch.Tensor | None = None

    def generate_shuffled(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """`generate` with every slot filled by the latent of the previous row that is in a slot at the same step.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): The prompts.
            kwargs: Of `generate`; greedy decoding or sampling, since beams of one row would exchange latents too.

        Returns:
            `tuple`: The sequences, and for each row (B,) whether it reflected and got others' latents only: a row that
            is alone in its step keeps its own, and says nothing about shuffling.
        """
        self._shuffled = torch.zeros(len(input_ids), dtype=torch.long)
        self._kept = torch.zeros_like(self._shuffled)
        try:
            sequences = self.generate(input_ids=input_ids, **kwargs)
            return sequences, (self._shuffled > 0) & (self._kept == 0)
        finally:
            self._shuffled = self._kept = None

    # The keywords are spelled out because `generate` reads them off the signature to know what it may be given.
    def prepare_inputs_for_generation(self, input_ids, *args, reflection=None, global_features=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, reflection=reflection, global_features=global_features, **kwargs
        )
        if self._shuffled is None or inputs.get("latent_state") is None:
            return inputs
        rows = (input_ids[:, -1] == self.config.latent_token_id).nonzero().flatten()
        counter = self._shuffled if len(rows) > 1 else self._kept
        counter[rows.cpu()] += 1
        latents = inputs["latent_state"].clone()
        latents[rows] = latents[rows.roll(1)]
        return {**inputs, "latent_state": latents}
