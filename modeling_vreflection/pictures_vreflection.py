"""The one opener of pictures: whatever a picture comes as, plain RGB pixels, or an error that names it."""

import base64
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


# The image processor refuses longer strips.
MAX_ASPECT_RATIO = 200
# Tags of a TIFF.
BITS, PHOTOMETRIC = 258, 262
# What Pillow's decoders raise for files that are damaged or end too early.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, RuntimeError, LookupError, struct.error)


class PictureError(ValueError):
    """A picture that can't be opened; the message names it and says what is wrong."""


class PictureNotFoundError(PictureError, FileNotFoundError):
    """There is no such file."""


def open_picture(
    source: Any, name: str | None = None, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Opens a picture as plain RGB, of an animation the first frame.

    EXIF's rotation is applied, transparency is laid on white, and 16 bits are scaled to 8. Mode `I` is read as 8 bits where its
    values lie in 0 to 255, as 16 bits where they lie in 0 to 65,535; other values of it, and mode `F`, have no fixed range and
    are stretched from their darkest to their brightest.

    Args:
        source (`str`, `Path`, `bytes`, `BinaryIO`, `dict`, `Image.Image`, `np.ndarray` or `torch.Tensor`): A path, a data URL,
            base64, a file's content, an open file, a picture of the `datasets` library (`{"path": ..., "bytes": ...}`), a PIL
            image, of an animation the frame where it stands, or an array (H, W), (H, W, C) or (C, H, W), `uint8` if it has
            colours. Web addresses aren't fetched.
        name (`str`, *optional*): What errors call it; without it the path, if there is one.
        formats (`Sequence[str]`, *optional*): Pillow's names of the formats to accept; all by default.
        max_pixels (`int`, *optional*): Refuses larger pictures before any pixel is decoded.

    Returns:
        `Image.Image`: A new picture of mode `RGB`, without metadata.

    Raises:
        PictureError: A web address; a folder, a file that may not be read, is no picture, is damaged or holds values that
            aren't finite; an array that is no picture; no pixels or too many; one side more than 200 times the other. A missing
            file is a `PictureNotFoundError`.
    """
    with read_header(source, name, formats) as (file, name):
        size, millions = f"{file.width} x {file.height} pixels", file.width * file.height / 1e6
        if max_pixels is not None and millions > max_pixels / 1e6:
            raise PictureError(
                f"{name}: {size}, {millions:g} megapixels; at most {max_pixels / 1e6:g} are taken, so scale it down first"
            )
        if max(file.size) > MAX_ASPECT_RATIO * min(file.size) or max(file.size) == 0:
            raise PictureError(f"{name}: {size}; one side may be at most {MAX_ASPECT_RATIO} times the other")
        if file.width * file.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError  # as Pillow does for files
        tags = getattr(file, "tag_v2", {})
        if file.mode.startswith("I;16") and (tags.get(BITS) == (12,) or tags.get(PHOTOMETRIC) == 0):
            raise PictureError(
                f"{name}: a TIFF of 12 bits, or whose white is zero, comes out dark or inverted; save it as PNG"
            )
        file.load()
        picture = convert_to_rgb(ImageOps.exif_transpose(file), name)
    picture.info.clear()  # nobody may rotate it again
    return picture


def picture_size(source: Any) -> tuple[int, int]:
    """Width and height of what `open_picture` gives; only the header is read. Raises the same errors."""
    with read_header(source) as (file, _):
        # Pillow's size of a TIFF is the rotated one.
        sideways = file.format != "TIFF" and picture_orientation(file) in (5, 6, 7, 8)
        return (file.height, file.width) if sideways else file.size


def picture_orientation(file: Image.Image) -> int:
    """EXIF's orientation, 1 where there is none."""
    if file.format == "PNG" and getattr(file, "fp", None) is not None:
        # Its pixels aren't read yet, and Pillow would read them to find a tag behind them.
        place, header = file.fp.tell(), Image.new("1", (1, 1))
        header.info.update(file.info)
        file.fp.seek(8)
        while "exif" not in header.info and len(head := file.fp.read(8)) == 8:
            size = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                header.info["exif"] = file.fp.read(size)
            file.fp.seek(size + 4, os.SEEK_CUR)
        file.fp.seek(place)
        file = header
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def open_pictures(images: Any) -> Any:
    """Opens what a processor is given: a picture, a batch as one array, or (nested) lists."""
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return [open_pictures(image) for image in images]
    return None if images is None else open_picture(images)


@contextmanager
def read_header(
    source: Any, name: str | None = None, formats: Sequence[str] | None = None
) -> Iterator[tuple[Image.Image, str]]:
    """Opens a picture without reading its pixels, and names it; errors in the block become `PictureError`s."""
    if isinstance(source, dict):
        path, content = source.get("path"), source.get("bytes")
        name, source = name or path, path if content is None else content
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        raise PictureError(f"{source}: pictures aren't fetched from the web; download it, and give its path")
    if isinstance(source, str) and not os.path.exists(source):
        name, source = decode_base64(source, name)
    elif isinstance(source, (str, Path)) and os.path.exists(source) and not os.path.isfile(source):
        kind = "a folder" if os.path.isdir(source) else "a pipe or a device"  # which might never end
        raise PictureError(f"{name or source}: is {kind}, not a picture")
    elif hasattr(source, "__array__"):
        source = picture_of_array(source, name or "the array")
    name = name or (source if isinstance(source, (str, Path)) else getattr(source, "filename", None)) or "the picture"
    if not isinstance(source, (str, Path, bytes, Image.Image)) and not hasattr(source, "read"):
        raise PictureError(f"{name}: a picture is a path, its content, a dict with `path` or `bytes`, or a PIL image")
    try:
        if isinstance(source, Image.Image):
            yield source, name
        else:
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as file:
                yield file, name
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureNotFoundError(f"{name}: no such file") from error
    except PermissionError as error:
        raise PictureError(f"{name}: may not be read") from error
    except UnidentifiedImageError as error:
        raise PictureError(f"{name}: not a picture, or of a kind that Pillow can't read") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name}: too many pixels; scale it down first") from error
    except DAMAGE as error:
        raise PictureError(f"{name}: damaged or unreadable ({error})") from error


