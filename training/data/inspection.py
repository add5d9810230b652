"""Whether a row is good, and how long it becomes, without a model and without reading its pictures' pixels."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any
from uuid import uuid4

from datasets import Dataset, Features, List, Value

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.parts_vreflection import ReflectionPartError, read_path, rendered_reflections
from vreflection_hub_card.rows import BadRow, check_past_reflections, row_images, row_messages, row_name

from .images import count_image_tokens, image_size, load_image
from .numbered_rows import UNDECODABLE, named, undecodable


@dataclass
class Inspection:
    """What a row holds; with a `problem` it is a bad one, and `tokens` is 0."""

    id: str | None
    dataset: str | None
    tokens: int = 0  # of its rendered conversation, pictures and reflections included
    images: int = 0
    missing: int = 0  # pictures of which there is no file
    path_lengths: list[int] = field(default_factory=list)  # boxes of each reflection; past turns aren't rendered
    problem: str | None = None
    kind: str | None = None  # of the problem
    no_reflection: str | None = None  # why its reader left the reflection out

    @property
    def reflections(self) -> int:
        """How many reflections are rendered."""
        return len(self.path_lengths)


ARROW = {int: Value("int64"), list[int]: List(Value("int64"))}
INSPECTION_FEATURES = Features({field.name: ARROW.get(field.type, Value("string")) for field in fields(Inspection)})


def read_messages(row: dict[str, Any], reflect: bool = True) -> list[dict[str, Any]]:
    """The messages of a row, with its pictures in their places; without `reflect`, its reflections are dropped.

    Raises:
        BadRow: Messages that aren't any, another number of pictures than places, or what the row's reader found wrong.
    """
    return [
        {**message, "content": [part for part in message["content"] if reflect or part["type"] != "reflection"]}
        for message in row_messages(row)
    ]


def pictures(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures of messages, in order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def check_messages(
    messages: list[dict[str, Any]], name: str, row: dict[str, Any], processor: VReflectionProcessor
) -> list[int]:
    """Checks what needs neither pixels nor tokens, and counts the boxes of each reflection that is rendered.

    Raises:
        BadRow: No assistant's turn; a reflection of a past turn; a box that isn't one, or of a picture that isn't there; a
            path that is empty, or longer than the processor's `num_latent_tokens` steps of a reflection; thoughts, and a
            processor whose backbone has none.
        ValueError: Reflections, and a processor without `num_latent_tokens`.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{name} has nothing to learn from: no assistant's turn.", "nothing to learn")
    check_past_reflections(messages, row)
    if processor.think_end_token_id is None and any("reasoning_content" in message for message in messages):
        raise BadRow(
            f"{name} has `reasoning_content`, and this model has not learned to think in words: leave it out, or start from "
            "a backbone that thinks.",
            "thoughts",
        )
    images = len(pictures(messages))
    try:
        return [
            len(read_path(part, images, processor.num_latent_tokens, number))
            for number, part in enumerate(rendered_reflections(messages))
        ]
    except ReflectionPartError as error:
        raise BadRow(f"{name}: {error}", error.kind) from error


def inspect_row(
    row: dict[str, Any],
    processor: VReflectionProcessor,
    *,
    reflect: bool = True,
    decode: bool = False,
    stop: bool = False,
    max_length: int | None = None,
) -> Inspection:
    """Looks at a row as [`VReflectionDataCollator`] would make it: with `decode`, at its pictures' pixels, too.

    Raises:
        BadRow: With `stop`, what is wrong with the row.
    """
    name = row_name(row)
    found = Inspection(None if row.get("id") is None else str(row["id"]), row.get("dataset"))
    found.no_reflection = row.get("no_reflection")
    try:
        messages = read_messages(row, reflect)
        image_tokens = _image_tokens(pictures(messages), found, processor.image_processor, decode, name)
        found.path_lengths = check_messages(messages, name, row, processor)
        try:
            text = processor.apply_chat_template(messages, tokenize=False)
        except ValueError as error:
            raise BadRow(f"{name}: {error}", "special token") from error
        places = text.count(processor.image_token)
        if places != found.images:
            raise BadRow(
                f"{name}: the rendered text holds {processor.image_token} {places} times, but there are "
                f"{found.images} images.",
                "images and places",
            )
        # A place is one token, which becomes as many as its picture has.
        tokens = len(processor.tokenizer(text)["input_ids"]) - places + image_tokens
        if max_length is not None and tokens > max_length:
            raise BadRow(
                f"{name} has {tokens} tokens, above `max_length` ({max_length}). Nothing is cut: raise the limit, shrink "
                "the pictures, or drop the sample.",
                "too long",
            )
        found.tokens = tokens
    except BadRow as error:
        if stop:
            raise
        found.problem, found.kind = str(error), error.kind
        if row.get("error") is not None:  # maybe its picture is missing
            try:
                _image_tokens(row_images(row), found, processor.image_processor, False, name)
            except BadRow:
                found.kind = "missing picture" if found.missing else found.kind
    return found


def _image_tokens(images: list[Any], found: Inspection, image_processor, decode: bool, name: str) -> int:
    """The tokens of all pictures; all are looked at, to count the missing ones, and then the first problem is raised."""
    tokens, problem = 0, None
    found.images = len(images)
    for image in images:
        try:
            tokens += count_image_tokens(*image_size(image), image_processor)
            if decode:
                load_image(image, image_processor)
        except FileNotFoundError as error:
            found.missing += 1
            problem = problem or BadRow(f"{name}: {error}", "missing picture")
        except ValueError as error:
            problem = problem or BadRow(f"{name}: {error}", "picture")
    if problem is not None:
        raise problem
    return tokens


def inspect_rows(
    dataset: Dataset | list[dict[str, Any]], processor: VReflectionProcessor, *, num_proc: int | None = None, **options
) -> Dataset:
    """The [`Inspection`] of each row as a data set's row, with a progress bar; the options are [`inspect_row`]'s."""
    if isinstance(dataset, list):  # of which Arrow would have to encode the pictures
        found = [_inspection(row, number, processor, **options) for number, row in enumerate(dataset)]
        return Dataset.from_list(found, features=INSPECTION_FEATURES)
    inspected = dataset.map(
        partial(_inspection, processor=processor, **options),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=INSPECTION_FEATURES,
        num_proc=num_proc,
        desc="Reading pictures" if options.get("decode") else "Measuring rows",
        # Never from the cache, by a fingerprint that is always new: pictures come and go without the rows changing.
        keep_in_memory=True,
        new_fingerprint=uuid4().hex,
    )
    return inspected.with_format(None)


def _inspection(row: dict[str, Any], number: int, processor: VReflectionProcessor, **options) -> dict[str, Any]:
    try:
        row = {**row}
    except UNDECODABLE as error:
        row = undecodable(row, error)
    return vars(inspect_row(named(row, number), processor, **options))
