"""From rows with messages, pictures and boxes to a batch of tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from trl.data_utils import prepare_multimodal_messages

from modeling_vreflection import VReflectionProcessor


@dataclass
class VReflectionDataCollator:
    """Renders, tokenizes and pads rows of the project's message format; labels the assistant's tokens.

    Each row holds `messages`, with pictures inline or as placeholders for its `images`, and optionally `id`. Rows with and
    without pictures, with and without reflections go together. Slots, end tokens and whatever the assistant didn't say
    have the label -100.

    The batch holds `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` (B, T); with pictures `pixel_values`
    and `image_grid_thw`; `boxes` (G, 5), one a reflection; and `sample_ids`, a list of strings for messages:

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
        max_length (`int`, *optional*): Longest row in tokens.

    Raises:
        ValueError: What is wrong with a row, its id, and what to do.
    """

    processor: VReflectionProcessor
    config: PreTrainedConfig
    reflect: bool = True
    align_segments: bool = False
    slot_ce: bool = False
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [str(row.get("id", f"row {number} of the batch")) for number, row in enumerate(rows)]
        try:
            batch = self._encode([self._messages(row, name) for row, name in zip(rows, ids)])
        except ValueError as error:
            raise ValueError(f"{error} The batch's samples, in order: {', '.join(ids)}.") from error
        if self.max_length is not None:
            for name, length in zip(ids, batch["attention_mask"].sum(1).tolist()):
                if length > self.max_length:
                    raise ValueError(
                        f"Sample {name} has {length} tokens, above `max_length` ({self.max_length}). Nothing is cut: "
                        "raise the limit, shrink the pictures, or drop the sample."
                    )
        batch["labels"] = self._labels(batch.pop("assistant_masks"), batch)
        for name, labelled in zip(ids, (batch["labels"] != -100).any(1).tolist()):
            if not labelled:
                raise ValueError(
                    f"Sample {name} has nothing to learn from: no assistant's turn, or transformers below 5.18, which "
                    "doesn't find it beside pictures."
                )
        if self.align_segments:
            batch = self._align(batch)
        batch["sample_ids"] = ids
        return batch

    def _messages(self, row: dict[str, Any], name: str) -> list[dict]:
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        try:
            messages = prepare_multimodal_messages(row["messages"], images=images)
        except ValueError as error:
            raise ValueError(f"Sample {name}: {error}") from error
        if self.reflect:
            return messages
        return [
            {**message, "content": [part for part in message["content"] if part["type"] != "reflection"]}
            for message in messages
        ]

    def _encode(self, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        return dict(encoded)

    def _labels(self, spoken: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        input_ids = batch["input_ids"]
        supervised = spoken.bool() & batch["attention_mask"].bool()
        if not self.slot_ce:
            supervised &= (input_ids != self.config.latent_token_id) & (input_ids != self.config.latent_end_token_id)
        supervised[:, 0] = False  # nothing predicts a row's first token
        return input_ids.masked_fill(~supervised, -100)

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
