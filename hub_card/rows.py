"""The format of a row, the same for every source, and what makes a row bad."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
from datasets import Features, Image, List, Value
from trl.data_utils import prepare_multimodal_messages

from modeling_vreflection.parts_vreflection import rendered_reflections


# One schema for all sources, so that they can be mixed. Pictures stay paths or encoded bytes until they are loaded. `error` says
# what is wrong with a row that its reader couldn't make sense of, `no_reflection` why it left the reflection of a good row out.
FEATURES = Features(
    {
        "id": Value("string"),
        "dataset": Value("string"),
        "images": List(Image(decode=False)),
        "messages": List(
            {
                "role": Value("string"),
                "content": List(
                    {
                        "type": Value("string"),
                        "text": Value("string"),
                        "box": List(Value("float64")),
                        "boxes": List(List(Value("float64"))),
                        "image_index": Value("int64"),
                        # An `image_index` that is a list, for a column has one type.
                        "image_indices": List(Value("int64")),
                    }
                ),
            }
        ),
        "error": Value("string"),
        "no_reflection": Value("string"),
    }
)


# What a content part may be, by the role of its message.
PARTS = {
    "system": ("text", "image"),
    "user": ("text", "image"),
    "assistant": ("text", "reflection"),
}
# What a part may hold besides its type.
PART_KEYS = {
    "text": ("text",),
    "image": ("image",),
    "reflection": ("box", "boxes", "image_index"),
}


class BadRow(ValueError):
    """A row that can't be trained on; the message names it and says what is wrong, `kind` is a report's heading for it."""

    def __init__(self, message: str, kind: str = "other"):
        super().__init__(message)
        self.kind = kind


def row_name(row: dict[str, Any]) -> str:
    """What messages call a row."""
    return f"Sample {row['id']}" if row.get("id") is not None else "A sample without `id`"


def row_images(row: dict[str, Any]) -> list[Any]:
    """The pictures of a row that its messages hold places for."""
    if row.get("images"):
        if not _is_list(row["images"]):
            raise BadRow(
                f"{row_name(row)}: `images` must be a list, got {row['images']!r}; a single picture is an `image`."
            )
        return list(row["images"])
    return [row["image"]] if row.get("image") is not None else []


def row_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row with its pictures, as given, in their places, and without the keys that Arrow fills with None.

    A row may hold `question`, `answer`, and `image` or `images` instead of messages: one turn, without a reflection.

    Raises a `BadRow` for messages that aren't any, parts with unknown keys, too many or few pictures, or what the row's reader
    found wrong.
    """
    if row.get("error") is not None:
        raise BadRow(f"{row_name(row)}: {row['error']}", "format")
    row = spell_out(row)
    messages = row.get("messages")
    if not _is_list(messages) or len(messages) == 0:
        raise BadRow(f"{row_name(row)} has no `messages`, nor `question` and `answer`.", "messages")
    cleaned = [_clean_message(message, row_name(row)) for message in messages]
    try:
        return prepare_multimodal_messages(cleaned, images=row_images(row))
    except ValueError as error:
        raise BadRow(f"{row_name(row)}: {error}", "images and places") from error


