"""Pictures of a row: opened at the resolution that the model sees, and measured from their headers alone."""

import math
from pathlib import Path
from typing import Any

import requests
from PIL import Image
from qwen_vl_utils.vision_process import SPATIAL_MERGE_SIZE, fetch_image, smart_resize
from transformers import Qwen2VLImageProcessor

from modeling_vreflection.processing_vreflection import open_picture, picture_size


DOWNLOAD_TIMEOUT = 60  # seconds without a byte

RowImage = str | Path | dict[str, Any] | Image.Image


def load_image(image: RowImage, image_processor: Qwen2VLImageProcessor) -> Image.Image:
    """Opens a row's picture and resizes it with `qwen_vl_utils`, within the image processor's pixel limits.

    It comes as RGB, both sides a multiple of a merged patch, so that the image processor needn't resize it again: pass
    `do_resize=False`. A string that begins with `http://` or `https://` is downloaded.

    Raises:
        PictureError: A picture that can't be opened; `PictureNotFoundError`, a `FileNotFoundError`, if there is no file.
        ValueError: A picture that is too narrow.
        OSError: A picture that can't be downloaded.
    """
    if is_url(image):
        response = requests.get(image, timeout=DOWNLOAD_TIMEOUT)
        response.raise_for_status()
        picture = open_picture(response.content, image)
    else:
        picture = open_picture(image)
    count_image_tokens(*picture.size, image_processor)  # what can't be counted can't be trained on
    return fetch_image(
        {"image": picture, **pixel_limits(image_processor)},
        image_patch_size=image_processor.patch_size * image_processor.merge_size // SPATIAL_MERGE_SIZE,
    )


def image_size(image: RowImage) -> tuple[int, int]:
    """Width and height of a row's picture as `load_image` sees it, before it is resized; only the header is read.

    Raises:
        PictureError: As for `load_image`.
        ValueError: A URL, which only a download can measure.
    """
    if is_url(image):
        raise ValueError(f"{image}: a picture on the web can't be measured; download it, and give its path.")
    return picture_size(image)


def count_image_tokens(width: int, height: int, image_processor: Qwen2VLImageProcessor) -> int:
    """How many image tokens a picture of this size gets, resized by `load_image`.

    Raises:
        ValueError: A picture that is too narrow.
    """
    side = image_processor.patch_size * image_processor.merge_size
    try:
        resized = smart_resize(height, width, side, **pixel_limits(image_processor))
        if min(resized) < side:
            raise ValueError(f"not one patch of {side} pixels would be left of its shorter side")
    except ValueError as error:
        raise ValueError(f"A picture of {width} x {height} pixels is too narrow: {error}.") from error
    return math.prod(resized) // side**2


def pixel_limits(image_processor: Qwen2VLImageProcessor) -> dict[str, int]:
    """The image processor's limits, as `qwen_vl_utils` names them."""
    size = image_processor.size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def is_url(image: RowImage) -> bool:
    """Whether a row's picture is a web address."""
    return isinstance(image, str) and image.startswith(("http://", "https://"))
