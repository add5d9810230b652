"""Cross-entropy of right answers behind reflections that the model made itself: the control of learning by reward."""

import torch

from training import VReflectionGRPOTrainer


class OwnLatentsTrainer(VReflectionGRPOTrainer):
    """Samples reflections as [`VReflectionGRPOTrainer`] does, puts the right answer behind each, and learns its tokens alike.

    With an advantage of 1 the gradient of what trl minimises is that of the tokens' mean cross-entropy, the start token
    included where the model chose it.

    Args:
        through (`bool`): Whether gradients go through the latents; without, they are constants.
    """

    def __init__(self, *args, through: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.through_latents = through

    def _generate_and_score_completions(self, inputs):
        self._right = [row["answer"] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        return {**output, "advantages": torch.ones_like(output["advantages"])}

    def _generate_single_turn(self, *args, **kwargs):
        answers, log_probs = super()._generate_single_turn(*args, **kwargs)
        return [
            [*self.reflection_of(answer), *self._tokenizer(right)["input_ids"], self._tokenizer.eos_token_id]
            for answer, right in zip(answers, self._right)
        ], log_probs
