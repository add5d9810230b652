"""What makes `generate` think in latents: who is in a reflection, which token is forced, what the streamer may show.

The state of a row is read off its tokens alone: S slots and the end token follow every start token. So rows of a batch
enter and leave a reflection at different steps, and beams carry their state along by being reordered.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


LATENT_FEEDBACK = ("hidden", "dac")


@dataclass(frozen=True)
class ReflectionOptions:
    """How one call of `generate` reflects; see `VReflectionForConditionalGeneration.generate`."""

    latent_steps: int
    latent_feedback: str
    reflect: bool | None

    def __post_init__(self):
        if self.latent_steps < 0:
            raise ValueError(f"`latent_steps` must not be negative, got {self.latent_steps}.")
        if self.latent_feedback not in LATENT_FEEDBACK:
            raise ValueError(
                f"`latent_feedback` must be one of {', '.join(LATENT_FEEDBACK)}, got {self.latent_feedback!r}."
            )
        if self.reflect and not self.can_start:
            raise ValueError("`reflect=True` and `latent_steps=0` contradict each other: set `latent_steps` above 0.")

    @property
    def can_start(self) -> bool:
        """Whether a reflection may start at all; where not, this is the plain backbone."""
        return self.latent_steps > 0 and self.reflect is not False


def tokens_since_start(input_ids: torch.LongTensor, start_id: int) -> torch.LongTensor:
    """For rows (B, T), counts the tokens after the last start token: (B,); T where there is none."""
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)
    last_start = torch.where(input_ids == start_id, positions, -1).amax(1) if length else input_ids.new_full((1,), -1)
    return torch.where(last_start < 0, torch.iinfo(torch.long).max, length - 1 - last_start)


def all_rows_forced(input_ids: torch.LongTensor, start_id: int, latent_steps: int) -> bool:
    """Whether the next token of every row is forced, so that nobody needs logits."""
    return bool((tokens_since_start(input_ids, start_id) <= latent_steps).all())


class ReflectionLogitsProcessor(LogitsProcessor):
    """Forces `latent_steps` slots and the end token after every start token, and bans both elsewhere.

    Must come last in the list, so that no other processor forbids what is forced.

    Args:
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        prompt_length (`int`): Tokens of the prompt.
        options (`ReflectionOptions`): The options of the call.
    """

    def __init__(self, token_ids: tuple[int, int, int], prompt_length: int, options: ReflectionOptions):
        self.start_id, self.latent_id, self.end_id = token_ids
        self.prompt_length = prompt_length
        self.options = options

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, [self.latent_id, self.end_id]] = float("-inf")
        if not self.options.can_start:
            scores[:, self.start_id] = float("-inf")
            return scores
        step = tokens_since_start(input_ids, self.start_id)
        steps = self.options.latent_steps
        forced = torch.where(step < steps, self.latent_id, self.end_id)
        is_forced = step <= steps
        if self.options.reflect and input_ids.shape[1] == self.prompt_length:
            forced, is_forced = torch.full_like(step, self.start_id), torch.ones_like(is_forced)
        certain = torch.full_like(scores, float("-inf")).scatter(1, forced.expand(len(scores))[:, None], 0.0)
        return torch.where(is_forced[:, None], certain, scores)


class SilentReflectionStreamer(BaseStreamer):
    """Hands a streamer the prompt and the text, and keeps the tokens of reflections from it.

    Args:
        streamer (`BaseStreamer`): The user's streamer.
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
    """

    def __init__(self, streamer: BaseStreamer, token_ids: tuple[int, int, int]):
        self.streamer = streamer
        self.token_ids = torch.tensor(token_ids)
        self.prompt_is_next = True

    def put(self, value: torch.LongTensor):
        # Streamers that skip the prompt take whatever comes first for it.
        if not self.prompt_is_next:
            value = value[~torch.isin(value, self.token_ids)]
        if self.prompt_is_next or value.numel():
            self.streamer.put(value)
        self.prompt_is_next = False

    def end(self):
        self.streamer.end()
