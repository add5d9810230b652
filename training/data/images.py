"""Pictures of a row: opened at the resolution that the model sees, and measured from their headers alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from qwen_vl_utils.vision_process import SPATIAL_MERGE_SIZE, fetch_image, smart_resize
from transformers import Qwen2VLImageProcessor

from vreflection_hub_card.pictures import DAMAGE, to_rgb


# The values of EXIF's orientation that lay a picture on its side.
ON_ITS_SIDE = (5, 6, 7, 8)

RowImage = str | Path | dict[str, Any] | Image.Image


def load_image(image: RowImage, image_processor: Qwen2VLImageProcessor) -> Image.Image:
    """Opens a row's picture and resizes it with `qwen_vl_utils`, within the image processor's pixel limits.

    EXIF's rotation is applied, as transformers and datasets do, and forgotten, so that nobody applies it again.
    Transparency is laid on white.

    Args:
        image (`str`, `Path`, `dict` or `Image.Image`): A path, a `datasets` image (`{"path": ..., "bytes": ...}`), or a
            picture. A string that begins with `http://` or `https://` is downloaded.
        image_processor (`Qwen2VLImageProcessor`): Its `size` holds the limits: `shortest_edge` is the smallest, and
            `longest_edge` the largest number of pixels.

    Returns:
        `Image.Image`: The picture, RGB, both sides a multiple of a merged patch.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A picture that can't be read, or is too narrow.
    """
    if is_url(image):
        picture = image
    else:
        with _open(image) as file:
            # Now, as in `image_size`: a tag that comes after the pixels counts in neither.
            _orientation(file)
            file.load()
            picture = to_rgb(ImageOps.exif_transpose(file))
        count_image_tokens(*picture.size, image_processor)  # what can't be counted can't be trained on
    loaded = fetch_image(
        {"image": picture, **pixel_limits(image_processor)},
        image_patch_size=image_processor.patch_size * image_processor.merge_size // SPATIAL_MERGE_SIZE,
    )
    loaded.info.clear()
    return loaded


def image_size(image: RowImage) -> tuple[int, int]:
    """Width and height of a row's picture as `load_image` sees it, before it is resized; only the header is read.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that isn't a picture; a URL, which only a download can measure.
    """
    if is_url(image):
        raise ValueError(f"{image}: a picture on the web can't be measured; download it, and give its path.")
    with _open(image) as file:
        width, height = file.size
        return (height, width) if _orientation(file) in ON_ITS_SIDE else (width, height)


def count_image_tokens(width: int, height: int, image_processor: Qwen2VLImageProcessor) -> int:
    """How many image tokens a picture of this size gets, resized by `load_image` and then by the image processor.

    Raises:
        ValueError: A picture that is too narrow.
    """
    side = image_processor.patch_size * image_processor.merge_size
    try:
        resized = smart_resize(height, width, side, **pixel_limits(image_processor))
        if min(resized) == 0:
            raise ValueError(f"not one patch of {side} pixels would be left of its shorter side")
        return image_processor.get_number_of_image_patches(*resized) // image_processor.merge_size**2
    except ValueError as error:
        raise ValueError(f"A picture of {width} x {height} pixels is too narrow: {error}.") from error


def pixel_limits(image_processor: Qwen2VLImageProcessor) -> dict[str, int]:
    """The image processor's limits, as `qwen_vl_utils` names them."""
    size = image_processor.size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def is_url(image: RowImage) -> bool:
    """Whether a row's picture is a web address."""
    return isinstance(image, str) and image.startswith(("http://", "https://"))


@contextmanager
def _open(image: RowImage) -> Iterator[Image.Image]:
    """Opens a picture without reading its pixels; what goes wrong, also later in the block, names the file."""
    if isinstance(image, Image.Image):
        yield image
        return
    if isinstance(image, dict):
        name = image.get("path") or "The picture in the row"
        source = BytesIO(image["bytes"]) if image.get("bytes") is not None else image.get("path")
    else:
        name = source = image
    if source is None or not isinstance(source, (str, Path, BytesIO)):
        raise ValueError(f"A picture must be a path, a dict with `path` or `bytes`, or a PIL image, got {image!r}.")
    try:
        with Image.open(source) as file:
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture, or of a kind that Pillow can't read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: too many pixels; scale it down first.") from error
    except DAMAGE as error:
        raise ValueError(f"{name}: damaged or unreadable ({error}).") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none."""
    # The method of the base class: the one for PNG decodes the whole file to look for a tag behind the pixels.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
