"""Reader of the Visual CoT release: its metadata, one question a line, and its list of conversations."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vreflection_hub_card.rows import flatten_boxes, path_part, reflection_part, text_part

from .image_folders import ImageFolders
from .images import image_size
from .json_files import read_rows


# The request for a box that the list of conversations appends to a question.
BOX_REQUEST = re.compile(
    r"\s*Please (think step by step and )?provide the bounding box coordinate of the region that.*$"
)


def visual_cot_rows(path: str | Path, folders: ImageFolders, paths: bool = False) -> Iterator[dict[str, Any]]:
    """Reads a file of the Visual CoT release, JSON Lines or a JSON list, as rows of the project's format.

    Two forms are read. The metadata (`docvqa_cot_train.jsonl`, ...):

    ```python
    {"question": "when is the meeting?", "answer": "MAY", "possible_answers": ["MAY", "may"], "image": "mqnk0226_15.png",
     "width": 1638, "height": 2196, "bboxs": [[1146, 368, 1444, 396], [126, 798, 563, 827]], "dataset": "docvqa", "split": "train"}
    ```

    and the list of conversations (`viscot_363k.json`), whose boxes stand in pixels behind the second path. The normalised
    ones in its answers aren't used: they are fractions of the picture after padding it to a square.

    ```python
    {"dataset": "docvqa", "split": "train", "question_id": 138460,
     "image": ["cot/docvqa/kpfl0225_13.png", "cot/docvqa/kpfl0225_13.png###[14, 645, 1776, 1617]"],
     "conversations": [{"from": "human", "value": "<image>\\nWhich ...? Please provide the bounding box coordinate of ..."},
                       {"from": "gpt", "value": "[0.006, 0.407, 0.807, 0.849]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "8%"}]}
    ```

    A question with several boxes gets one reflection for each, in the file's order, before the answer; with `paths` a single
    one that looks at them in this order. Boxes are divided by the `width` and `height` of the file, else by those of the
    picture. A row is bad where

    - its `width` and `height` have another shape than the picture after EXIF's rotation, beyond the rounding of a resize: each
      picture's header is read for it, some 0.1 ms a row,
    - a box is less than a pixel wide or high, or holds fractions already,
    - a box sticks out of its picture: nothing is clipped.
    """

    def fill(row: dict[str, Any], item: dict[str, Any]):
        image, question, answer, boxes = (_conversation if "conversations" in item else _metadata)(item)
        image = folders.find(image, row["dataset"])
        row["images"] = [image]
        if boxes:
            width, height = _size(item, image)
            boxes = [_fractions(box, width, height) for box in boxes]
        reflections = [path_part(boxes)] if paths and len(boxes) > 1 else [*map(reflection_part, boxes)]
        row["messages"] = [
            {"role": "user", "content": [{"type": "image"}, text_part(question)]},
            {"role": "assistant", "content": [*reflections, text_part(answer)]},
        ]

    return read_rows(path, Path(path).stem.removesuffix("_cot_train"), fill)


def _size(item: dict[str, Any], image: str) -> tuple[float, float]:
    """Width and height in whose pixels the boxes of an item are; a `ValueError` where the picture has another shape."""
    width, height = size = item.get("width"), item.get("height")
    if size == (None, None):
        return image_size(image)
    if not all(type(side) in (int, float) and 0 < side < math.inf for side in size):
        raise ValueError(f"`width` and `height` must be numbers of pixels, got {width!r} and {height!r}.")
    if os.path.exists(image):  # a missing picture is found later, and may come
        real_width, real_height = image_size(image)
        # Each side of a resized picture is rounded by less than a pixel.
        if abs(width * real_height - height * real_width) > max(width + height, real_width + real_height):
            raise ValueError(
                f"`width` and `height` are {width} x {height}, but {image} has {real_width} x {real_height} pixels, which is "
                "another shape: the boxes would lie elsewhere."
            )
    return size


def _fractions(box: list[float], width: float, height: float) -> list[float]:
    """A box in pixels as fractions of the sides; a `ValueError` for one that isn't in pixels, or less than one."""
    x0, y0, x1, y1 = box
    if all(0 <= corner <= 1 for corner in box) and max(width, height) > 1:
        raise ValueError(f"the box {box} holds fractions; it must be in pixels, of {width} x {height}.")
    if 0 <= x1 - x0 < 1 or 0 <= y1 - y0 < 1:
        raise ValueError(f"the box {box} is less than a pixel wide or high, of {width} x {height}.")
    return [x0 / width, y0 / height, x1 / width, y1 / height]


def _metadata(item: dict[str, Any]) -> tuple[str, str, str, list[list[float]]]:
    image, question, answer = (_text(item, key) for key in ("image", "question", "answer"))
    return image, question, answer, flatten_boxes(item.get("bboxs"))


def _conversation(item: dict[str, Any]) -> tuple[str, str, str, list[list[float]]]:
    images, turns = item.get("image"), item["conversations"]
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`image` must be a list of paths, got {images!r}.")
    if [turn["from"] for turn in turns] != ["human", "gpt", "human", "gpt"]:
        raise ValueError("`conversations` must be a question, its box, <image> and the answer.")
    question = BOX_REQUEST.sub("", _text(turns[0], "value").replace("<image>", "")).strip()
    boxes = [_pixels(image.partition("###")[2]) for image in images[1:]]
    return images[0], question, _text(turns[3], "value"), boxes


def _pixels(text: str) -> list[float]:
    numbers = re.fullmatch(r"\s*\[([^\[\]]*)\]\s*", text)
    box = [float(number) for number in numbers[1].split(",")] if numbers else []
    if len(box) != 4:
        raise ValueError(f"behind ### must stand a box in pixels, got {text!r}.")
    return box


def _text(item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` must be a text, got {value!r}.")
    return value
