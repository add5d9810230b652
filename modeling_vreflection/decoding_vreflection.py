"""One call of `generate`: its options, who is in a reflection, which token is forced, what was fed, what a streamer may show.

The state of a row is read off its tokens: slots and the end token follow every start token. So rows of a batch enter and
leave a reflection at different steps, and beams carry their state along by being reordered.

Symbols in shapes: B rows, T tokens, M latents of a row, D hidden size, L merged patches of all images of a row.
"""

from dataclasses import dataclass
from inspect import signature

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


LATENT_FEEDBACK = ("hidden", "dac")
# The value of `reflect` that leaves it to the entropy of the next token.
UNCERTAIN = "uncertain"


@dataclass(frozen=True)
class ReflectionOptions:
    """How one call of `generate` reflects; see `VReflectionForConditionalGeneration.generate`."""

    latent_steps: int
    latent_feedback: str
    reflect: bool | str | None = None
    latent_tolerance: float | None = None
    reflect_threshold: float | None = None
    max_reflections: int | None = None

    def __post_init__(self):
        if isinstance(self.latent_steps, bool) or not isinstance(self.latent_steps, int):
            raise ValueError(f"`latent_steps` must be a whole number, got {self.latent_steps!r}.")
        if self.latent_steps < 0:
            raise ValueError(f"`latent_steps` must not be negative, got {self.latent_steps}.")
        if self.latent_feedback not in LATENT_FEEDBACK:
            raise ValueError(
                f"`latent_feedback` must be one of {', '.join(LATENT_FEEDBACK)}, got {self.latent_feedback!r}."
            )
        if self.reflect != UNCERTAIN and not any(self.reflect is value for value in (None, True, False)):
            raise ValueError(f"`reflect` must be True, False, None or '{UNCERTAIN}', got {self.reflect!r}.")
        if self.reflect and not self.can_start:
            raise ValueError(
                f"`reflect={self.reflect!r}` and `latent_steps=0` contradict each other: set `latent_steps` above 0."
            )
        tolerance = 0 if self.latent_tolerance is None else self.latent_tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 1:
            raise ValueError(f"`latent_tolerance` must be a number in [0, 1], got {tolerance!r}; 0 is off.")
        if self.latent_tolerance and self.latent_feedback != "dac":
            raise ValueError("`latent_tolerance` compares DAC's looks: use it with `latent_feedback='dac'`.")
        threshold, most = self.reflect_threshold, self.max_reflections
        if self.reflect != UNCERTAIN:
            if (threshold, most) != (None, None):
                raise ValueError(f"`reflect_threshold` and `max_reflections` go with `reflect='{UNCERTAIN}'` only.")
        elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ValueError(
                f"`reflect='{UNCERTAIN}'` needs a `reflect_threshold` from 0 on, in nats, got {threshold!r}; "
                "`vreflection evaluate --thresholds` measures some."
            )
        elif type(most) is not int or most < 1:
            raise ValueError(f"`max_reflections` must be a whole number from 1 on, got {most!r}.")

    @classmethod
    def resolve(cls, config, *generation_configs, **given):
        """The options of a call: an argument wins, then the first generation config that says something.

        Args:
            config (`VReflectionConfig`): The model's; where nothing is said, `latent_steps` is its `num_latent_tokens`.
            generation_configs (`GenerationConfig`): The call's, if there is one, then the model's.
            given: Fields of this class, see `generate`; `None` where nothing is given.

        Raises:
            ValueError: A value that isn't allowed, wherever it comes from.
        """

        def settle(name: str, default=None):
            values = (given.get(name), *(getattr(stored, name, None) for stored in generation_configs))
            given[name] = next((value for value in values if value is not None), default)
            return given[name]

        # What a config says for DAC's looks, for reflections at all, or for uncertain ones, doesn't bind a call that does
        # without them.
        if settle("latent_steps", config.num_latent_tokens):
            settle("reflect")
        if settle("latent_feedback", LATENT_FEEDBACK[0]) == "dac":
            settle("latent_tolerance")
        if given.get("reflect") == UNCERTAIN:
            settle("reflect_threshold")
            settle("max_reflections", 1)
        return cls(**given)

    def check_checkpoint(self, config):
        """Raises a `ValueError` for a feedback that a checkpoint with this config (`VReflectionConfig`) has no weights for."""
        if self.latent_feedback != "dac":
            return
        if not config.has_dac:
            raise ValueError("`latent_feedback='dac'` needs a checkpoint with DAC; use `latent_feedback='hidden'`.")
        if config.dac_queries != "states" or config.query_position != "before":
            raise ValueError(
                "`latent_feedback='dac'` needs `dac_queries='states'` and `query_position='before'`; the checkpoint has "
                f"{config.dac_queries!r} and {config.query_position!r}. Use `latent_feedback='hidden'`."
            )

    @property
    def can_start(self) -> bool:
        """Whether a reflection may start at all; where not, this is the plain backbone."""
        return self.latent_steps > 0 and self.reflect is not False


