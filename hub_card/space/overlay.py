"""Attention maps over their picture, a frame for each latent step, in the looks of `vreflection ask`'s heatmaps."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from ..inference.drawing import COLOUR_MAP, new_figure, show


# Of a frame's longer side, in pixels: small pictures are enlarged to it, large ones shrunk.
SIDE = 720
DPI = 72


@dataclass(frozen=True)
class Frame:
    """One latent step, drawn when it is looked at: drawn frames of many visitors would fill the memory.

    All frames of an answer share their picture, and the share of attention that has the brightest colour.
    """

    picture: Image.Image  # RGB, as large as the frame
    attention: np.ndarray  # (h, w)
    name: str
    most: float

    @property
    def image(self) -> Image.Image:
        """The map over the picture, coloured from zero to `most`."""
        # A tenth of a pixel more, since the canvas is cut down to whole ones.
        figure = new_figure(tuple((side + 0.1) / DPI for side in self.picture.size), DPI)
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        show(axes, self.picture, (), torch.from_numpy(self.attention), self.most)
        axes.set_aspect("auto")
        figure.canvas.draw()
        return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def draw_frames(picture: Image.Image, maps: list[np.ndarray]) -> list[Frame]:
    """Makes the frames of an answer, one for each step, from a map (S, h, w) for each reflection."""
    scale = SIDE / max(picture.size)
    picture = picture.resize(tuple(max(round(side * scale), 1) for side in picture.size), Image.Resampling.LANCZOS)
    most = max((float(steps.max()) for steps in maps), default=0.0)
    frames = []
    for number, steps in enumerate(maps, 1):
        which = f"Reflection {number}, step" if len(maps) > 1 else "Step"
        for index, attention in enumerate(steps, 1):
            frames.append(Frame(picture, attention, f"{which} {index} of {len(steps)}", most))
    return frames


def colour_stops() -> list[str]:
    """The map's colours from none to the most, as hexadecimal names."""
    return [to_hex(colormaps[COLOUR_MAP](place)) for place in np.linspace(0, 1, 9)]
