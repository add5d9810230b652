"""What the tests compare with: prompts, and re-computations that share no code with the package.

They run the stock class, without a cache, on one row at a time, over embeddings that are put together here.
"""

import math

import devices
import torch
from torch import nn
from transformers import LogitsProcessor

from modeling_vreflection.compression_vreflection import BoxGuidedCompression
from vreflection_hub_card.glyphsearch import make_scene


START, SLOT, END = "<|sovt|>", "<|lvr|>", "<|eovt|>"
# Boxes with corners inside patches, on their edges, and smaller than a patch.
BOXES = ([0.1, 0.2, 0.55, 0.7], [0.5, 0.0, 1.0, 0.5], [0.41, 0.73, 0.43, 0.75])


def picture(seed: int, size: tuple[int, int] = (168, 168)):
    """A scene of a seed, cut to (width, height) pixels: different sizes give different numbers of patches."""
    return make_scene(seed).image.crop((0, 0, *size))


def ask(question: str, *pictures) -> list[dict]:
    """A conversation of one question."""
    content = [{"type": "image", "image": image} for image in pictures] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def answer(*parts) -> list[dict]:
    """An assistant's turn of texts and boxes; a box may be a pair (box, image index)."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, tuple):
            content.append({"type": "reflection", "box": part[0], "image_index": part[1]})
        else:
            content.append({"type": "reflection", "box": part})
    return [{"role": "assistant", "content": content}]


def encode(processor, *conversations, **kwargs):
    """Model inputs of conversations, padded to one batch; a prompt where they end with a question."""
    kwargs.setdefault("add_generation_prompt", conversations[0][-1]["role"] == "user")
    options = {"padding": True, "return_tensors": "pt"}
    return processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, processor_kwargs=options, **kwargs
    ).to(devices.DEVICE)


def attend(module: nn.Module, queries: torch.Tensor, features: torch.Tensor, **kwargs):
    """`torch.nn.MultiheadAttention` and LayerNorm on the weights of BCM or DAC: latents and head-averaged attention.

    `features` may be those of `with_positions`: DAC, which has to find its way, reads them in its keys.
    """
    size = queries.shape[-1]
    content, located, places = features.split(size, -1) if features.shape[-1] > size else (features, features, None)
    if isinstance(module, BoxGuidedCompression):
        located = content
    attention = nn.MultiheadAttention(size, module.num_heads, batch_first=True, device=queries.device)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        attention.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        attention.out_proj.weight.copy_(module.o_proj.weight)
        attention.out_proj.bias.copy_(module.o_proj.bias)
    mixed, weights = attention(queries, located, content, average_attn_weights=True, **kwargs)
    latents = nn.functional.layer_norm(mixed, [size], module.norm.weight, module.norm.bias, 1e-6)
    return latents if places is None else latents + weights @ places, weights


def patches_inside(box, grid: tuple[int, int]) -> list[int]:
    """Indices of the merged patches whose interior meets the box's, by trying each."""
    height, width = grid
    x0, y0, x1, y1 = box
    return [
        row * width + column
        for row in range(height)
        for column in range(width)
        if column / width < x1 and (column + 1) / width > x0 and row / height < y1 and (row + 1) / height > y0
    ]


