"""The format of a row, the same for every source, and what makes a row bad."""

import re
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
                # An assistant's thoughts in words, of a backbone that thinks before it answers.
                "reasoning_content": Value("string"),
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


# Columns that ask for another training than this one, and why a row with a value in them can't be trained on.
_MEDIA = "V-Reflection looks at pictures alone: leave such rows out"
_TOOLS = "V-Reflection has not learned to call tools: leave such rows out"
_PREFERENCE = (
    "this training learns one answer, which is the assistant's turn: leave the column out if that is what you want"
)
REFUSED_COLUMNS = {
    **dict.fromkeys(("video", "videos", "audio", "audios"), _MEDIA),
    "tools": _TOOLS,
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"), _PREFERENCE),
}
# Columns that other trainers' forms have, and the formats of a source that read them.
FOREIGN_COLUMNS = {
    "conversations": ("llava", "llama_factory"),
    "instruction": ("llama_factory", "ms_swift"),
    "query": ("ms_swift",),
    "system": ("llama_factory", "ms_swift"),
}
# What other trainers' texts have in the place of a picture, a box or a reflection.
PLACEHOLDER = re.compile("<(?:image|video|audio|bbox|ref-object|lvr)>")


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
    name = row_name(row)
    if row.get("error") is not None:
        raise BadRow(f"{name}: {row['error']}", "format")
    if problem := refused_column(row) or _foreign_column(row):
        raise BadRow(f"{name}: {problem}", "form")
    row = spell_out(row)
    messages = row.get("messages")
    if not _is_list(messages) or len(messages) == 0:
        given = ", ".join(column for column in row if is_given(row[column])) or "nothing"
        raise BadRow(f"{name}: no `messages`, nor `question` and `answer`; the row has {given}.", "messages")
    cleaned = [_clean_message(message, name) for message in messages]
    _check_texts(cleaned, bool(row_images(row)), name)
    _check_past_thoughts(cleaned, name)
    try:
        return prepare_multimodal_messages(cleaned, images=row_images(row))
    except ValueError as error:
        raise BadRow(f"{name}: {error}", "images and places") from error


def is_given(value: Any) -> bool:
    """Whether a column holds something: Arrow fills in None, and other trainers' rows empty lists and texts."""
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and len(value) == 0)


def refused_column(row: dict[str, Any]) -> str | None:
    """What is wrong with a row that has a column of another training than this one."""
    found = next((column for column in REFUSED_COLUMNS if is_given(row.get(column))), None)
    return f"`{found}`: {REFUSED_COLUMNS[found]}." if found else None


def _foreign_column(row: dict[str, Any]) -> str | None:
    # Beside messages the others are only columns that nothing reads; a system prompt would be lost.
    columns = ["system"] if is_given(row.get("messages")) else FOREIGN_COLUMNS
    found = next((column for column in columns if is_given(row.get(column))), None)
    if found:
        named = " or ".join(f"`format: {format}`" for format in FOREIGN_COLUMNS[found])
        return f"`{found}` belongs to the form of another trainer: set {named} in the source."
    if is_given(row.get("images")) and is_given(row.get("image")):
        return "there are both `images` and `image`: leave one of them out."
    return None


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
    row_id, dataset = row_names(row, row_id, dataset)
    try:
        messages = row_messages({**row, "id": row_id})
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        for image in images:
            if not isinstance(image, (str, dict, PIL.Image.Image)):
                raise BadRow(
                    f"a picture must be a path, a dict with `path` or `bytes`, or a PIL image, got {image!r}."
                )
        messages = [{**message, "content": [_plain_part(part) for part in message["content"]]} for message in messages]
    except BadRow as error:
        return make_bad_row(row_id, dataset, str(error).removeprefix(f"Sample {row_id}").removeprefix(":").strip())
    return make_row(row_id, dataset, images, messages)


def row_names(row: dict[str, Any], row_id: str, dataset: str) -> tuple[str, str]:
    """What a row says of its id and data set, or else these."""
    return (
        row_id if row.get("id") is None else str(row["id"]),
        row["dataset"] if isinstance(row.get("dataset"), str) else dataset,
    )


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
    thoughts = (
        {"reasoning_content": message["reasoning_content"]} if is_given(message.get("reasoning_content")) else {}
    )
    keys = ("role", "content", *(thoughts if role == "assistant" else ()))
    if unknown := [key for key in message if key not in keys and is_given(message[key])]:
        raise BadRow(
            f"{name}: a message holds role and content, an assistant's also `reasoning_content`, and nothing reads "
            f"{unknown[0]!r}: {message!r}.",
            "unknown key",
        )
    if thoughts and not isinstance(thoughts["reasoning_content"], str):
        raise BadRow(f"{name}: `reasoning_content` must be a text, got {thoughts['reasoning_content']!r}.", "messages")
    if isinstance(content, str):
        return {"role": role, **thoughts, "content": content}
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
    return {"role": role, **thoughts, "content": parts}


def _check_past_thoughts(messages: list[dict[str, Any]], name: str):
    """Raises where thoughts stand before the last question: the chat template would drop them, and train on the answer."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=0)
    if any("reasoning_content" in message for message in messages[:last]):
        raise BadRow(
            f"{name}: it has `reasoning_content` before the last question, where thoughts are forgotten: make a row of each "
            "turn.",
            "past thoughts",
        )


def _check_texts(messages: list[dict[str, Any]], pictures: bool, name: str):
    """Raises where text holds what another trainer, or a chat template, would make a picture of."""
    parts = [
        part
        for message in messages
        for part in ([text_part(message["content"])] if isinstance(message["content"], str) else message["content"])
    ]
    pictures = pictures or any(part["type"] == "image" for part in parts)
    thoughts = [message["reasoning_content"] for message in messages if "reasoning_content" in message]
    for text in (*thoughts, *(part["text"] for part in parts if part["type"] == "text")):
        if pictures and (found := PLACEHOLDER.search(text)):
            raise BadRow(
                f"{name}: {found[0]} stands in the text of a row with pictures, and would be read as text. Write "
                '`{"type": "image"}` parts for pictures, or name the form of the rows in the source: `format: llava`, '
                "`ms_swift` or `llama_factory`.",
                "placeholder",
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _are_numbers(value: Any) -> bool:
    return _is_list(value) and all(isinstance(number, (int, float)) for number in value)