def forced_tokens_left(input_ids: torch.LongTensor, start_id: int, end_id: int, latent_steps: int) -> torch.LongTensor:
    """For rows (B, T), counts the next tokens that are forced, slots and the end token: (B,), 0 outside of reflections.

    A reflection is open while no end token follows its start token.
    """
    recent = input_ids[:, -(latent_steps + 1) :]
    left = torch.arange(latent_steps + 2 - recent.shape[1], latent_steps + 2, device=input_ids.device)
    opened, closed = (((recent == token) * left).amax(1) for token in (start_id, end_id))
    return torch.where(closed > opened, 0, opened)


def entropy(scores: torch.FloatTensor) -> torch.FloatTensor:
    """The entropy in nats (B,) of the distributions that scores (B, V) give; banned tokens, at -inf, count nothing."""
    return torch.special.entr(scores.float().softmax(-1)).sum(-1)


class HostCopy:
    """Numbers on their way from the device to the host, which waits for them only when it asks."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers, self.arrived = numbers.to("cpu", non_blocking=True), None
        if numbers.device.type != "cpu":
            self.arrived = torch.Event(device=numbers.device)
            self.arrived.record()

    def tolist(self) -> list:
        """The numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


class ReflectionProgress:
    """One call of `generate`: how far the rows are in their reflections, what they look at, and what was fed.

    Args:
        options (`ReflectionOptions`): The options of the call.
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*): The call's; later hooks don't see it.
        given (`torch.Tensor` of shape `(B, M, D)`, *optional*): Latents to feed instead of the model's own.
        think_end_id (`int`, *optional*): Id of the token that ends thoughts in words, where answers begin with them.
        noise (`float`): Standard deviation of what is added to the values that are fed.

    Attributes:
        left (`torch.LongTensor` of shape `(B,)`): Next tokens of each row that are forced; `None` before the first, and where
            the host knows that all rows have `forced_steps`.
        forced_steps (`int`): Next tokens that are known to be forced in all rows.
        in_slots (`bool`): Whether the last token of any row may be a slot.
        uncertain (`torch.BoolTensor` of shape `(B,)`): With `reflect="uncertain"`, rows whose next token opens a reflection
            unless they are in one.
        pictures (`tuple`): Of all images of each row DAC's keys and values (B, heads, L, D / heads), with `patch_positions`
            their places (B, L, D), and their mask (B, L); `None` where nothing asks them.
        has_pictures (`torch.BoolTensor` of shape `(B,)`): Which rows may reflect; `None` for all.
        look (`torch.FloatTensor` of shape `(B, L)`): Where each row looks at this step.
        prompt_length (`int`): Tokens of the prompts.
        recording (`bool`): Whether to keep what was fed and looked at, by column of the slot, in `fed` and `looks`.
    """

    def __init__(
        self,
        options: ReflectionOptions,
        token_ids: tuple[int, int, int],
        image_grid_thw: torch.LongTensor | None = None,
        given: torch.Tensor | None = None,
        think_end_id: int | None = None,
        noise: float = 0.0,
    ):
        self.options = options
        self.start_id, self.latent_id, self.end_id = token_ids
        self.image_grid_thw = image_grid_thw
        self.given = given
        self.think_end_id = think_end_id
        self.noise = noise
        self.left: torch.LongTensor | None = None
        self.forced_steps = 0
        self.in_slots = False
        # `left` at the tokens before: every row of `reflect=True` begins with the start token.
        begins = options.reflect is True and think_end_id is None
        self._left_before = HostCopy(torch.tensor([options.latent_steps + 2 if begins else 0]))
        self.uncertain: torch.BoolTensor | None = None
        self.pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None
        self.has_pictures: torch.BoolTensor | None = None
        self.look: torch.FloatTensor | None = None
        self.prompt_length = 0
        self.recording = False
        self.fed: dict[int, torch.Tensor] = {}
        self.looks: dict[int, torch.Tensor] = {}

    def read(self, input_ids: torch.LongTensor):
        """Brings itself up to tokens (B, T), one more than at the last call.

        What the host has to know it derives from the tokens before: their numbers have arrived by now, so that nothing waits
        for the device. A row that opens a reflection with its last token needs no latent yet.
        """
        before = self._left_before.tolist()
        least, most = max(min(before) - 1, 0), max(max(before) - 1, 0)
        steps, tolerance = self.options.latent_steps, self.options.latent_tolerance
        self.in_slots = 0 < most <= steps
        self.forced_steps = least
        known = least > 0 and not tolerance  # no row leaves its reflection or opens one
        if known and least == most:
            self.left = None
        elif most:
            self.left = forced_tokens_left(input_ids, self.start_id, self.end_id, steps)
        else:
            self.left = (input_ids[:, -1] == self.start_id) * (steps + 1)
        self._left_before = HostCopy(torch.tensor([least, most]) if known else self.left)
        if tolerance:  # a look that came to rest may have ended a reflection before its time
            left = self._left_before.tolist()
            self.in_slots &= max(left) > 0
            self.forced_steps = min(*left, 1)

    def begins_answer(self, new_tokens: torch.LongTensor) -> torch.BoolTensor:
        """For new tokens (B, N) of the rows, after which of them, or at once, the answer begins: (B, N + 1).

        At once; behind thoughts, after the first end of them and the blank line that follows it.
        """
        begins = torch.zeros(len(new_tokens), new_tokens.shape[1] + 1, dtype=torch.bool, device=new_tokens.device)
        if self.think_end_id is None:
            begins[:, 0] = True
        else:
            ends = new_tokens == self.think_end_id
            begins[:, 2:] = (ends & (ends.cumsum(1) == 1))[:, :-1]
        return begins

    def find_uncertain(self, new_tokens: torch.LongTensor, scores: torch.FloatTensor):
        """Finds the rows whose next token, of scores (B, V) behind new tokens (B, N), is uncertain, and may open a reflection.

        Not before the answer begins, more often than `max_reflections`, or right behind a reflection.
        """
        opened = (new_tokens == self.start_id).sum(1)
        allowed = (opened < self.options.max_reflections) & self.begins_answer(new_tokens).any(1)
        allowed &= (new_tokens[:, -1:] != self.end_id).all(1)
        if self.has_pictures is not None:
            allowed &= self.has_pictures
        self.uncertain = allowed & (entropy(scores) > self.options.reflect_threshold)

    def compare(self, look: torch.Tensor, previous: torch.Tensor):
        """Ends the reflections whose looks (B, L) came to rest, from the second step on: half the L1 distance is small."""
        second = (self.left > 1) & (self.left < self.options.latent_steps)
        settled = second & ((look - previous).abs().sum(1) / 2 < self.options.latent_tolerance)
        self.left = torch.where(settled, 1, self.left)

    def feed(self, input_ids: torch.LongTensor, latents: torch.Tensor) -> torch.Tensor:
        """What is fed to the last of tokens (B, T), where it is a slot: `latents` (B, 1, D), or those given; and noise."""
        if self.given is not None:
            self.given = self.given.to(latents)
            number = (input_ids[:, self.prompt_length :] == self.latent_id).sum(1) - 1
            given = self.given[torch.arange(len(number), device=number.device), number % self.given.shape[1]]
            own = (number < 0) | (number >= self.given.shape[1])
            latents = torch.where(own[:, None, None], latents, given[:, None])
        if self.noise:
            latents = latents + self.noise * torch.randn_like(latents)
        if self.recording:
            column = input_ids.shape[1] - 1
            self.fed[column] = latents[:, 0]
            if self.look is not None:
                self.looks[column] = self.look
        return latents

    def expand(self, size: int):
        """Repeats what is known of each row, for beams or several answers."""
        if size == 1:
            return
        tensors = (self.given, self.has_pictures, *(self.pictures or ()))
        self.given, self.has_pictures, *pictures = (
            None if tensor is None else tensor.repeat_interleave(size, 0) for tensor in tensors
        )
        self.pictures = tuple(pictures) or None

    def recorded(
        self, sequences: torch.LongTensor, beam_indices: torch.LongTensor | None, like: torch.Tensor
    ) -> dict[str, torch.Tensor | None]:
        """What `generate` returns of sequences (B, T): latents in the dtype and on the device of `like` (..., D).

        With beams, `beam_indices` (B, new tokens) say from which row of its step a token comes.
        """
        slots = sequences[:, :-1] == self.latent_id  # a slot in the last column was fed nothing
        slots[:, : self.prompt_length] = False
        if beam_indices is not None:
            slots[:, self.prompt_length :] &= beam_indices[:, 1:] >= 0
        counts, numbers = slots.sum(1), slots.cumsum(1) - 1
        rows, columns = slots.nonzero(as_tuple=True)
        sources = rows if beam_indices is None else beam_indices[rows, columns + 1 - self.prompt_length]

        def gather(kept: dict[int, torch.Tensor], gathered: torch.Tensor) -> torch.Tensor:
            if kept:
                steps = torch.searchsorted(torch.tensor(list(kept), device=columns.device), columns)
                gathered[rows, numbers[rows, columns]] = torch.stack(list(kept.values()))[steps, sources].to(
                    gathered.dtype
                )
            return gathered

        shape = len(sequences), int(counts.max())
        attention = None
        if self.options.latent_feedback == "dac":
            length = 0 if self.pictures is None else self.pictures[-1].shape[1]
            attention = gather(self.looks, torch.zeros(*shape, length, device=like.device))
        latents = gather(self.fed, like.new_zeros(*shape, like.shape[-1]))
        return {"latents": latents, "latent_counts": counts, "latent_attention": attention}

    def forced(self, tokens: torch.LongTensor) -> torch.BoolTensor:
        """Which of new tokens (B, N) nobody chose: slots, end tokens, and the start tokens that `reflect` asked for."""
        forced = (tokens == self.latent_id) | (tokens == self.end_id)
        if self.options.reflect == UNCERTAIN:
            forced |= tokens == self.start_id
        elif self.options.reflect:
            forced |= self.begins_answer(tokens)[:, :-1]
        return forced

    def settle_forced(self, logits: tuple, sequences: torch.LongTensor, beam_indices: torch.LongTensor | None):
        """Gives forced tokens a log-probability of 0 in the logits of each step, (rows, vocabulary), in place.

        So an answer's log-probability is that of its free tokens. Arguments as of `recorded`.
        """
        tokens = sequences[:, self.prompt_length :]
        for row, step in self.forced(tokens).nonzero().tolist():
            source = row if beam_indices is None else beam_indices[row, step]
            logits[step][source] = float("-inf")
            logits[step][source, tokens[row, step]] = 0.0


