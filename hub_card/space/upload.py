"""Pictures from strangers: what is refused, and in which words."""

from pathlib import Path

from PIL import Image

from ..errors import InputError
from ..pictures import DAMAGE, load_picture


MAX_BYTES = 20 * 2**20
# A small file can hold a picture that fills the memory.
MAX_MEGAPIXELS = 40


def open_upload(path: Path, name: str) -> Image.Image:
    """Opens an uploaded picture.

    Args:
        path (`Path`): Where it lies; never shown to anybody.
        name (`str`): What its owner calls it.

    Raises:
        InputError: No picture, a damaged one, or one that is too large.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{name} has {size / 2**20:.0f} MB; this page takes up to {MAX_BYTES / 2**20:.0f}.")
    try:
        check_pixels(path, name)
        return load_picture(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from error


def check_pixels(path: Path, name: str) -> None:
    """Reads the size from the file's head, before any pixel is decoded."""
    try:
        with Image.open(path) as file:
            width, height = file.size
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels; this page takes up to {MAX_MEGAPIXELS} megapixels.") from error
    except DAMAGE:  # `load_picture` says what is wrong
        return
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise InputError(
            f"{name} has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; this page takes up to "
            f"{MAX_MEGAPIXELS}. Scale it down first."
        )
