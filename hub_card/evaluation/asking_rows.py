"""Asking rows of one's own, in batches: as the model decodes by itself, and with its latents replaced."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from ..inference.attention_maps import GREEDY, generate_and_look, offered_sources
from ..inference.encoding import answer_texts, encode_prompts
from ..inference.look_boxes import LookBox, look_boxes
from .harness.answers import AnswerLog
from .interventions import ALWAYS, EXCHANGED, reflection_latents, replace_reflections
from .kept_answers import USUAL, KeptAnswers
from .own_rows import OwnRow


class RowsAsker(KeptAnswers):
    """Asks rows and keeps the answers, see [`KeptAnswers`].

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        processor (`VReflectionProcessor`): Its processor.
        rows (`Sequence[OwnRow]`): What to ask.
        decoding (`dict`): Arguments of `generate`: those of `ReflectionOptions`, all spelled out, and `max_new_tokens`.
        batch_size (`int`): Rows answered at once.
        log (`AnswerLog`, *optional*): Where answers are written as they are given; what it holds is not asked again.
    """

    def __init__(
        self,
        model: VReflectionForConditionalGeneration,
        processor: VReflectionProcessor,
        rows: Sequence[OwnRow],
        decoding: dict,
        batch_size: int,
        log: AnswerLog | None = None,
    ):
        super().__init__(rows, log)
        self.model, self.processor = model, processor
        self.decoding, self.batch_size = decoding, batch_size
        # Of each reflection (S, D), by row. They aren't in the log: where an earlier process gave the answer, it is given again.
        self.latents: dict[int, list[torch.Tensor]] = {}

    def ask(self) -> None:
        """Asks all rows as the model decodes by itself."""
        for batch in self._batches(USUAL, [USUAL], range(len(self.rows))):
            self._keep(USUAL, batch, self._decode_usually(batch))

    def replace(self, names: Sequence[str]) -> None:
        """Asks the rows whose answers hold a reflection again, with their latents replaced; `names` are keys of `INTERVENTIONS`.

        What is exchanged comes from the row half of these rows further on, from the end back to the first: neighbours often
        share a picture. A single row has nobody to exchange with; nor for `"other_picture"` has one where either has no picture.
        """
        rows = self.reflecting
        for batch in self._batches("replaced", names, rows):
            known: dict[tuple[int, ...], dict] = {}
            for name in names:
                partners = self._partners(name, rows)
                asked = [row for row in batch if (name, row) not in self.answers]
                if name in EXCHANGED:
                    asked = [row for row in asked if row in partners]
                if not asked:
                    continue
                own, others = self._own_latents(asked), {}
                if name == "shuffled":
                    others = dict(zip(asked, self._own_latents([partners[row] for row in asked])))
                elif name == "other_picture":
                    others = dict(zip(asked, self._latents_of_other_pictures(asked, partners)))
                slots = self.decoding["max_new_tokens"]
                fed = [
                    replace_reflections(
                        name, latents, self.model, others.get(row), torch.Generator().manual_seed(row), slots
                    )
                    for row, latents in zip(asked, own)
                ]
                if tuple(asked) not in known:
                    known[tuple(asked)] = self._encode(asked)
                tokens, _ = self._generate(known[tuple(asked)], latents=torch.stack(fed), **self.decoding)
                self._keep(name, asked, [{"text": text} for text in answer_texts(self.processor, tokens)])

    @property
    def reflecting(self) -> list[int]:
        """The rows whose answers hold a reflection."""
        return [row for row in range(len(self.rows)) if self.answers[USUAL, row]["reflected"]]

    def _partners(self, name: str, rows: Sequence[int]) -> dict[int, int]:
        """With whom each row exchanges."""
        if len(rows) < 2:
            return {}
        half = len(rows) // 2
        partners = dict(zip(rows, [*rows[half:], *rows[:half]]))
        if name == "other_picture":
            return {row: other for row, other in partners.items() if self.rows[row].images and self.rows[other].images}
        return partners

    def _batches(self, title: str, ways: Sequence[str], rows: Sequence[int]):
        """Yields batches of those rows that weren't asked in all ways, below a progress bar."""
        missing = self._missing(ways, rows)
        with tqdm(total=len(rows), initial=len(rows) - len(missing), desc=title, unit="row") as bar:
            for first in range(0, len(missing), self.batch_size):
                batch = missing[first : first + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _encode(self, batch: Sequence[int]) -> dict:
        return encode_prompts(self.processor, [self.rows[row].conversation() for row in batch], self.model.device)

    def _generate(self, inputs: dict, **options) -> tuple[torch.LongTensor, torch.Tensor]:
        """The new tokens (B, N), and the latents (B, M, D)."""
        result = self.model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True)
        return result.sequences[:, inputs["input_ids"].shape[1] :], result.latents

    def _decode_usually(self, batch: Sequence[int]) -> list[dict]:
        """Answers a batch, and remembers its latents."""
        config, (source, *_) = self.model.config, offered_sources(self.model.config)
        tokens, latents, reflections = generate_and_look(self.model, self._encode(batch), (source,), **self.decoding)
        of_rows = [[reflection.maps[source] for reflection in found] for found in reflections]
        self._remember(batch, latents, tokens)
        ends = torch.isin(tokens, torch.tensor(self.model.generation_config.eos_token_id, device=tokens.device))
        lengths = [int(end.nonzero()[0]) + 1 if end.any() else len(end) for end in ends]
        return [
            {
                "text": text,
                "reflected": bool(attention),
                "tokens": length,
                "latent_tokens": int((row == config.latent_token_id).sum()),
                "looks": [[describe_look(look) for look in look_boxes(maps)] for maps in attention if maps],
            }
            for text, row, length, attention in zip(answer_texts(self.processor, tokens), tokens, lengths, of_rows)
        ]

    def _remember(self, batch: Sequence[int], latents: torch.Tensor, tokens: torch.LongTensor) -> None:
        found = reflection_latents(latents.cpu(), tokens.cpu(), self.model.config)
        self.latents |= dict(zip(batch, found))

    def _own_latents(self, batch: Sequence[int]) -> list[list[torch.Tensor]]:
        if missing := [row for row in batch if row not in self.latents]:
            tokens, latents = self._generate(self._encode(missing), **self.decoding)
            self._remember(missing, latents, tokens)
        return [[own.to(self.model.device) for own in self.latents[row]] for row in batch]

    def _latents_of_other_pictures(self, batch: Sequence[int], partners: dict[int, int]) -> list[list[torch.Tensor]]:
        """Those that the model makes for each row's question about the partner's pictures."""
        conversations = []
        for row in batch:
            others = self.rows[partners[row]].images
            images = [others[place % len(others)] for place in range(len(self.rows[row].images))]
            conversations.append(self.rows[row].conversation(images))
        inputs = encode_prompts(self.processor, conversations, self.model.device)
        tokens, latents = self._generate(inputs, **self.decoding | ALWAYS)
        return reflection_latents(latents, tokens, self.model.config)


def describe_look(look: LookBox) -> dict:
    """A look with four decimals: the last digits depend on what else is in the batch."""
    rounded = {"inside": round(look.inside, 4), "outside": round(look.outside, 4)}
    return look.to_dict() | {"box": [round(corner, 4) for corner in look.box], **rounded}
