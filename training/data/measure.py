"""How long a row becomes, and whether it is a good one, without a model and without reading its pictures' pixels."""

from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from datasets import Dataset, Features, Value

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.processing_vreflection import rendered_reflections
from modeling_vreflection.regions_vreflection import quantise_box
from vreflection_hub_card.rows import BadRow, check_past_reflections, row_images, row_messages, row_name

from .images import count_image_tokens, image_size, load_image


__all__ = ["BadRow", "Inspection", "RowMeasure", "inspect_row", "inspect_rows", "measure_row", "measure_rows"]


INSPECTION_FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "dataset")},
        **{name: Value("int64") for name in ("tokens", "images", "missing", "reflections")},
        **{name: Value("string") for name in ("problem", "kind")},
    }
)


@dataclass(frozen=True)
class RowMeasure:
    """What a row becomes.

    Args:
        tokens (`int`): Length of its rendered conversation, pictures and reflections included.
        images (`int`): Its pictures.
        reflections (`int`): Its reflections; those of past turns aren't rendered and don't count.
    """

    tokens: int
    images: int
    reflections: int


@dataclass
class Inspection:
    """All that a look at a row finds; with a `problem`, it is a bad one, and `tokens` is 0.

    Args:
        tokens (`int`): Length in tokens.
        images (`int`): Its pictures.
        missing (`int`): Pictures of which there is no file.
        reflections (`int`): Its rendered reflections.
        problem (`str`, *optional*): What is wrong with it.
        kind (`str`, *optional*): What kind of problem that is.
    """

    tokens: int = 0
    images: int = 0
    missing: int = 0
    reflections: int = 0
    problem: str | None = None
    kind: str | None = None


def measure_row(row: dict[str, Any], processor: VReflectionProcessor, reflect: bool = True) -> RowMeasure:
    """Counts the tokens that [`VReflectionDataCollator`] makes of a row; of a picture only the header is read.

    Args:
        row (`dict`): The row.
        processor (`VReflectionProcessor`): The processor.
        reflect (`bool`, *optional*, defaults to `True`): Whether reflections are kept; plain fine-tuning drops them.

    Raises:
        BadRow: A picture that is missing, can't be read or is too narrow; a box that is none, or of a picture that the row
            doesn't have; another number of pictures than places; no assistant's turn.
    """
    found = inspect_row(row, processor, reflect)
    if found.problem is not None:
        raise BadRow(found.problem, found.kind)
    return RowMeasure(found.tokens, found.images, found.reflections)


def measure_rows(
    dataset: Dataset,
    processor: VReflectionProcessor,
    *,
    reflect: bool = True,
    on_bad_row: str = "error",
    num_proc: int | None = None,
) -> tuple[list[int], list[int], list[str]]:
    """Measures all rows of a data set.

    Args:
        dataset (`Dataset`): The rows.
        processor (`VReflectionProcessor`): The processor.
        reflect (`bool`, *optional*, defaults to `True`): Whether reflections are kept.
        on_bad_row (`str`, *optional*, defaults to `"error"`): `"error"` raises at a bad row, `"skip"` leaves it out.
        num_proc (`int`, *optional*): Processes to measure with.

    Returns:
        `tuple[list[int], list[int], list[str]]`: The numbers of the good rows, their lengths in tokens, and what is
        wrong with each of the bad ones.

    Raises:
        BadRow: With `on_bad_row="error"`, what is wrong with the first bad row.
    """
    found = inspect_rows(dataset, processor, reflect=reflect, stop=on_bad_row == "error", num_proc=num_proc)
    problems, tokens = found["problem"][:], found["tokens"][:]
    good = [number for number, problem in enumerate(problems) if problem is None]
    return good, [tokens[number] for number in good], [problem for problem in problems if problem is not None]


