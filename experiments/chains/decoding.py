"""Greedy decoding of the network: prompts are read once, and each answer to them costs its own tokens alone."""

import torch
from transformers import DynamicCache

from modeling_vreflection.generation_vreflection import CACHE

from .network import Batch, Network


class Prompts:
    """The prompts of lines that hold one row each, read up to their last token, which begins every continuation.

    Args:
        network (`Network`): The model.
        batch (`Batch`): The lines.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each prompt.
    """

    @torch.no_grad()
    def __init__(self, network: Network, batch: Batch, lengths: torch.Tensor):
        self.network, self.batch = network, batch
        self.table = network.core.get_input_embeddings().weight.detach()
        self.looked = network.looked_at(batch.features)
        self.rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        self.last = lengths - 1
        # Padded on the left.
        width = int(self.last.max())
        columns = torch.arange(width, device=lengths.device) - width + self.last[:, None]
        self.seen = columns >= 0
        columns = columns.clamp(min=0)
        causal = torch.ones(width, width, dtype=torch.bool, device=lengths.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=lengths.device)  # padding has to see something
        self.cache = DynamicCache()
        self._read(network.embed(batch)[self.rows, columns], columns, (self.seen[:, None] & causal) | itself)

    def _read(self, embeds: torch.Tensor, columns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.network.core.language_model(
            inputs_embeds=embeds,
            position_ids=self.network.positions[:, columns],
            attention_mask={"full_attention": mask[:, None]},
            use_cache=True,
            **{CACHE: self.cache},
        ).last_hidden_state

    def embeds(self, count: int) -> torch.Tensor:
        """Embeddings (B, count, D) of the last token of each prompt and of the row's tokens after it."""
        columns = self.last[:, None] + torch.arange(count, device=self.last.device)
        return self.table[self.batch.ids[self.rows, columns]]

    @torch.no_grad()
    def states(self, embeds: torch.Tensor) -> torch.Tensor:
        """The final norm's output (B, T, D) over embeddings (B, T, D), the last token of the prompt first."""
        length = embeds.shape[1]
        places = torch.arange(length, device=embeds.device)
        causal = (places <= places[:, None]).expand(len(embeds), -1, -1)
        mask = torch.cat([self.seen[:, None].expand(-1, length, -1), causal], 2)
        states = self._read(embeds, self.last[:, None] + places, mask)
        self.cache.crop(-length)
        return states

    @torch.no_grad()
    def next_tokens(self, embeds: torch.Tensor, banned: list[int], column: torch.Tensor | int = -1) -> torch.Tensor:
        """The most probable token (B,) after the column (B,) of embeddings (B, T, D), without the banned ones."""
        logits = self.network.model.lm_head(self.states(embeds)[self.rows[:, 0], column])
        logits[:, banned] = float("-inf")
        return logits.argmax(-1)

    def roll_out(self, feedback: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents (B, S, D) that decoding makes; with `"dac"` their attention (B, S, L), too."""
        embeds, looks = self.embeds(2), []  # the start token is the second
        for _ in self.network.steps:
            latent = self.states(embeds)[:, -1:]
            if feedback == "dac":
                with torch.no_grad():
                    latent, look = self.network.look(latent, self.looked)
                looks.append(look)
            embeds = torch.cat([embeds, latent], 1)
        return embeds[:, 2:], torch.cat(looks, 1) if looks else None