class ReflectionTokenBan(LogitsProcessor):
    """Bans the slot and the end token outside of reflections, and the start token where none may start.

    None may start with `latent_steps=0` or `reflect=False`, nor in a row without a picture where DAC asks the pictures. With
    `reflect="uncertain"` the model itself may not start one: `scores` are then those of the token that it would choose
    instead, and their entropy decides.

    Comes before the processors that keep only the likeliest tokens (`top_k`, `top_p`, `min_p`, `typical_p`), so that they
    never keep banned tokens alone.

    Args:
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        progress (`ReflectionProgress`): Of the call, up to the tokens that the scores follow.
    """

    def __init__(self, token_ids: tuple[int, int, int], progress: ReflectionProgress):
        self.start_id, *banned = token_ids
        self.progress = progress
        if progress.options.reflect == UNCERTAIN or not progress.options.can_start:
            banned = token_ids
        self.banned = torch.tensor(banned)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        progress = self.progress
        if progress.forced_steps:  # in all rows: no score counts
            return scores
        self.banned = self.banned.to(scores.device)
        scores = scores.index_fill(1, self.banned, float("-inf"))
        if progress.has_pictures is not None:
            scores[:, self.start_id].masked_fill_(~progress.has_pictures, float("-inf"))
        if progress.options.reflect == UNCERTAIN:
            progress.find_uncertain(input_ids[:, progress.prompt_length :], scores)
        return scores

    # transformers asks for it at every step; found once it costs half.
    __call__.__signature__ = signature(__call__)


