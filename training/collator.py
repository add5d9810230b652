"""From rows with messages, pictures and boxes to a batch of tensors, padded or packed."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.rows import BadRow

from .data.images import load_image
from .data.inspection import check_messages, pictures, read_messages


DUMMY_ROW = {
    "id": "the dummy row",
    "images": [Image.new("RGB", (56, 56))],
    "messages": [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "reflection", "box": [0, 0, 1, 1]}, {"type": "text", "text": "."}]},
    ],
}
# Of a batch: for the trainer, not for the model.
NON_MODEL_KEYS = ("labels", "sample_ids", "reflections", "num_tokens", "dummy", "skipped")


@dataclass
class VReflectionDataCollator:
    """Renders, tokenizes and pads rows of the project's message format, or packs them; labels the assistant's tokens.

    Each row holds `messages`, with pictures inline or as placeholders for its `images`, and optionally `id`. Rows with and
    without pictures, with and without reflections go together. Slots, end tokens and all but the assistant's tokens have the
    label -100. Where examples are lists of rows, each list is packed into one row of the batch.

    The batch holds `input_ids`, `mm_token_type_ids`, `labels` (B, T), and `attention_mask` (B, T), or if packed
    `position_ids` (B, T), which begin anew with each sample; with pictures `pixel_values` and `image_grid_thw`; and
    `boxes` (G, S, 5), for each reflection a line a latent step: x0, y0, x1, y1 in 1/65,536 and the image's index in the
    batch. For the trainer alone there are, of the samples, `sample_ids` and how many `reflections` each has; `skipped`, what
    is wrong with each row that was left out; `num_tokens`, without padding; and `dummy`, whether a dummy row follows, see
    `every_module`.

    ```python
    {'input_ids': tensor([[257, 268, ...], ...]), 'labels': tensor([[-100, ..., 379, -100, ...], ...]),
     'boxes': tensor([[[44861, 24967, 63585, 43690, 0], ...], ...]), 'sample_ids': ['glyphsearch-train-0', ...], ...}
    ```

    Args:
        processor (`VReflectionProcessor`): The processor.
        config (`PreTrainedConfig`): The model's config, for the ids of the latent tokens.
        reflect (`bool`): Whether to keep the reflections; plain fine-tuning drops them.
        align_segments (`bool`): Whether to pad so that all segments start in one column, as feeding states back needs.
        slot_ce (`bool`): Whether slots and end tokens are labelled, too.
        closing_ce (`bool`): Whether what closes is labelled, too: end tokens, and the newline after the assistant's
            `<|im_end|>`.
        max_length (`int`, *optional*): Longest sample in tokens.
        on_bad_row (`str`): `"error"` raises at a bad row, `"skip"` leaves it out and notes it in `skipped`.
        every_module (`bool`): Whether a batch without a reflection (or, where those are dropped, without a picture) gets a
            dummy row, which has no labels: zero weight; keeps every module in the graph, so that ranks stay in step.

    Raises:
        BadRow: What is wrong with a row, its id, and what to do.
    """

    processor: VReflectionProcessor
    config: PreTrainedConfig
    reflect: bool = True
    align_segments: bool = False
    slot_ce: bool = False
    closing_ce: bool = False
    max_length: int | None = None
    on_bad_row: str = "error"
    every_module: bool = False

    def __call__(self, examples: list[dict[str, Any]] | list[list[dict[str, Any]]]) -> dict[str, Any]:
        packed = isinstance(examples[0], list)
        packs, names, reflections, skipped = [], [], [], []
        for rows in examples if packed else [[row] for row in examples]:
            pack = []
            for row in rows:
                name = str(row.get("id", f"row {len(names) + len(skipped)} of the batch"))
                try:
                    encoded, count = self._encode(row, name)
                    self._check(encoded, name)
                except BadRow as error:
                    if self.on_bad_row == "error":
                        raise
                    skipped.append(str(error))
                    continue
                pack.append(encoded)
                names.append(name)
                reflections.append(count)
            if pack:
                packs.append(pack)
        num_tokens = sum(len(row["input_ids"]) for pack in packs for row in pack)
        used = any(reflections) if self.reflect else any("pixel_values" in row for pack in packs for row in pack)
        dummy = not names or (self.every_module and not used)
        if dummy:
            row, _ = self._encode(DUMMY_ROW, DUMMY_ROW["id"])
            row["labels"] = torch.full_like(row["labels"], -100)
            packs = [*packs[:-1], [*packs[-1], row]] if packed and packs else [*packs, [row]]
        batch = self._join(packs, packed)
        facts = {"sample_ids": names, "reflections": reflections, "skipped": skipped}
        return {**batch, **facts, "num_tokens": num_tokens, "dummy": dummy}

    def _encode(self, row: dict[str, Any], name: str) -> tuple[dict[str, torch.Tensor], int]:
        """The tensors of a row, those of its text of shape (T,), and how many reflections it has."""
        try:
            messages = read_messages(row, self.reflect)
            images = iter([load_image(image, self.processor.image_processor) for image in pictures(messages)])
            count = len(check_messages(messages, f"Sample {name}", row, self.processor))
            for message in messages:
                message["content"] = [
                    {**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]
                ]
            encoded = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
        except BadRow:
            raise
        except (OSError, ValueError) as error:  # a picture, or image tokens in the text
            raise BadRow(f"Sample {name}: {error}") from error
        texts = ("input_ids", "attention_mask", "mm_token_type_ids", "assistant_masks")
        encoded = {key: value[0] if key in texts else value for key, value in encoded.items()}
        input_ids, supervised = encoded["input_ids"], encoded.pop("assistant_masks").bool()
        if not self.slot_ce:
            supervised &= input_ids != self.config.latent_token_id
            if not self.closing_ce:
                supervised &= input_ids != self.config.latent_end_token_id
        if self.closing_ce:  # the template's mask ends with `<|im_end|>`
            turn_ends = supervised & (input_ids == self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
            supervised[1:] |= turn_ends[:-1]
        return {**encoded, "labels": input_ids.masked_fill(~supervised, -100)}, count

    def _check(self, encoded: dict[str, torch.Tensor], name: str):
        length = len(encoded["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise BadRow(
                f"Sample {name} has {length} tokens, above `max_length` ({self.max_length}). Nothing is cut: raise "
                "the limit, shrink the pictures, or drop the sample."
            )
        if (encoded["labels"] == -100).all():
            raise BadRow(
                f"Sample {name} has nothing to learn from: no assistant's turn, or transformers below 5.18, which "
                "doesn't find it next to pictures."
            )

    def _join(self, packs: list[list[dict[str, torch.Tensor]]], packed: bool) -> dict[str, torch.Tensor]:
        """Puts rows side by side in their packs, and pads these."""
        rows = [row for pack in packs for row in pack]
        shifts = self._shifts(rows) if self.align_segments and not packed else [0] * len(packs)
        pad_token_id = self.processor.tokenizer.pad_token_id
        padding = {"input_ids": pad_token_id, "labels": -100, "attention_mask": 0, "mm_token_type_ids": 0}
        batch = {}
        for key, value in padding.items():
            joined = [torch.cat([row[key] for row in pack]) for pack in packs]
            shifted = [F.pad(text, (shift, 0), value=value) for text, shift in zip(joined, shifts)]
            batch[key] = pad_sequence(shifted, batch_first=True, padding_value=value)
        if packed:
            del batch["attention_mask"]
            lengths = [[len(row["input_ids"]) for row in pack] for pack in packs]
            # What pads a pack is one more sample.
            sizes = [[*pack, batch["input_ids"].shape[1] - sum(pack)] for pack in lengths]
            batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in pack]) for pack in sizes])
        for key in ("pixel_values", "image_grid_thw", "boxes"):
            if found := [row[key] for row in rows if key in row]:
                batch[key] = torch.cat(found)
        if "boxes" in batch:  # from images of the row to images of the batch
            images = torch.tensor([len(row.get("image_grid_thw", ())) for row in rows])
            boxes = torch.tensor([len(row.get("boxes", ())) for row in rows])
            batch["boxes"][..., 4] += (images.cumsum(0) - images).repeat_interleave(boxes)[:, None]
        return batch

    def _shifts(self, rows: list[dict[str, torch.Tensor]]) -> list[int]:
        """How far to the right each row goes, so that all segments start where the last of them does."""
        slots = [row["input_ids"] == self.config.latent_token_id for row in rows]
        starts = [int(slot.int().argmax()) if slot.any() else len(slot) for slot in slots]
        last = max((start for start, slot in zip(starts, slots) if slot.any()), default=0)
        return [max(last - start, 0) for start in starts]