def with_positions(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What `patch_positions="sincos"` lets BCM and DAC read of an image, patch by patch and channel by channel.

    Side by side: features, which values read; these and places, which keys read; places, which go behind the LayerNorm.
    """
    height, width = grid
    count = features.shape[1] // 4
    waves = [4 * (index + 1) / count for index in range(count)]
    rows = []
    for row in range(height):
        for column in range(width):
            angles = [
                [2 * math.pi * wave * at for wave in waves] for at in ((column + 0.5) / width, (row + 0.5) / height)
            ]
            rows.append([wave(angle) for of_axis in angles for wave in (math.sin, math.cos) for angle in of_axis])
    places = torch.tensor(rows, device=features.device)
    places = places / places.square().mean().sqrt()
    return torch.cat([features, features + places * features.square().mean().sqrt(), places], 1)


class Row:
    """One row of a batch without its padding, run on the stock model.

    Args:
        stock: The stock model.
        inputs: The batch.
        index: The row.
    """

    def __init__(self, stock, inputs, index: int = 0):
        config = stock.config
        self.stock = stock
        self.kept = inputs["attention_mask"][index].bool()
        self.ids = inputs["input_ids"][index][self.kept]
        counts = (inputs["input_ids"] == config.vision_start_token_id).sum(1).tolist()
        first, self.images = sum(counts[:index]), counts[index]
        self.grid_thw, self.features, self.grids, self.levels = None, [], [], []
        if self.images:
            with torch.no_grad():
                every = stock.model.get_image_features(
                    inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
                )
            shown = slice(first, first + self.images)
            self.features = list(every.pooler_output[shown])
            levels = getattr(every, "deepstack_features", ())
            if levels and isinstance(levels[0], torch.Tensor):  # older versions of transformers don't split them
                levels = [level.split([len(image) for image in every.pooler_output]) for level in levels]
            self.levels = [torch.cat(list(level)[shown]) for level in levels]
            self.grid_thw = inputs["image_grid_thw"][first : first + self.images]
            self.grids = [(height // 2, width // 2) for _, height, width in self.grid_thw.tolist()]
        self.embeds = stock.get_input_embeddings().weight.detach()[self.ids].clone()
        if self.images:
            self.embeds[self.ids == config.image_token_id] = torch.cat(self.features)

    def extend(self, token: int, embed: torch.Tensor):
        """Appends a token and what is fed for it."""
        self.ids = torch.cat([self.ids, torch.tensor([token], device=self.ids.device)])
        self.embeds = torch.cat([self.embeds, embed[None]])

    def fill(self, columns, values: torch.Tensor):
        """Feeds values (N, D) at columns of the unpadded row."""
        self.embeds = self.embeds.index_put((torch.as_tensor(columns, device=self.embeds.device),), values)

    def run(self, length: int | None = None) -> torch.Tensor:
        """Final-norm states (T, D) of the first `length` positions, from scratch."""
        embeds = self.embeds[:length]
        ids = self.ids[None, :length]
        if self.images:
            types = (ids == self.stock.config.image_token_id).int()
            positions, _ = self.stock.model.get_rope_index(ids, types, image_grid_thw=self.grid_thw)
        else:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        deepstack = {}
        if self.levels:
            mask = ids == self.stock.config.image_token_id
            levels = [level[: mask.sum()] for level in self.levels]
            deepstack = {"visual_pos_masks": mask, "deepstack_visual_embeds": levels}
        return self.stock.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions, use_cache=False, **deepstack
        )[0][0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The vocabulary projection."""
        return states @ self.stock.lm_head.weight.detach().T


@torch.no_grad()
def decode_uncached(
    row: Row,
    ids: list[int],
    new_tokens: int,
    starts=(),
    steps: int = 8,
    feedback=None,
    banned=(),
    given=None,
    look=None,
    tolerance: float = 0.0,
) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding that recomputes everything at every step; `row.fed` then holds what was fed to the slots.

    Args:
        row: The prompt.
        ids: Ids of the start, slot and end token.
        new_tokens: Tokens to decode.
        starts: Steps whose token is the start token, whatever the model says.
        steps: S.
        feedback: What is fed for a state (D,), itself by default.
        banned: Ids that are never chosen.
        given: Tokens to follow instead of the model's choice.
        look: Where a state (D,) looks, a distribution (L,).
        tolerance: Half the L1 distance of two consecutive looks below which a reflection ends.

    Returns:
        The tokens and the logits (new_tokens, V).
    """
    start, slot, end = ids
    table = row.stock.get_input_embeddings().weight.detach()
    tokens, logits, queue, looks = [], [], [], []
    row.fed = []
    for step in range(new_tokens):
        state = row.run()[-1]
        logits.append(row.logits(state))
        allowed = logits[-1].clone()
        allowed[[slot, end, *banned]] = float("-inf")
        if queue:
            token = queue.pop(0)
        elif given is not None:
            token = given[step]
        else:
            token = start if step in starts else int(allowed.argmax())
        if token == start:
            queue, looks = [slot] * steps + [end], []
        fed = table[token]
        if token == slot:
            fed = state if feedback is None else feedback(state)
            if step + 1 < new_tokens:  # nobody reads what the last token is fed
                row.fed.append(fed)
            if tolerance:
                looks.append(look(state))
                if len(looks) > 1 and (looks[-1] - looks[-2]).abs().sum() / 2 < tolerance:
                    queue = [end]
        row.extend(token, fed)
        tokens.append(token)
    return tokens, torch.stack(logits)


class OpenReflections(LogitsProcessor):
    """A user's processor that opens a reflection at given steps of each row, as a trained model would by itself."""

    def __init__(self, start_id: int, prompt_length: int, *starts):
        self.start_id, self.prompt_length, self.starts = start_id, prompt_length, starts

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        copies = len(scores) // len(self.starts)
        for row in range(len(scores)):
            if input_ids.shape[1] - self.prompt_length in self.starts[row // copies]:
                scores[row] = float("-inf")
                scores[row, self.start_id] = 0.0
        return scores
