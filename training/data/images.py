"""Pictures of a row: opened, and measured from their headers alone."""

import os
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Qwen2VLImageProcessor

from modeling_vreflection.pictures_vreflection import open_picture, picture_size


RowImage = str | Path | dict[str, Any] | Image.Image


def load_image(image: RowImage, image_processor: Qwen2VLImageProcessor) -> Image.Image:
    """Opens a row's picture, as RGB; the image processor resizes it, in training as in decoding.

    Raises:
        PictureError: A picture that can't be opened; `PictureNotFoundError`, a `FileNotFoundError`, if there is no file.
        ValueError: A picture that is too narrow.
    """
    picture = open_picture(image)
    count_image_tokens(*picture.size, image_processor)  # what can't be counted can't be trained on
    return picture


def image_size(image: RowImage) -> tuple[int, int]:
    """Width and height of a row's picture as `load_image` opens it; only the header is read.

    Raises:
        PictureError: As for `load_image`.
    """
    return picture_size(image)


def count_image_tokens(width: int, height: int, image_processor: Qwen2VLImageProcessor) -> int:
    """How many image tokens a picture of this size gets, resized by the image processor.

    Raises:
        ValueError: A picture that is too narrow.
    """
    try:
        patches = image_processor.get_number_of_image_patches(height, width)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"A picture of {width} x {height} pixels is too narrow: {error}.") from error
    return patches // image_processor.merge_size**2


def is_url(image: RowImage) -> bool:
    """Whether a row's picture is a data URL or a web address, not a path."""
    return isinstance(image, str) and image.startswith(("http://", "https://", "data:"))


def place_image(image: RowImage, folder: str | None) -> RowImage:
    """The picture with its path, if that is relative, in the folder."""
    if folder is not None and isinstance(image, str) and not is_url(image):
        return os.path.join(folder, image)
    if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
        return {**image, "path": place_image(image["path"], folder)}
    return image
