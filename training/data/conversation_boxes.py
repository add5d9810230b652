"""Boxes of other trainers' rows: columns of their own, or `objects`, to which the texts' `<bbox>` refer."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vreflection_hub_card.rows import flatten_boxes, is_given, path_part, reflection_part

from .images import image_size


# A box as fractions of its picture's sides, and the number of the picture.
Region = tuple[list[float], int]
# What the numbers of a box may count; ms-swift's name for it.
BOX_UNITS = {"pixels": "real", "thousandths": None, "fractions": "norm1"}
# A box that an answer looks at stands at its head, or behind the name of the thing.
LOOKED_AT = re.compile(r"\A\s*<bbox>(?:\s*<bbox>)*\s*|(?<=<ref-object>)(?:\s*<bbox>)+")


def read_regions(
    item: dict[str, Any], columns: Sequence[str], images: list[Any], unit: str | None
) -> tuple[list[Region], list[str]]:
    """Each box, as fractions of its picture's sides, with the number of the picture, and the names of things."""
    columns = [column for column in columns if is_given(item.get(column))]
    if len(columns) > 1:
        raise ValueError(f"there are both `{columns[0]}` and `{columns[1]}`: leave one of them out.")
    if not columns:
        return [], []
    column, objects = columns[0], item[columns[0]]
    if column != "objects":
        if len(images) > 1:
            raise ValueError(f"`{column}` doesn't say in which of the {len(images)} pictures the boxes lie.")
        objects = {"bbox": objects}
    elif not isinstance(objects, dict):
        raise ValueError(f"`objects` must hold `ref` and `bbox`, got {objects!r}.")
    else:
        column = "objects.bbox"
    if unknown := [
        key for key in objects if key not in ("ref", "bbox", "bbox_type", "image_id") and is_given(objects[key])
    ]:
        raise ValueError(f"nothing reads `objects.{unknown[0]}`, which is {objects[unknown[0]]!r}.")
    boxes = flatten_boxes(objects["bbox"]) if is_given(objects.get("bbox")) else []
    names = objects.get("ref") or []
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"`objects.ref` must be a list of names, got {names!r}.")
    names = [as_text(name, "objects.ref") for name in names]
    numbers = objects.get("image_id")
    numbers = (
        [0] * len(boxes) if not is_given(numbers) else numbers if isinstance(numbers, (list, tuple)) else [numbers]
    )
    if len(numbers) != len(boxes):
        raise ValueError(f"`objects.image_id` must have a number for each of the {len(boxes)} boxes, got {numbers!r}.")
    unit = _unit(unit, objects.get("bbox_type"), column) if boxes else None
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < len(images):
            raise ValueError(
                f"a box of `{column}` lies in picture {number!r}, but the row has {len(images)} pictures."
            )
    return [(_fractions(box, unit, images[number], column), number) for box, number in zip(boxes, numbers)], names


def take_boxes(text: str, waiting: Iterator[Region]) -> tuple[str, list[Region]]:
    """The answer without its `<bbox>`, and their boxes."""
    count = text.count("<bbox>")
    text = LOOKED_AT.sub("", text)
    if "<bbox>" in text or (count and not text.strip()):
        raise ValueError(
            "an answer holds <bbox> as a part of its text, and a box of `objects.bbox` is looked at, not said: <bbox> may stand at "
            "the head of the answer or behind <ref-object>, and other words must be left."
        )
    return text, [next(waiting) for _ in range(count)]


def region_parts(path: Sequence[Region]) -> list[dict[str, Any]]:
    """No reflection, or one on all boxes."""
    if not path:
        return []
    boxes, numbers = zip(*path)
    if len(boxes) == 1:
        return [reflection_part(boxes[0], numbers[0])]
    return [path_part(boxes, numbers[0] if len(set(numbers)) == 1 else numbers)]


def as_text(value: Any, column: str) -> str:
    """The value; a `ValueError` names the column if it isn't a text."""
    if not isinstance(value, str):
        raise ValueError(f"`{column}` must be a text, got {value!r}.")
    return value


def _unit(unit: str | None, bbox_type: str | None, column: str) -> str:
    """What the numbers of boxes count, as the source or the row says it."""
    if not is_given(bbox_type):
        if unit is None:
            raise ValueError(
                f"`{column}` holds boxes, and the source doesn't say in what: set `boxes: pixels`, `thousandths` (0 to 1000) "
                "or `fractions` (0 to 1)."
            )
        return unit
    own = next((name for name, theirs in BOX_UNITS.items() if theirs is not None and theirs == bbox_type), None)
    if own is None:
        raise ValueError(f"`objects.bbox_type` must be 'real' or 'norm1', got {bbox_type!r}.")
    if unit not in (None, own):
        raise ValueError(f"`objects.bbox_type` is {bbox_type!r}, but the source has `boxes: {unit}`.")
    return own


def _fractions(box: list[float], unit: str, image: Any, column: str) -> list[float]:
    width, height = {"thousandths": (1000, 1000), "fractions": (1, 1)}.get(unit) or image_size(image)
    if len(box) != 4:
        raise ValueError(f"a box of `{column}` must be [x0, y0, x1, y1], got {box}.")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):  # also true for NaN
        raise ValueError(
            f"the box {box} of `{column}`, read as {unit}, must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, from 0 to "
            f"{width} across and to {height} down."
        )
    return [x0 / width, y0 / height, x1 / width, y1 / height]
