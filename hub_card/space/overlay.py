"""Attention over its picture, as `vreflection ask` draws it: a frame with all looks, and one for each latent step."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image

from ..inference.drawing import VEIL, new_figure, own_colours, show
from ..inference.look_boxes import LookBox, merge_looks
from ..inference.look_drawing import draw_looks, look_map


# Of a frame's longer side, in pixels: small pictures are enlarged to it, large ones shrunk.
SIDE = 720
DPI = 72
# Of the looks' numbers, in points: readable where the frame is a phone's width.
LABEL = 22


@dataclass(frozen=True)
class Frame:
    """All looks or one latent step, drawn when it is looked at: drawn frames of many visitors would fill the memory.

    All frames of an answer share their picture, and the share of attention that is clear of the veil.
    """

    picture: Image.Image  # RGB, as large as the frame
    attention: np.ndarray  # (h, w)
    name: str
    most: float
    looks: tuple[tuple[LookBox, ...], ...] = ()  # of each reflection, drawn on the frame of all looks

    @property
    def image(self) -> Image.Image:
        """The map over the picture, from zero to `most`, with its looks."""
        # A tenth of a pixel more, since the canvas is cut down to whole ones.
        figure = new_figure(tuple((side + 0.1) / DPI for side in self.picture.size), DPI)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        show(axes, self.picture, (), torch.from_numpy(self.attention), self.most)
        draw_looks(axes, self.picture, 0, self.looks, LABEL)
        axes.set_aspect("auto")
        figure.canvas.draw()
        return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def draw_frames(picture: Image.Image, maps: list[np.ndarray]) -> list[Frame]:
    """Makes the frames of an answer from a map (S, h, w) for each reflection: all looks, then each step."""
    if not maps:
        return []
    scale = SIDE / max(picture.size)
    picture = picture.resize(tuple(max(round(side * scale), 1) for side in picture.size), Image.Resampling.LANCZOS)
    most = max(float(steps.max()) for steps in maps)
    tensors = [torch.from_numpy(steps) for steps in maps]
    looks = tuple(tuple(merge_looks([steps])) for steps in tensors)
    frames = [Frame(picture, look_map(looks, tensors).numpy(), "All looks", most, looks)]
    for number, steps in enumerate(maps, 1):
        which = f"Reflection {number}, step" if len(maps) > 1 else "Step"
        for index, attention in enumerate(steps, 1):
            frames.append(Frame(picture, attention, f"{which} {index} of {len(steps)}", most))
    return frames


def scale_background(picture: Image.Image) -> str:
    """CSS of the map's colours from no attention on the left to the most: the veil over stripes of the picture's own."""
    veil = ", ".join(to_hex(VEIL(place), keep_alpha=True) for place in (0.0, 1.0))
    colours = own_colours(picture)
    stripes = [
        f"{to_hex([part / 255 for part in colour])} {100 * number / len(colours):.0f}% {100 * (number + 1) / len(colours):.0f}%"
        for number, colour in enumerate(colours)
    ]
    return f"linear-gradient(90deg, {veil}), linear-gradient({', '.join(stripes)})"