class ReflectionForcing(LogitsProcessor):
    """Forces `latent_steps` slots and the end token after every start token.

    With `reflect=True` it forces the start token where the answer begins, with `"uncertain"` in uncertain rows. Where a row's
    look has come to rest (`latent_tolerance`), the end token comes at once.

    Must come last in the list, so that no other processor forbids what is forced.

    Args:
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        progress (`ReflectionProgress`): Of the call, up to the tokens that the scores follow.
    """

    def __init__(self, token_ids: tuple[int, int, int], progress: ReflectionProgress):
        self.token_ids = token_ids
        self.progress = progress
        self.forced: tuple[torch.FloatTensor, ...] | None = None  # what forces the start, slot and end token, (V,)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        progress, left = self.progress, self.progress.left
        if self.forced is None:
            ids = torch.tensor(self.token_ids, device=scores.device)
            self.forced = scores.new_full((3, scores.shape[1]), float("-inf")).scatter(1, ids[:, None], 0.0).unbind()
        start, slot, end = self.forced
        if left is None and progress.forced_steps:
            return (slot if progress.forced_steps > 1 else end).expand_as(scores)
        new, opens = input_ids.shape[1] - progress.prompt_length, progress.uncertain
        if progress.options.reflect is True and (new == 0 or progress.think_end_id is not None):
            opens = progress.begins_answer(input_ids[:, progress.prompt_length :])[:, -1]
        if opens is not None:
            scores = torch.where(opens[:, None], start, scores)
        if left is None:
            return scores
        scores = torch.where(left[:, None] > 0, slot, scores)
        if progress.in_slots:
            scores = torch.where(left[:, None] == 1, end, scores)
        return scores

    __call__.__signature__ = signature(__call__)


class SilentReflectionStreamer(BaseStreamer):
    """Hands a streamer the prompt and the text, and keeps the tokens of reflections from it; of one row only.

    A streamer of several rows gets all tokens, since it can tell only by their place which row they belong to.

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
        if not self.prompt_is_next and value.numel() == 1:
            hidden = torch.isin(value, self.token_ids)
            if hasattr(self.streamer, "total_tokens"):  # the server's counts what it is given, for the reported usage
                self.streamer.total_tokens += int(hidden.sum())
            value = value[~hidden]
        if self.prompt_is_next or value.numel():
            self.streamer.put(value)
        self.prompt_is_next = False

    def end(self):
        self.streamer.end()
