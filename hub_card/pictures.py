"""Reading any picture file into the plain RGB that the model's processor wants."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError


# Qwen2.5-VL's image processor refuses longer strips.
MAX_ASPECT_RATIO = 200
# What Pillow's decoders raise for files that are damaged or end too early.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, struct.error)


def load_picture(
    source: str | Path | BinaryIO, name: str | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """Reads a picture, of an animation the first frame.

    Its EXIF rotation is applied, transparency is laid on white, and greyscale, palette, 16-bit and CMYK pictures become
    RGB.

    Args:
        source (`str`, `Path` or `BinaryIO`): Its path, or the file, open for reading.
        name (`str`, *optional*): What messages call it, the path by default.
        formats (`Sequence[str]`, *optional*): Pillow's names of the formats that are read, all by default.

    Raises:
        InputError: A missing, unreadable, damaged or overlong picture; a file that is none.
    """
    name = name or source
    try:
        with Image.open(source, formats=formats) as file:
            file.load()
            picture = to_rgb(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a folder, not a picture") from error
    except PermissionError as error:
        raise InputError(f"{name}: may not be read") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture, or of a kind that Pillow can't read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: too many pixels; scale it down first") from error
    except DAMAGE as error:
        raise InputError(f"{name}: damaged or incomplete ({error})") from error
    if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
        raise InputError(
            f"{name}: {picture.width} x {picture.height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other"
        )
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts a picture of any mode to RGB."""
    if picture.mode.startswith("I;16"):
        return _grey(np.asarray(picture, dtype=np.float64) / 65_535)
    if picture.mode in ("I", "F"):  # no fixed range: from the darkest value to the brightest
        values = np.asarray(picture, dtype=np.float64)
        low, high = values.min(), values.max()
        return _grey((values - low) / max(high - low, 1e-12))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """An RGB picture from grey values in [0, 1]."""
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
