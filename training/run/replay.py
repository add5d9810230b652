"""Log-probabilities of sampled answers, computed again with the latents that were fed."""

from dataclasses import dataclass

import torch
from trl.trainer.utils import selective_log_softmax_and_entropy

from modeling_vreflection.decoding_vreflection import UNCERTAIN, ReflectionOptions, ReflectionProgress


@dataclass
class Scores:
    """What trl's `GRPOTrainer` reads of an output: both (B, C), of C sampled tokens, float32."""

    log_probs: torch.Tensor
    entropy: torch.Tensor


def forced_tokens(tokens: torch.LongTensor, options: ReflectionOptions, config) -> torch.BoolTensor:
    """Which of the new tokens (B, C) of answers `generate` forced: these are no actions."""
    return ReflectionProgress(options, config.latent_token_ids, think_end_id=config.think_end_token_id).forced(tokens)


class Replay:
    """A model as trl's `GRPOTrainer` calls it for log-probabilities, some rows after the others, with recorded latents.

    The probabilities are those that `generate` sampled from: slot and end token, the start token where the model may choose none, and
    suppressed tokens have none. A forced token has the log-probability 0; with `sigma` a slot has -|z - h|² / (2 σ²), the mean
    over D, of its latent z and what the model would feed, h.

    Args:
        model (`torch.nn.Module`): The model, as an engine may have wrapped it.
        config (`PreTrainedConfig`): Its config.
        latents (`torch.Tensor` of shape `(B, M, D)`): What was fed to the slots of all rows.
        options (`ReflectionOptions`): How the answers were sampled.
        length (`int`): C, the sampled tokens of a row, its last ones.
        temperature (`float`): Of sampling.
        suppressed (`list[int]`): Tokens that were never sampled.
        sigma (`float`, *optional*): σ.
        through (`bool`): Whether gradients of the other tokens go through the latents into h.
    """

    def __init__(
        self,
        model,
        config,
        latents: torch.Tensor,
        options: ReflectionOptions,
        length: int,
        temperature: float = 1.0,
        suppressed: tuple[int, ...] = (),
        sigma: float | None = None,
        through: bool = True,
    ):
        self.model, self.config, self.latents, self.options = model, config, latents, options
        self.length, self.temperature, self.suppressed, self.sigma = length, temperature, suppressed, sigma
        self.through = through and options.can_start
        self.done = 0  # rows

    def __call__(self, input_ids: torch.LongTensor, labels=None, fused_lm_head=None, **inputs) -> Scores:
        """`labels` and `fused_lm_head` are trl's own way to the same numbers, and not read."""
        latents = self.latents[self.done : self.done + len(input_ids)]
        self.done += len(input_ids)
        through = self.through and torch.is_grad_enabled()
        outputs = self.model(
            input_ids=input_ids,
            **inputs,
            latents=latents,
            latent_inputs=self.options.latent_feedback if through else None,
            logits_to_keep=self.length + 1,
            use_cache=False,
        )
        tokens = input_ids[:, -self.length :]
        forced = forced_tokens(tokens, self.options, self.config)
        logits = self._bar(outputs.logits[:, :-1].float() / self.temperature, input_ids)
        log_probs, entropy = selective_log_softmax_and_entropy(logits, tokens.masked_fill(forced, 0))
        log_probs, entropy = (values.masked_fill(forced, 0.0) for values in (log_probs, entropy))
        if self.sigma is not None and self.options.can_start:
            log_probs = log_probs + self._densities(outputs, latents, tokens)
        return Scores(log_probs, entropy)

    def _bar(self, logits: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
        """Logits (B, C, vocabulary) with the least number for what could not be sampled: infinity times 0 would be NaN."""
        start, *never = self.config.latent_token_ids
        least = torch.finfo(logits.dtype).min
        logits = logits.index_fill(-1, torch.tensor([*never, *self.suppressed], device=logits.device), least)
        chosen = self.options.can_start and self.options.reflect != UNCERTAIN
        closed = torch.full((len(logits), 1), not chosen, device=logits.device)
        if self.options.latent_feedback == "dac":  # asks the pictures
            closed |= ~(input_ids == self.config.image_token_id).any(1, keepdim=True)
        logits[..., start].masked_fill_(closed, least)
        return logits

    def _densities(self, outputs, latents: torch.Tensor, tokens: torch.LongTensor) -> torch.Tensor:
        """The log-probabilities of latents (B, M, D) at their slots among tokens (B, C), up to a constant; 0 elsewhere."""
        fed = {"hidden": outputs.latent_states, "dac": outputs.student_latents}[self.options.latent_feedback]
        densities = tokens.new_zeros(tokens.shape, dtype=torch.float32)
        if fed is None:  # no pictures, and nothing was fed
            return densities
        of_latents = -(latents.float() - fed.float()).square().mean(-1) / (2 * self.sigma**2)
        in_slot = tokens == self.config.latent_token_id
        rows, columns = in_slot.nonzero(as_tuple=True)
        numbers = in_slot.cumsum(1)[rows, columns] - 1
        return densities.index_put((rows, columns), of_latents[rows, numbers])
