"""From messages with pictures and boxes to model inputs."""

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
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedConfig
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import AddedToken

from .parts_vreflection import read_path, rendered_reflections


LATENT_TOKENS = ("<|sovt|>", "<|lvr|>", "<|eovt|>")

# Qwen2.5-VL's conversation format. A reflection is rendered in the turn that follows the last question and dropped from
# earlier ones: what was seen there is gone. `{% generation %}` marks what the assistant says, for the loss. Text is joined
# before it is escaped, for a token's name may be spread over parts.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
    {{- text __ESCAPES__ -}}
{%- endmacro -%}
{%- if tools -%}
    {{- raise_exception("This model has not learned to call tools: leave `tools` out.") -}}
{%- endif -%}
{%- if documents -%}
    {{- raise_exception("The chat template has no place for `documents`: put their text into a message.") -}}
{%- endif -%}
{%- set last = namespace(question=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set last.question = last.question + 1 -%}
{%- endfor -%}
{%- set turn = namespace(question=-1) -%}
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set turn.question = turn.question + 1 -%}
    {%- elif message.role not in ('system', 'assistant') -%}
        {{- raise_exception("A message's role is 'system', 'user' or 'assistant', not '" + message.role + "'.") -}}
    {%- endif -%}
    {%- if message.tool_calls -%}
        {{- raise_exception("This model has not learned to call tools: a message can't hold `tool_calls`.") -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {%- if message.content is string -%}
                {{- plain(message.content) -}}
            {%- else -%}
                {%- set run = namespace(text='') -%}
                {%- for part in message.content -%}
                    {%- if part.type == 'reflection' -%}
                        {%- if turn.question == last.question -%}
                            {{- plain(run.text) + '__SEGMENT__' -}}
                            {%- set run.text = '' -%}
                        {%- endif -%}
                    {%- elif part.type == 'text' -%}
                        {%- set run.text = run.text + part.text -%}
                    {%- else -%}
                        {{- raise_exception("An assistant's content part is 'text' or 'reflection', not '" + part.type + "'.") -}}
                    {%- endif -%}
                {%- endfor -%}
                {{- plain(run.text) -}}
            {%- endif -%}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- elif message.content is string -%}
        {{- plain(message.content) + '<|im_end|>' -}}
    {%- else -%}
        {%- set run = namespace(text='') -%}
        {%- for part in message.content -%}
            {%- if part.type in ('image', 'image_url') -%}
                {%- if part.min_pixels or part.max_pixels or part.resized_height or part.resized_width -%}
                    {{- raise_exception("A picture can't be sized by its content part: set the image processor's `size`.") -}}
                {%- endif -%}
                {%- set run.text = run.text + '<|vision_start|><|image_pad|><|vision_end|>' -%}
            {%- elif part.type == 'text' -%}
                {%- set run.text = run.text + part.text -%}
            {%- else -%}
                {{- raise_exception("A content part of a user is 'text' or 'image', not '" + part.type + "'.") -}}
            {%- endif -%}
        {%- endfor -%}
        {{- plain(run.text) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# Of `from_pretrained`, where a file of the Hub is and how to get it.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# U+2060, invisible: put into a token's name where text holds it, so that it isn't the token.
WORD_JOINER = "\u2060"

# The image processor refuses longer strips.
MAX_ASPECT_RATIO = 200
# Tags of a TIFF.
BITS, PHOTOMETRIC = 258, 262
# What Pillow's decoders raise for files that are damaged or end too early.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, RuntimeError, LookupError, struct.error)


def build_chat_template(latent_tokens: tuple[str, str, str] = LATENT_TOKENS, num_latent_tokens: int = 8) -> str:
    """The Jinja template for these token names and this number of slots.

    Text can't write a latent token: a word joiner, which is invisible, breaks its name up.
    """
    start, slot, end = latent_tokens
    escapes = "".join(f" | replace('{name}', '{name[:2]}{WORD_JOINER}{name[2:]}')" for name in latent_tokens)
    segment = start + slot * num_latent_tokens + end
    return CHAT_TEMPLATE.replace("__ESCAPES__", escapes).replace("__SEGMENT__", segment)


class ReflectionProcessorMixin:
    r"""
    A backbone's image processor and tokenizer, with reflections in the chat template and boxes besides the text. No videos;
    comes before the backbone's class.

    Messages may hold, in the assistant's answer to the last question, a part
    `{"type": "reflection", "box": [x0, y0, x1, y1], "image_index": 0}`: corners as fractions of the image's sides, origin
    at the top left, and which of the conversation's images they lie in (the first, if left out). A path has `boxes` instead
    of `box`, 1 to S of them in the order of looking, and one `image_index` for all or a list with one for each.

    Args:
        image_processor (`Qwen2VLImageProcessor`): The image processor.
        tokenizer (`Qwen2Tokenizer`): The tokenizer, with the three latent tokens.
        chat_template (`str`, *optional*): A Jinja template, see `build_chat_template`.
        latent_start_token (`str`, *optional*, defaults to `"<|sovt|>"`): Name of the token that opens a segment.
        num_latent_tokens (`int`, *optional*): S, the latent steps of a reflection, as the chat template renders them and
            the model's config says. Only boxes need it.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        latent_start_token=LATENT_TOKENS[0],
        num_latent_tokens: int | None = None,
        **kwargs,
    ):
        self.latent_start_token = latent_start_token
        self.num_latent_tokens = num_latent_tokens
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # Past the backbone's own constructor: its video processor alone would need torchvision.
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_backbone(
        cls,
        pretrained_model_name_or_path,
        latent_tokens: tuple[str, str, str] = LATENT_TOKENS,
        num_latent_tokens: int = 8,
        **kwargs,
    ) -> "ReflectionProcessorMixin":
        """Makes a processor from a stock folder or Hub id; see the model's `from_backbone`."""
        # Prompts are padded on the left; given here, the side is saved with the tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, padding_side="left", **kwargs)
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in latent_tokens], True)
        return cls(
            AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            tokenizer,
            build_chat_template(latent_tokens, num_latent_tokens),
            latent_tokens[0],
            num_latent_tokens,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "ReflectionProcessorMixin":
        """`ProcessorMixin.from_pretrained`; a folder whose processor doesn't say S takes it from its config.json."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.num_latent_tokens is None:
            options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            try:
                config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **options)
            except OSError:  # a repository of the Hub without a model
                config = {}
            processor.num_latent_tokens = config.get("num_latent_tokens")
        return processor

    def __call__(self, images=None, text=None, boxes: Sequence | None = None, videos=None, audio=None, **kwargs):
        """Prepares text and images, as the backbone's processor does, and boxes.

        Args:
            images: One image or (nested) lists of them: whatever `open_picture` opens.
            text (`str` or `list[str]`): Rendered conversations.
            boxes (`list`, *optional*): For a text, or for each of several, a list with one item a reflection segment:
                `[x0, y0, x1, y1]` in [0, 1], or a message's reflection part, whose `image_index` counts within the text.

        Returns:
            `BatchFeature`: The usual keys, and with boxes `boxes` (G, S, 5), `int64`, a line for each latent step: the
            corners of its box in 1/65,536 of the image's sides, rounded inwards so that a box that ends on a patch's edge
            stays there, then the image's index within the batch. Of K boxes step k has the k-th, and all after it the last.

        Raises:
            ValueError: A picture that can't be opened, by name; a box that is no box, naming sample and box; a part with
                unknown keys, with both or neither of `box` and `boxes`, or with more than S boxes; another number of boxes
                than segments; boxes and no `num_latent_tokens`; videos, audio, and arguments that neither the tokenizer nor
                the image processor has.
        """
        refuse_other_media(videos=videos, audio=audio)
        if unknown := [name for name in kwargs if name not in self._known_arguments]:
            raise ValueError(
                f"Neither the tokenizer nor the image processor has an argument `{unknown[0]}`, so that it would be ignored."
            )
        of_steps = None
        if boxes is not None:
            texts, boxes = ([text], [boxes]) if isinstance(text, str) else (text, boxes)
            of_steps = self._boxes_of_steps(texts, boxes)
        inputs = super().__call__(images=open_pictures(images), text=text, **kwargs)
        if of_steps is not None:
            inputs["boxes"] = torch.tensor(of_steps, dtype=torch.long).reshape(-1, self.num_latent_tokens, 5)
        return inputs

    def apply_chat_template(self, conversation, *args, processor_kwargs: dict | None = None, **kwargs):
        """`ProcessorMixin.apply_chat_template`, which also hands the boxes of the rendered reflections on."""
        processor_kwargs = dict(processor_kwargs or {})
        refuse_other_media(**kwargs)
        refuse_other_media(**processor_kwargs)
        single = isinstance(conversation[0], dict)
        for messages in [conversation] if single else conversation:
            self._refuse_special_tokens(messages)
        boxes = [rendered_reflections(messages) for messages in ([conversation] if single else conversation)]
        if kwargs.get("tokenize") and any(boxes):
            processor_kwargs["boxes"] = boxes[0] if single else boxes
        return super().apply_chat_template(conversation, *args, processor_kwargs=processor_kwargs, **kwargs)

    def _refuse_special_tokens(self, messages: list[dict]):
        """Raises a `ValueError` where a message's text holds a special token's name, which the tokenizer would interpret."""
        # The template itself breaks the latent tokens' names up.
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = [name for name in tokens if f"replace('{name}'" not in str(self.chat_template)]
        for number, message in enumerate(messages):
            text = message.get("content") or ""
            if not isinstance(text, str):  # a name may be spread over parts
                text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
            for name in tokens:
                if name in text:
                    raise ValueError(
                        f"Message {number} ({message.get('role')}) holds {name} at character {text.index(name)} of its text, "
                        "which is a special token and can't be written: take it out, or break it up."
                    )

    @property
    def _known_arguments(self) -> set[str]:
        """What the tokenizer and the image processor take, and `ProcessorMixin` itself."""
        of_images = getattr(self.image_processor.valid_kwargs, "__annotations__", {})
        own = set(ProcessingKwargs.__annotations__) - {"videos_kwargs", "audio_kwargs"} | {"common_kwargs"}
        return own | {*TextKwargs.__annotations__, *ImagesKwargs.__annotations__, *of_images}

    def _boxes_of_steps(self, texts: list[str], boxes: Sequence) -> list[list[list[int]]]:
        """For each reflection S lines x0, y0, x1, y1, image; see `__call__`."""
        if len(boxes) != len(texts):
            raise ValueError(f"`boxes` must hold a list for each of the {len(texts)} texts, got {len(boxes)}.")
        reflections, first_image = [], 0
        for sample, (text, sample_boxes) in enumerate(zip(texts, boxes)):
            images, segments = text.count(self.image_token), text.count(self.latent_start_token)
            if len(sample_boxes) != segments:
                raise ValueError(f"Sample {sample} has {segments} reflection segments, but {len(sample_boxes)} boxes.")
            for number, item in enumerate(sample_boxes):
                part = item if isinstance(item, dict) else {"box": item}
                path = read_path(part, images, self.num_latent_tokens, number, f" of sample {sample}")
                path += path[-1:] * (self.num_latent_tokens - len(path))
                reflections.append([[*corners, first_image + image] for *corners, image in path])
            first_image += images
        return reflections


def refuse_other_media(videos=None, audio=None, **kwargs):
    """Raises a `ValueError` where videos or audio are given."""
    for name, value in (("videos", videos), ("audio", audio)):
        if value is not None:
            raise ValueError(f"V-Reflection looks at pictures: pass `images`, not `{name}`.")


class VReflectionProcessor(ReflectionProcessorMixin, Qwen2_5_VLProcessor):
    """The processor of V-Reflection on Qwen2.5-VL; see [`ReflectionProcessorMixin`]."""


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
    except IsADirectoryError as error:
        raise PictureError(f"{name}: is a folder, not a picture") from error
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


VReflectionProcessor.register_for_auto_class("AutoProcessor")