def spell_out(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `messages`; those of a row that has none are made of its `question`, `answer` and pictures."""
    if row.get("messages") is not None or row.get("question") is None:
        return row
    question, answer = row["question"], row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str):
            raise BadRow(f"{row_name(row)}: `{name}` must be a text, got {text!r}.", "messages")
    places = [{"type": "image"} for _ in row_images(row)]
    messages = [
        {"role": "user", "content": [*places, text_part(question)]},
        {"role": "assistant", "content": [text_part(answer)]},
    ]
    return {**row, "messages": messages}


def check_past_reflections(messages: list[dict[str, Any]], row: dict[str, Any]):
    """Raises where a reflection stands before the last question: the chat template would drop it, and train on the answer."""
    given = sum(part["type"] == "reflection" for message in messages for part in message["content"])
    if lost := given - len(rendered_reflections(messages)):
        raise BadRow(
            f"{row_name(row)}: {lost} of its reflections belong to turns before the last question, where what was seen is "
            "forgotten: make a row of each turn.",
            "past reflection",
        )


def make_row(row_id: str, dataset: str, images: Sequence[Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A good row."""
    return _row(row_id, dataset, images, messages, None)


def make_bad_row(row_id: str, dataset: str, error: str | Exception, images: Sequence[Any] = ()) -> dict[str, Any]:
    """A row that a reader found wrong: it travels on, to be counted, named or refused where the run wants it."""
    return _row(row_id, dataset, images, [], str(error))


def _row(row_id: str, dataset: str, images: Sequence[Any], messages: list[dict[str, Any]], error: str | None) -> dict:
    row = {"id": row_id, "dataset": dataset, "images": list(images), "messages": messages}
    return row | {"error": error, "no_reflection": None}


def text_part(text: str) -> dict[str, Any]:
    """A content part with text."""
    return {"type": "text", "text": text}


def reflection_part(box: Sequence[float], image_index: int = 0) -> dict[str, Any]:
    """A content part that is a reflection on a box."""
    return {"type": "reflection", "box": list(box), "image_index": image_index}


def path_part(boxes: Sequence[Sequence[float]], image_index: int | Sequence[int] = 0) -> dict[str, Any]:
    """A content part that is a reflection on several boxes, in the order of looking; an image for all, or one for each."""
    image_index = image_index if isinstance(image_index, int) else list(image_index)
    return {"type": "reflection", "boxes": [list(box) for box in boxes], "image_index": image_index}


def normalise_row(row: dict[str, Any], row_id: str, dataset: str) -> dict[str, Any]:
    """Brings a row in the project's format, pictures inline or as placeholders, text as string or parts, to `FEATURES`.

    `row_id` and `dataset` name the row where it doesn't itself.
    """
    row_id = row_id if row.get("id") is None else str(row["id"])
    dataset = row["dataset"] if isinstance(row.get("dataset"), str) else dataset
    try:
        messages = row_messages({**row, "id": row_id})
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        for image in images:
            if not isinstance(image, (str, dict, PIL.Image.Image)):
                raise BadRow(
                    f"a picture must be a path, a dict with `path` or `bytes`, or a PIL image, got {image!r}."
                )
        messages = [
            {"role": message["role"], "content": [_plain_part(part) for part in message["content"]]}
            for message in messages
        ]
    except BadRow as error:
        return make_bad_row(row_id, dataset, str(error).removeprefix(f"Sample {row_id}").removeprefix(":").strip())
    return make_row(row_id, dataset, images, messages)


def flatten_boxes(boxes: Any) -> list[list[float]]:
    """Boxes in a flat list: one box, a list of them, or lists of lists of them; a `ValueError` for anything else."""
    if not _is_list(boxes):
        raise ValueError(f"boxes must be a list of [x0, y0, x1, y1], got {boxes!r}.")
    if len(boxes) == 4 and all(isinstance(corner, (int, float)) for corner in boxes):
        return [[float(corner) for corner in boxes]]
    if not all(_is_list(item) for item in boxes):
        raise ValueError(f"a box must be [x0, y0, x1, y1], got {boxes!r}.")
    return [box for item in boxes for box in flatten_boxes(item)]


def _plain_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part with nothing in it that `FEATURES` can't hold."""
    box, boxes, image_index = (part.get(key) for key in ("box", "boxes", "image_index"))
    if box is not None and not _are_numbers(box):
        raise BadRow(f"`box` must be [x0, y0, x1, y1], got {box!r}.")
    if boxes is not None and not (_is_list(boxes) and all(map(_are_numbers, boxes))):
        raise BadRow(f"`boxes` must be a list of [x0, y0, x1, y1], got {boxes!r}.")
    indices = image_index if _is_list(image_index) else [image_index]
    if image_index is not None and not all(isinstance(index, int) for index in indices):
        raise BadRow(f"`image_index` must be a number, or of `boxes` a list of them, got {image_index!r}.")
    part = {key: part[key] for key in ("type", "text", "box", "boxes", "image_index") if key in part}
    if _is_list(image_index):
        part["image_indices"] = part.pop("image_index")
    return part


def _clean_message(message: Any, name: str) -> dict[str, Any]:
    """A message without the keys that Arrow fills with None; `name` is the row's, for errors."""
    content = message.get("content") if isinstance(message, dict) else None
    if content is None or message.get("role") not in PARTS:
        roles = ", ".join(PARTS)
        raise BadRow(f"{name}: a message needs `content` and a `role` of {roles}, got {message!r}.", "messages")
    role = message["role"]
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not _is_list(content) or not all(isinstance(part, dict) and part.get("type") for part in content):
        raise BadRow(f"{name}: `content` must be text or parts with a `type`, got {content!r}.", "messages")
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    for part in parts:
        if "image_indices" in part and "image_index" not in part:  # as `FEATURES` stores it
            part["image_index"] = part.pop("image_indices")
        if part["type"] not in PARTS[role]:
            kinds = " or ".join(map(repr, PARTS[role]))
            raise BadRow(f"{name}: a content part of role {role!r} is {kinds}, not {part['type']!r}.", "messages")
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise BadRow(f"{name}: a part of type 'text' needs `text`, got {part!r}.", "messages")
        if unknown := [key for key in part if key not in ("type", *PART_KEYS[part["type"]])]:
            keys = ", ".join(PART_KEYS[part["type"]])
            shown = {key: value for key, value in part.items() if key != "image"}
            raise BadRow(
                f"{name}: a part of type {part['type']!r} holds {keys} besides its type, not {unknown[0]!r}: {shown!r}.",
                "unknown key",
            )
    return {"role": role, "content": parts}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_numbers(value: Any) -> bool:
    return _is_list(value) and all(isinstance(number, (int, float)) for number in value)
