"""Whether a picture is like GlyphSearch's scenes, which are all that the embedded model knows."""

import numpy as np
from PIL import Image

from .scenes import BACKGROUND, CLUTTER, COLOURS, INK


NOTE = "Note: the picture is unlike GlyphSearch's scenes, and this model knows nothing else. Don't trust the answer."
SIDE = 84  # larger pictures are looked at in a grid of their pixels
# Colours may differ by this much in each channel, of 255: scenes may have been resized, or compressed as JPEG.
TOLERANCE = 16
COLOUR_TOLERANCE = 32
# Of the pixels at least: some 0.1 below what the scenes have, resized and compressed ones included.
BACKGROUND_SHARE, COLOURS_SHARE, MIXED_SHARE = 0.25, 0.05, 0.65


def unlike_note(picture: Image.Image) -> str | None:
    """What to say beside the embedded model's answer about a picture; `None` if it is like a scene."""
    return None if is_like_a_scene(picture) else NOTE


def is_like_a_scene(picture: Image.Image) -> bool:
    """Whether a picture has the colours of a scene: its background, its shapes, and little but mixtures of two that meet."""
    if max(picture.size) > SIDE:
        size = [max(side * SIDE // max(picture.size), 1) for side in picture.size]
        picture = picture.resize(size, Image.Resampling.NEAREST)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).reshape(-1, 3)
    ground, clutter, ink = (np.array(colour, dtype=np.float32) for colour in (BACKGROUND, CLUTTER, INK))
    colours = [np.array(colour, dtype=np.float32) for colour in COLOURS.values()]
    pairs = [(ground, clutter), *((ground, colour) for colour in colours), *((colour, ink) for colour in colours)]
    return bool(
        (_distance(pixels, ground, ground) <= TOLERANCE).mean() >= BACKGROUND_SHARE
        and (_nearest(pixels, [(colour, colour) for colour in colours]) <= COLOUR_TOLERANCE).mean() >= COLOURS_SHARE
        and (_nearest(pixels, pairs) <= TOLERANCE).mean() >= MIXED_SHARE
    )


def _nearest(pixels: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.min([_distance(pixels, *pair) for pair in pairs], axis=0)


def _distance(pixels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far pixels (N, 3) are, in their worst channel, from the mixtures of two colours: (N,)."""
    between = second - first
    share = np.clip((pixels - first) @ between / max(between @ between, 1), 0, 1)
    return np.abs(pixels - first - share[:, None] * between).max(1)
