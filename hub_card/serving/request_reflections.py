"""The reflections of one request, and those of requests that left the batch and may come back; needs no vLLM."""

from collections import OrderedDict

import torch

from modeling_vreflection.decoding_vreflection import ReflectionOptions


class RequestReflections:
    """How far a request is in its reflection, read off its tokens, and what was fed to the slots of its answer.

    A position counts from the prompt's first token. `latents` holds what was fed, by position, as the answer may be computed
    anew where the request lost its place in the batch (preemption).

    Args:
        options (`ReflectionOptions`): The request's.
        token_ids (`tuple[int, int, int]`): Ids of the start, slot and end token.
        prompt_length (`int`): Tokens of the prompt.
        think_end_id (`int`, *optional*): Id of the token that ends thoughts in words, where answers begin with them.
        may_start (`bool`, *optional*, defaults to `True`): Whether there is anything to look at.

    Attributes:
        left (`int`): Next tokens that are forced, slots and the end token.
    """

    def __init__(
        self,
        options: ReflectionOptions,
        token_ids: tuple[int, int, int],
        prompt_length: int,
        think_end_id: int | None = None,
        may_start: bool = True,
    ):
        self.options = options
        self.may_start = may_start and options.can_start
        self.start_id, self.slot_id, self.end_id = token_ids
        self.prompt_length = prompt_length
        self.think_end_id = think_end_id
        self.latents: dict[int, torch.Tensor] = {}
        self.looks: dict[int, torch.Tensor] = {}
        self.state: tuple[int, torch.Tensor] | None = None
        self.start_over([])

    def start_over(self, answer: list[int]) -> None:
        """Reads an answer from its first token on; what was fed behind it doesn't count."""
        self.length = self.prompt_length
        self.left = 0
        self.answer_begins = self.think_end_id is None
        self.thinks_until: int | None = None
        for token in answer:
            self.read(token)
        for kept in (self.latents, self.looks):
            for position in [position for position in kept if position >= self.length]:
                del kept[position]

    def read(self, token: int) -> None:
        """Reads the next token of the answer."""
        self.length += 1
        if token == self.start_id:
            self.left = self.options.latent_steps + 1
        elif token == self.end_id:
            self.left = 0
        elif self.left:
            self.left -= 1
        # The blank line behind the thoughts' end comes before the answer.
        self.answer_begins = self.thinks_until == self.length
        if token == self.think_end_id and self.thinks_until is None:
            self.thinks_until = self.length + 1

    @property
    def forced_token(self) -> int | None:
        """The token that must come next, or `None`."""
        if self.left:
            return self.end_id if self.left == 1 or self.has_settled else self.slot_id
        return self.start_id if self.may_start and self.options.reflect and self.answer_begins else None

    @property
    def has_settled(self) -> bool:
        """Whether the look of the last slot came to rest; as in `generate`, at the earliest that of the second of S > 2."""
        if not self.options.latent_tolerance or not 1 < self.left < self.options.latent_steps:
            return False
        look, previous = self.looks[self.length - 1], self.looks[self.length - 2]
        return bool((look - previous).abs().sum() / 2 < self.options.latent_tolerance)

    def keep_look(self, position: int, look: torch.Tensor) -> None:
        """Keeps where the slot at a position looked (L,), for `has_settled`; of the current reflection only."""
        if self.left == self.options.latent_steps:
            self.looks.clear()
        self.looks[position] = look

    def keep_state(self, state: torch.Tensor) -> None:
        """Keeps the state (D,) at the last token, of which the next slot's latent is made."""
        self.state = self.length, state

    def state_for(self, position: int) -> torch.Tensor:
        """The state (D,) that came before the slot at a position. Raises a `RuntimeError` if it is lost."""
        if self.state is None or self.state[0] != position:
            raise RuntimeError(
                f"The latent at position {position} is lost: too many requests left the batch since then."
            )
        return self.state[1]


class DepartedRequests:
    """Reflections of requests that left the batch, finished or preempted, of which vLLM doesn't tell; the last `limit`."""

    def __init__(self, limit: int):
        self.limit = limit
        self.kept: OrderedDict[str, RequestReflections] = OrderedDict()

    def keep(self, request_id: str, reflections: RequestReflections) -> None:
        if reflections.state is None and not reflections.latents:  # nothing that its tokens don't tell
            return
        self.kept[request_id] = reflections
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)

    def take(self, request_id: str) -> RequestReflections | None:
        return self.kept.pop(request_id, None)
