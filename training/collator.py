"""From rows with messages, pictures and boxes to a batch of tensors, padded or packed."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.processing_vreflection import rendered_reflections
from vreflection_hub_card.rows import BadRow, check_past_reflections, row_messages

from .data.images import load_image
from .data.measure import measure_row


SPARE_ROW = {
    "id": "the spare sample",
    "images": [Image.new("RGB", (56, 56))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "."}]},
    ],
}


@dataclass
class VReflectionDataCollator:
    """Renders, tokenizes and pads rows of the project's message format, or packs them; labels the assistant's tokens.

    Each row holds `messages`, with pictures inline or as placeholders for its `images`, and optionally `id`. Rows with and
    without pictures, with and without reflections go together. Slots, end tokens and whatever the assistant didn't say
    have the label -100. Where examples are lists of rows, each list is packed into one row of the batch.

    The batch holds `input_ids`, `mm_token_type_ids`, `labels` (B, T), and `attention_mask` (B, T), or if packed
    `position_ids` (B, T), which begin anew with each sample; with pictures `pixel_values` and `image_grid_thw`; and
    `boxes` (G, 5), one a reflection. For the trainer alone there are, of the samples, `sample_ids` and how many
    `reflections` each has; `skipped`, what is wrong with each row that was left out; `num_tokens`, without padding; and
    `spare`, whether one more sample follows, see `every_module`.

    ```python
    {'input_ids': tensor([[257, 268, ...], ...]), 'labels': tensor([[-100, ..., 379, -100, ...], ...]),
     'boxes': tensor([[0, 44861, 24967, 63585, 43690], ...]), 'sample_ids': ['glyphsearch-train-0', ...], ...}
    ```

    Args:
        processor (`VReflectionProcessor`): The processor.
        config (`PreTrainedConfig`): The model's config, for the ids of the latent tokens.
        reflect (`bool`): Whether to keep the reflections; plain fine-tuning drops them.
        align_segments (`bool`): Whether to pad so that all segments start in one column, as feeding states back needs.
        slot_ce (`bool`): Whether slots and end tokens are labelled, too.
        max_length (`int`, *optional*): Longest sample in tokens.
        on_bad_row (`str`): `"error"` raises at a bad row, `"skip"` leaves it out and says so in `skipped`.
        every_module (`bool`): Whether a batch without a reflection (or, where those are dropped, without a picture) gets a
            spare sample, which has no labels. Processes that don't run the same modules wait for one another for ever.

    Raises:
        BadRow: What is wrong with a row, its id, and what to do.
    """

    processor: VReflectionProcessor
    config: PreTrainedConfig
    reflect: bool = True
    align_segments: bool = False
    slot_ce: bool = False
    max_length: int | None = None
    on_bad_row: str = "error"
    every_module: bool = False

    def __call__(self, examples: list[dict[str, Any]] | list[list[dict[str, Any]]]) -> dict[str, Any]:
        packed = isinstance(examples[0], list)
        packs = examples if packed else [[row] for row in examples]
        skipped = []
        try:
            batch = self._collate(packs, packed)
        except BadRow:
            packs = [[row for row in pack if self._is_good(row, skipped)] for pack in packs]
            batch = self._collate([pack for pack in packs if pack], packed)
        batch["skipped"] = skipped
        return batch

    def _is_good(self, row: dict[str, Any], skipped: list[str]) -> bool:
        try:
            measure_row(row, self.processor, self.reflect)  # what it finds it says best
            self._collate([[row]], packed=False)
        except BadRow as error:
            if self.on_bad_row == "error":
                raise
            skipped.append(str(error))
            return False
        return True

    def _collate(self, packs: list[list[dict[str, Any]]], packed: bool) -> dict[str, Any]:
        rows = [row for pack in packs for row in pack]
        sizes = [len(pack) for pack in packs]
        names = [str(row.get("id", f"row {number} of the batch")) for number, row in enumerate(rows)]
        conversations = [self._messages(row, name) for row, name in zip(rows, names)]
        reflections = [len(rendered_reflections(messages)) for messages in conversations]
        used = reflections if self.reflect else map(holds_picture, conversations)
        spare = not rows or (self.every_module and not any(used))
        if spare:
            conversations.append(self._messages(SPARE_ROW, SPARE_ROW["id"]))
            sizes = [*sizes[:-1], sizes[-1] + 1] if packed and sizes else [*sizes, 1]
        try:
            batch = self._encode(conversations)
        except ValueError as error:
            raise BadRow(f"Sample {', '.join(names)}: {error}") from error
        batch["labels"] = self._labels(batch.pop("assistant_masks"), batch)
        lengths = batch["attention_mask"].sum(1)
        self._check(names, lengths, batch["labels"])
        if spare:
            batch["labels"][-1] = -100
        if packed:
            batch = self._pack(batch, sizes)
        elif self.align_segments:
            batch = self._align(batch)
        facts = {"sample_ids": names, "reflections": reflections, "spare": spare}
        return {**batch, **facts, "num_tokens": int(lengths[: len(rows)].sum())}

    def _messages(self, row: dict[str, Any], name: str) -> list[dict]:
        try:
            messages = [{**message, "content": self._parts(message["content"])} for message in row_messages(row)]
        except (OSError, ValueError) as error:  # a picture
            raise error if isinstance(error, BadRow) else BadRow(f"Sample {name}: {error}") from error
        check_past_reflections(messages, row)
        return messages

    def _parts(self, content: list[dict]) -> list[dict]:
        return [
            {**part, "image": load_image(part["image"], self.processor.image_processor)}
            if part["type"] == "image"
            else part
            for part in content
            if self.reflect or part["type"] != "reflection"
        ]

    def _encode(self, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            # `load_image` has resized the pictures
            processor_kwargs={"padding": True, "padding_side": "right", "do_resize": False},
        )
        return dict(encoded)

    def _labels(self, spoken: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        input_ids = batch["input_ids"]
        supervised = spoken.bool() & batch["attention_mask"].bool()
        if not self.slot_ce:
            supervised &= (input_ids != self.config.latent_token_id) & (input_ids != self.config.latent_end_token_id)
        return input_ids.masked_fill(~supervised, -100)

    def _check(self, names: list[str], lengths: torch.Tensor, labels: torch.Tensor):
        labelled = (labels != -100).any(1).tolist()
        for name, length, learns in zip(names, lengths.tolist(), labelled):
            if self.max_length is not None and length > self.max_length:
                raise BadRow(
                    f"Sample {name} has {length} tokens, above `max_length` ({self.max_length}). Nothing is cut: raise "
                    "the limit, shrink the pictures, or drop the sample."
                )
            if not learns:
                raise BadRow(
                    f"Sample {name} has nothing to learn from: no assistant's turn, or transformers below 5.18, which "
                    "doesn't find it beside pictures."
                )

    def _pack(self, batch: dict[str, torch.Tensor], sizes: list[int]) -> dict[str, torch.Tensor]:
        real = batch.pop("attention_mask").bool()
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100, "mm_token_type_ids": 0}
        for key, value in padding.items():
            samples = zip(batch[key].split(sizes), real.split(sizes))
            batch[key] = pad_sequence([tokens[mask] for tokens, mask in samples], True, value)
        length = batch["input_ids"].shape[1]
        # What pads a pack is one more sample.
        lengths = [[*pack.tolist(), length - int(pack.sum())] for pack in real.sum(1).split(sizes)]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in pack]) for pack in lengths])
        return batch

    def _align(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        in_slot = batch["input_ids"] == self.config.latent_token_id
        first = torch.where(in_slot.any(1), in_slot.int().argmax(1), batch["attention_mask"].sum(1))
        shifts = first[in_slot.any(1)].max() - first if in_slot.any() else torch.zeros_like(first)
        shifts = shifts.clamp(min=0)
        length = int((batch["attention_mask"].sum(1) + shifts).max())
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": -100}
        for key in ("input_ids", "labels", "attention_mask", "mm_token_type_ids"):
            moved = batch[key].new_full((len(shifts), length), padding.get(key, 0))
            for row, (values, shift) in enumerate(zip(batch[key], shifts.tolist())):
                kept = values[: length - shift]
                moved[row, shift : shift + len(kept)] = kept
            batch[key] = moved
        return batch


def holds_picture(messages: list[dict]) -> bool:
    """Whether a conversation shows anything."""
    return any(part["type"] == "image" for message in messages for part in message["content"])
