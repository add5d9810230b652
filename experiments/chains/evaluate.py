"""Answers of a trained arm to questions about unseen scenes: accuracy by kind and hops, other latents, where it looked."""

from collections import defaultdict

import torch

from .arms import Arm
from .decoding import Prompts
from .network import Batch, Network
from .rows import Example, Rows, Scenes, Tokens


CHUNK = 2048
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.4)
REPLACEMENTS = ("zeroed", "noise", "shuffled", "first_look", "reversed")
MAX_TEXT_TOKENS = 36


def replace_all(name: str, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents (B, S, D) to feed in place of the model's own."""
    if name == "zeroed":
        return torch.zeros_like(latents)
    if name == "noise":
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return noise * (latents.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    if name == "shuffled":  # rows of one scene stand together
        return latents.roll(len(latents) // 2, 0)
    if name == "first_look":
        return latents[:, :1].expand_as(latents)
    if name == "reversed":
        return latents.flip(1)
    raise ValueError(f"Unknown replacement {name!r}; choose one of {', '.join(REPLACEMENTS)}.")


class Evaluation:
    """The test rows of an arm, asked in one way after the other; results by kind and hops."""

    def __init__(self, network: Network, tokens: Tokens, scenes: Scenes, examples: list[list[Example]]):
        self.network, self.tokens, self.scenes = network, tokens, scenes
        self.examples = [example for group in examples for example in group]
        self.device = scenes.features.device
        self.end = tokens.tokenizer.eos_token_id
        self.latent_ids = list(tokens.config.latent_token_ids)
        self.start_id, self.slot_id, self.end_id = self.latent_ids
        self.glyphs = torch.tensor([example.glyph for example in self.examples], device=self.device)

    @torch.compiler.set_stance("force_eager")  # compiled code is for the lines of training
    def run(self, arm: Arm) -> dict:
        """All that the table says of an arm, ready for JSON."""
        alone = [[example] for example in self.examples]
        rows = self.tokens.rows(alone, arm, self.device)
        length = (rows.row >= -1).sum(1) - rows.answer[:, 0]
        results = {"tokens of a right answer": self.by_kind(length.tolist())}
        for decoding in arm.decodings:
            if decoding in ("text", "filler"):
                results[decoding] = {"accuracy": self.text(rows, slots=decoding == "filler")}
            else:
                results[decoding] = self.reflecting(rows, decoding)
        if arm.plain_rows:
            results["without reflecting"] = {"accuracy": self.text(rows, banned=self.latent_ids)}
        return results

    def text(self, rows: Rows, slots: bool = False, banned: list[int] | None = None) -> dict:
        """Accuracy of greedy text; with `slots`, after a reflection whose slots keep their embeddings."""
        right = []
        for index in self.chunks(rows):
            prompts = self.prompts(rows, index)
            embeds = prompts.embeds(len(self.network.steps) + 3 if slots else 1)
            right += self.continue_text(prompts, embeds, self.glyphs[index], banned or [self.slot_id])
        return self.by_kind(right)

    def prompts(self, rows: Rows, index: torch.Tensor) -> Prompts:
        """The prompts of the rows of these numbers."""
        return Prompts(self.network, Batch.pick(rows, self.scenes, index), rows.answer[index, 0])

    def continue_text(
        self, prompts: Prompts, embeds: torch.Tensor, glyphs: torch.Tensor, banned: list[int]
    ) -> list[bool]:
        """Whether the last token before the end of the turn is the glyph, where text goes on after embeddings (B, T, D)."""
        last, running = torch.full_like(glyphs, -1), torch.ones_like(glyphs, dtype=torch.bool)
        for _ in range(MAX_TEXT_TOKENS):
            token = prompts.next_tokens(embeds, banned)
            running &= token != self.end
            last = torch.where(running, token, last)
            if not running.any():
                break
            embeds = torch.cat([embeds, prompts.table[token][:, None]], 1)
        return ((last == glyphs) & ~running).tolist()

    def reflecting(self, rows: Rows, feedback: str) -> dict:
        """Accuracy with the model's own latents, and with others; looks; steps saved by `latent_tolerance`."""
        generator = torch.Generator().manual_seed(0)
        right, begins, inside, tolerant = defaultdict(list), [], [], defaultdict(list)
        for index in self.chunks(rows):
            prompts, glyphs = self.prompts(rows, index), self.glyphs[index]
            begins += (prompts.next_tokens(prompts.embeds(1), []) == self.start_id).tolist()
            latents, looks = prompts.roll_out(feedback)
            right["own"] += self.answer(prompts, latents, glyphs)
            for name in REPLACEMENTS:
                right[name] += self.answer(prompts, replace_all(name, latents, generator), glyphs)
            if looks is not None:
                inside.append(prompts.batch.inside.gather(2, looks.argmax(-1, keepdim=True))[..., 0])
                moved = (looks[:, 1:] - looks[:, :-1]).abs().sum(-1) / 2
                for tolerance in TOLERANCES:
                    # The step whose look is like the one before is the last.
                    settled = torch.cat([moved < tolerance, torch.ones_like(moved[:, :1], dtype=torch.bool)], 1)
                    count = (settled.int().argmax(1) + 2).clamp(max=len(self.network.steps))
                    hits = self.answer(prompts, latents, glyphs, count)
                    tolerant[tolerance] += list(zip(hits, count.tolist()))
        results = {
            "accuracy": self.by_kind(right.pop("own")),
            "begins a reflection": sum(begins) / len(begins),
            "replaced": {name: self.by_kind(values) for name, values in right.items()},
        }
        if inside:
            steps = torch.cat(inside).T.tolist()
            results["inside the box by step"] = [self.by_kind(step) for step in steps]
            results["tolerance"] = {
                str(tolerance): {
                    "accuracy": self.by_kind([hit for hit, _ in values]),
                    "steps": self.by_kind([count for _, count in values]),
                }
                for tolerance, values in tolerant.items()
            }
        return results

    def answer(self, prompts: Prompts, latents: torch.Tensor, glyphs: torch.Tensor, count=None) -> list[bool]:
        """Whether the answers after these latents, or after the first `count` (B,) of them, are right and end there."""
        begun = torch.cat([prompts.embeds(2), latents], 1)
        column = torch.full_like(glyphs, begun.shape[1]) if count is None else 2 + count
        embeds = torch.cat([begun, torch.zeros_like(begun[:, :2])], 1)
        everyone = torch.arange(len(embeds), device=embeds.device)
        embeds[everyone, column] = prompts.table[self.end_id]
        token = prompts.next_tokens(embeds, self.latent_ids, column)
        embeds[everyone, column + 1] = prompts.table[token]
        end = prompts.next_tokens(embeds, self.latent_ids, column + 1)
        return ((token == glyphs) & (end == self.end)).tolist()

    def chunks(self, rows: Rows):
        """The rows' numbers, some at a time, so that each part holds rows of every kind."""
        order = torch.arange(len(rows.ids), device=rows.ids.device)
        return order.split(CHUNK)

    def by_kind(self, values: list) -> dict[str, dict[str, list]]:
        """Sum and count by kind and hops."""
        sums: dict = defaultdict(lambda: defaultdict(lambda: [0, 0]))
        for example, value in zip(self.examples, values, strict=True):
            entry = sums[example.kind][str(example.hops)]
            entry[0] += int(value)
            entry[1] += 1
        return {kind: dict(hops) for kind, hops in sums.items()}
