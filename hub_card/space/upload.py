"""Uploaded pictures: what is refused, and in which words."""

import os
from stat import S_ISREG
from typing import BinaryIO

from PIL import Image

from ..errors import InputError
from ..pictures import DAMAGE, load_picture


MAX_BYTES = 20 * 2**20
# A small file can hold a picture that fills the memory.
MAX_MEGAPIXELS = 40
# Pillow reads many more, some of them by starting other programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Said of every file that isn't the visitor's, whether it exists or not.
NO_PICTURE = "Pick a picture first: an example, or upload one here. Uploads are kept for an hour at most."


def open_upload(path: str, name: str) -> Image.Image:
    """Opens an uploaded picture.

    Args:
        path (`str`): Where it lies; never shown to anybody.
        name (`str`): What its owner calls it.

    Raises:
        InputError: No regular file, no picture, a damaged one, or one that is too large.
    """
    try:  # neither follows a link nor waits for a pipe's other end
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(NO_PICTURE) from error
    with os.fdopen(descriptor, "rb") as file:
        stat = os.fstat(descriptor)
        if not S_ISREG(stat.st_mode):
            raise InputError(NO_PICTURE)
        if stat.st_size > MAX_BYTES:
            raise InputError(
                f"{name} has {stat.st_size / 2**20:.0f} MB; this page takes up to {MAX_BYTES / 2**20:.0f}."
            )
        check_pixels(file, name)
        return load_picture(file, name, FORMATS)


def check_pixels(file: BinaryIO, name: str) -> None:
    """Reads the size from the file's head, before any pixel is decoded."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels; this page takes up to {MAX_MEGAPIXELS} megapixels.") from error
    except DAMAGE:  # `load_picture` says what is wrong
        return
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise InputError(
            f"{name} has {width} x {height} pixels, {width * height / 1e6:.0f} megapixels; this page takes up to "
            f"{MAX_MEGAPIXELS}. Scale it down first."
        )