def inspect_rows(
    dataset: Dataset,
    processor: VReflectionProcessor,
    *,
    reflect: bool = True,
    decode: bool = False,
    stop: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Looks at all rows of a data set, with a progress bar.

    Args:
        dataset (`Dataset`): The rows.
        processor (`VReflectionProcessor`): The processor.
        reflect (`bool`, *optional*, defaults to `True`): Whether reflections are kept.
        decode (`bool`, *optional*, defaults to `False`): Whether to read the pictures, not only their headers.
        stop (`bool`, *optional*, defaults to `False`): Whether to raise at the first bad row.
        num_proc (`int`, *optional*): Processes.

    Returns:
        `Dataset`: For each row its `id`, its `dataset`, and the fields of an [`Inspection`].

    Raises:
        BadRow: With `stop`, what is wrong with the first bad row.
    """
    looked_at = dataset.map(
        partial(_inspect, processor=processor, reflect=reflect, decode=decode, stop=stop),
        remove_columns=dataset.column_names,
        features=INSPECTION_FEATURES,
        num_proc=num_proc,
        desc="Reading pictures" if decode else "Measuring rows",
        # Never from the cache, by a fingerprint that is always new: pictures come and go without the rows changing.
        keep_in_memory=True,
        new_fingerprint=uuid4().hex,
    )
    return looked_at.with_format(None)


def inspect_row(
    row: dict[str, Any], processor: VReflectionProcessor, reflect: bool = True, decode: bool = False
) -> Inspection:
    """Looks at a row, see `measure_row`; with `decode`, it reads the pictures as training does."""
    found = Inspection()
    try:
        messages = row_messages(row)
        _look(row, messages, found, processor, reflect, decode)
    except BadRow as error:
        found.problem, found.kind = str(error), error.kind
        if row.get("error") is not None:  # maybe for want of its picture
            found.images = len(row_images(row))
            _image_tokens(row_images(row), found, processor.image_processor, decode=False)
            found.kind = "missing picture" if found.missing else found.kind
    return found


def describe(row: dict[str, Any], found: Inspection) -> dict[str, Any]:
    """What was found, and about which row."""
    row_id = None if row.get("id") is None else str(row["id"])
    return {"id": row_id, "dataset": row.get("dataset"), **vars(found)}


def _inspect(row: dict[str, Any], processor, reflect: bool, decode: bool, stop: bool) -> dict[str, Any]:
    found = inspect_row(row, processor, reflect, decode)
    if stop and found.problem is not None:
        raise BadRow(found.problem, found.kind)
    return describe(row, found)


def _look(row, messages, found: Inspection, processor, reflect: bool, decode: bool):
    """Fills in what the row holds, and raises at what is wrong with it."""
    name = row_name(row)
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    found.images = len(images)
    image_tokens, problem = _image_tokens(images, found, processor.image_processor, decode)
    if problem is not None:
        raise BadRow(f"{name}: {problem[0]}", problem[1])

    if not reflect:
        messages = [
            {**message, "content": [part for part in message["content"] if part["type"] != "reflection"]}
            for message in messages
        ]
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{name} has nothing to learn from: no assistant's turn.", "nothing to learn")
    check_past_reflections(messages, row)
    reflections = rendered_reflections(messages)
    found.reflections = len(reflections)
    for number, part in enumerate(reflections):
        try:
            quantise_box(part.get("box"), f"Box {number}")
        except ValueError as error:
            raise BadRow(f"{name}: {error}", "box") from error
        index = part.get("image_index") or 0
        if not isinstance(index, int) or not 0 <= index < len(images):
            raise BadRow(
                f"{name}: Box {number} has `image_index` {index!r}, but the sample has {len(images)} images.",
                "image_index",
            )
    text = processor.apply_chat_template(messages, tokenize=False)
    places = text.count(processor.image_token)
    if places != len(images):
        raise BadRow(
            f"{name}: the rendered text holds {processor.image_token} {places} times, but there are {len(images)} images.",
            "images and places",
        )
    # A place is one token, which becomes as many as its picture has.
    found.tokens = len(processor.tokenizer(text)["input_ids"]) - len(images) + sum(image_tokens)


def _image_tokens(
    images: list[Any], found: Inspection, image_processor, decode: bool
) -> tuple[list[int], tuple[str, str] | None]:
    """The tokens of each picture, and the first problem with one; all are looked at, to count the missing ones."""
    tokens, problem = [], None
    for image in images:
        try:
            tokens.append(count_image_tokens(*image_size(image), image_processor))
            if decode:
                load_image(image, image_processor)
        except FileNotFoundError as error:
            found.missing += 1
            problem = problem or (str(error), "missing picture")
        except ValueError as error:
            problem = problem or (str(error), "picture")
    return tokens, problem