def decode_base64(text: str, name: str | None = None) -> tuple[str | None, str | bytes]:
    """The name and the bytes of a data URL, or of base64 alone, as transformers takes it; a path stays as it is."""
    try:
        if text.startswith("data:"):
            return name or "the picture in the data URL", base64.b64decode(text.partition(",")[2])
        return name or f"{text[:60]} (no such file, read as base64)", base64.b64decode(text, validate=True)
    except ValueError as error:
        if text.startswith("data:"):
            raise PictureError(f"{name or text[:60]}: not base64 ({error})") from error
        return name, text


def picture_of_array(array: Any, name: str) -> Image.Image:
    """An array as a PIL image, channels first or last."""
    values = torch.as_tensor(array).cpu()
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.permute(1, 2, 0)
    try:
        return Image.fromarray((values[..., 0] if values.shape[2:] == (1,) else values).numpy())
    except (TypeError, ValueError) as error:
        kind = f"{tuple(values.shape)} of {values.dtype}"
        raise PictureError(f"{name}: {kind} is no picture; give uint8 values from 0 to 255") from error


def convert_to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Converts a picture of any mode; see `open_picture`."""
    if picture.mode.startswith("I;16"):
        return stretch(picture.convert("I"), name, (0, 65_535))
    if picture.mode in ("I", "F"):
        return stretch(picture, name)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def stretch(picture: Image.Image, name: str, values_range: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture from one of mode `I` or `F`: black at the range's first value, white at its last."""
    dtype = torch.float32 if picture.mode == "F" else torch.int32
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=dtype).double()
    if not values.isfinite().all():
        raise PictureError(f"{name}: holds values that aren't finite (NaN or infinity)")
    low, high = values_range or (values.min(), values.max())
    if picture.mode == "I" and low >= 0 and high <= 65_535:
        low, high = 0, 255 if high <= 255 else 65_535
    grey = ((values - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
    grey[values == picture.info.get("transparency", math.nan)] = 255
    return Image.frombytes("L", picture.size, grey.numpy().tobytes()).convert("RGB")
