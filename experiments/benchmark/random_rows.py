"""Random rows to train on: pictures of one size, or of sizes as in Visual CoT."""

import math
import random

import numpy as np
from datasets import Dataset
from PIL import Image

from vreflection_hub_card.glyphsearch import COLOURS, GLYPHS, SHAPES
from vreflection_hub_card.rows import reflection_part, text_part

from .backbones import CELL, MAX_PATCHES


MIN_PATCHES = 128
# The paper's limits of packing (4.1), in tokens.
LIMITS = {"max_length": 16_384, "long_sample_length": 4096}
# Assumed, after Visual CoT's sources: thousands of samples, and a typical picture's width and height.
VISUAL_COT = (
    (136, 500, 375),  # Flickr30k
    (88, 500, 400),  # GQA
    (43, 640, 480),  # Visual7W
    (43, 1024, 768),  # Open Images
    (33, 1700, 2200),  # DocVQA
    (32, 1024, 768),  # TextCaps
    (16, 1024, 768),  # TextVQA
    (15, 1700, 2200),  # DUDE
    (15, 1000, 2500),  # InfographicsVQA
    (10, 500, 375),  # CUB
    (4, 900, 1900),  # SROIE
    (3, 640, 480),  # VSR
)
VISUAL_COT_NOTE = (
    "assumed, after Visual CoT's twelve sources: mostly photographs, a sixth of them pages, receipts and posters, each with "
    "one typical picture size, sides varied by up to 20 %; questions of 8 to 20 words, answers of 4 to 24"
)


def random_row(grid: tuple[int, int], rng: random.Random) -> dict:
    """A row with a picture of `grid` merged patches, a reflection on about a tenth of it, a question and an answer."""
    height, width = grid
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height * CELL, width * CELL, 3), np.uint8)
    x, y = rng.uniform(0, 0.68), rng.uniform(0, 0.68)
    words = [*COLOURS, *SHAPES, *GLYPHS]
    question, answer = (" ".join(rng.choices(words, k=rng.randint(*span))) for span in ((8, 20), (4, 24)))
    return {
        "images": [Image.fromarray(pixels)],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, text_part(question)]},
            {"role": "assistant", "content": [reflection_part([x, y, x + 0.32, y + 0.32]), text_part(answer)]},
        ],
    }


def draw_grid(rng: random.Random, divisor: int) -> tuple[int, int]:
    """The merged grid of a picture as in Visual CoT, its area within the paper's limits, all divided by `divisor`."""
    _, width, height = rng.choices(VISUAL_COT, [source[0] for source in VISUAL_COT])[0]
    width, height = width * rng.uniform(0.8, 1.2) / CELL, height * rng.uniform(0.8, 1.2) / CELL
    area = min(max(width * height, MIN_PATCHES), MAX_PATCHES) / divisor
    rows = max(1, math.floor(math.sqrt(area * height / width)))
    return rows, max(1, math.floor(area / rows))


def as_dataset(rows: list[dict], reflect: bool = True) -> Dataset:
    """A data set that hands the rows out as they are, or without their reflections."""
    rows = rows if reflect else [without_reflection(row) for row in rows]

    def pick(batch: dict) -> dict:
        return {key: [rows[index][key] for index in batch["index"]] for key in ("images", "messages")}

    return Dataset.from_dict({"index": range(len(rows))}).with_transform(pick)


def without_reflection(row: dict) -> dict:
    """The row as plain fine-tuning gets it."""
    messages = [
        {**message, "content": [part for part in message["content"] if part["type"] != "reflection"]}
        for message in row["messages"]
    ]
    return {**row, "messages": messages}
