"""Looks drawn on a picture: a numbered outline for each place, and a line from one look to the next.

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from .look_boxes import Box, LookBox


# White on black is seen on bright and dark pictures, and on every colour of a map.
INK, EDGE = "white", "black"


def look_map(looks: Sequence[Sequence[LookBox]], maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest share (h, w) that any look has on each patch of a picture; a look's share is its steps' mean.

    Both are a list over the reflections of an answer: the looks, and a map (S, h, w) over the picture.
    """
    shares = [
        attention[[step - 1 for step in look.steps]].mean(0) for seen, attention in zip(looks, maps) for look in seen
    ]
    return torch.stack(shares).amax(0)


def draw_looks(
    axes: Axes, picture: Image.Image, image_index: int, looks: Sequence[Sequence[LookBox]], size: float = 9
) -> None:
    """Draws the looks that lie in one picture over what the axes show.

    Args:
        axes (`Axes`): Shows the picture, in pixels.
        picture (`Image.Image`): The picture.
        image_index (`int`): Its place in the conversation, counted from 0.
        looks (`Sequence[Sequence[LookBox]]`): Those of each reflection. Their numbers run through all; a line joins each
            with the next one of its reflection in the same picture.
        size (`float`, *optional*, defaults to 9): Of the numbers, in points.
    """
    width, height = picture.size
    places: list[tuple[Box, list[int]]] = []  # the outline, and the numbers of the looks that share it
    number = 0
    for reflection in looks:
        before = None
        for look in reflection:
            number += 1
            if look.image_index != image_index:
                before = None
                continue
            place = next((place for place in places if _at_one_place(place[0], look.box)), None)
            if place is None:
                places.append(place := (look.box, []))
            place[1].append(number)
            if before is not None and before is not place:
                _join(axes, [_centre(box, width, height) for box, _ in (before, place)], size)
            before = place
    taken: list[tuple[float, float]] = []
    for box, numbers in places:
        x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        outline = Rectangle(
            (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=INK, linewidth=size / 5, zorder=3, clip_on=False
        )
        outline.set_path_effects([withStroke(linewidth=size / 5 + 2, foreground=EDGE)])
        axes.add_patch(outline)
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        x, y = max(corners, key=lambda corner: min(_distance(corner, taken, width, height), 0.06))
        taken.append((x, y))
        label = {"boxstyle": "round,pad=0.2", "facecolor": INK, "edgecolor": EDGE, "linewidth": 1}
        left, top = x == x0, y == y0
        inset = 0.4 * size  # the label lies within its box, and so within the picture
        axes.annotate(
            ", ".join(map(str, numbers)),
            (x, y),
            (inset if left else -inset, -inset if top else inset),
            textcoords="offset points",
            fontsize=size,
            fontweight="bold",
            color=EDGE,
            ha="left" if left else "right",
            va="top" if top else "bottom",
            bbox=label,
            zorder=5,
        )


def _join(axes: Axes, ends: list[tuple[float, float]], size: float) -> None:
    """An arrow between two points, curved, so that there and back are two lines."""
    arrow = FancyArrowPatch(*ends, arrowstyle="-|>", connectionstyle="arc3,rad=0.15", mutation_scale=1.3 * size)
    arrow.set(color=INK, linewidth=size / 6, zorder=4)
    arrow.set_path_effects([withStroke(linewidth=size / 6 + 2, foreground=EDGE)])
    axes.add_patch(arrow)


def _centre(box: Box, width: int, height: int) -> tuple[float, float]:
    return (box[0] + box[2]) / 2 * width, (box[1] + box[3]) / 2 * height


def _at_one_place(one: Box, other: Box) -> bool:
    """Whether each box holds the centre of the other: their outlines could hardly be told apart."""
    return all(
        outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]
        for outer, (x, y) in ((one, _centre(other, 1, 1)), (other, _centre(one, 1, 1)))
    )


def _distance(point: tuple[float, float], others: list[tuple[float, float]], width: int, height: int) -> float:
    """The distance to the nearest of other points, as a share of the picture's sides; 1 if there are none."""
    return min((max(abs(point[0] - x) / width, abs(point[1] - y) / height) for x, y in others), default=1.0)
