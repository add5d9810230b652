"""Uploaded pictures: what is refused, and in which words."""

import os
from stat import S_ISREG

from PIL import Image

from modeling_vreflection.pictures_vreflection import PictureError, open_picture

from ..errors import InputError


MAX_BYTES = 20 * 2**20
# A small file can hold a picture that fills the memory.
MAX_PIXELS = 40_000_000
# Pillow reads many more, some of them by starting other programs.
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Windows lacks the first two, and has the last: without it, line ends would be translated.
FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
# Said of every file that isn't the visitor's, whether it exists or not.
NO_PICTURE = "Pick a picture first: an example, or upload one here. Uploads are kept for an hour at most."


def open_upload(path: str, name: str) -> Image.Image:
    """Opens an uploaded picture; `name` is what its owner calls it, and `path` is never shown to anybody.

    Raises an `InputError` for no regular file, no picture, a damaged one, or one that is too large.
    """
    try:  # neither follows a link nor waits for a pipe's other end
        if not S_ISREG(os.lstat(path).st_mode):  # Windows has no flags for it
            raise InputError(NO_PICTURE)
        descriptor = os.open(path, FLAGS)
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
        try:
            return open_picture(file, name, PICTURE_FORMATS, MAX_PIXELS)
        except PictureError as error:
            raise InputError(str(error)) from error
