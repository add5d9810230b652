"""Reader of the authors' released training data: conversations with `<image>` and `<lvr>` in them, and its meta file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vreflection_hub_card.rows import flatten_boxes, make_bad_row, make_row, reflection_part, text_part

from .image_folders import ImageFolders
from .json_files import read_json_rows


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# As the authors' loader takes them: the line breaks around a picture go with it, those around a reflection are text.
PLACEHOLDERS = {"user": re.compile(r"\n?<image>\n?"), "assistant": re.compile(r"<lvr>")}


def released_rows(path: str | Path, folders: ImageFolders) -> Iterator[dict[str, Any]]:
    """Reads the authors' formatted JSON as rows of the project's format.

    ```python
    {"dataset": "flickr30k", "image": ["viscot/flickr30k/2618322793.jpg"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat does the child wear?\\nProvide a short and direct response."},
                       {"from": "gpt", "value": "<lvr>\\n<answer> Blue shorts. </answer>"}],
     "bboxes": [[0.382, 0.456, 0.718, 0.656]]}
    ```

    Each `<image>` takes the next picture, and each `<lvr>` the next box, which lies in the first picture. A line break
    before or behind `<image>` goes; all else of the text stays as it is, `<answer>` too. `image` may be a string or a list,
    `bboxes` one box, a list, or nested more deeply.

    Args:
        path (`str` or `Path`): A JSON list, or JSON Lines.
        folders (`ImageFolders`): Where the pictures are.

    Yields:
        `dict`: A row; its id is the file's name and the number of the row. What can't be understood, other numbers of
        placeholders than of pictures or boxes among it, is a row with `error`.
    """
    name = Path(path).stem
    for number, item in enumerate(read_json_rows(path)):
        row_id, dataset = f"{name}-{number}", name
        try:
            if isinstance(item, ValueError):
                raise item
            if isinstance(item.get("dataset"), str):
                dataset = item["dataset"]
            images = [folders.find(image, item.get("dataset")) for image in _images(item)]
            messages = _messages(item, len(images))
        except (ValueError, TypeError) as error:
            yield make_bad_row(row_id, dataset, error)
            continue
        yield make_row(row_id, dataset, images, messages)


def read_meta(path: str | Path) -> list[dict[str, str]]:
    """The entries of a meta file, with `ds_name`, `data_path` and `image_folder`; paths are relative to the file.

    Args:
        path (`str` or `Path`): A JSON list of entries, or a JSON object of them by `ds_name`.

    Raises:
        ValueError: An entry without `data_path` or `image_folder`; a file that holds something else.
    """
    path = Path(path)
    entries = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(entries, dict):
        entries = [{"ds_name": name, **entry} if isinstance(entry, dict) else entry for name, entry in entries.items()]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a meta file must be a list of entries, or an object of them, and not empty.")
    resolved = []
    for number, entry in enumerate(entries):
        for key in ("data_path", "image_folder"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{path}: entry {entry.get('ds_name', number)!r} has no `{key}`.")
        paths = {key: str(path.parent / entry[key]) for key in ("data_path", "image_folder")}
        resolved.append({"ds_name": str(entry.get("ds_name", number)), **paths})
    return resolved


def _images(item: dict[str, Any]) -> list[str]:
    images = item.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`image` must be a path or a list of paths, got {images!r}.")
    return images


def _messages(item: dict[str, Any], images: int) -> list[dict[str, Any]]:
    turns = item.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`conversations` must be a list of turns, got {turns!r}.")
    boxes = flatten_boxes(item["bboxes"]) if item.get("bboxes") else []
    waiting = iter(boxes)
    counts = {"user": 0, "assistant": 0}
    messages = []
    for turn in turns:
        role, value = ROLES.get(turn.get("from")), turn.get("value")
        if role is None or not isinstance(value, str):
            raise ValueError(f"a turn must have `from` ({', '.join(ROLES)}) and `value`, got {turn!r}.")
        if role == "system":
            messages.append({"role": role, "content": [text_part(value)]})
            continue
        texts = PLACEHOLDERS[role].split(value)
        counts[role] += len(texts) - 1
        content = [text_part(texts[0])] if texts[0] else []
        for text in texts[1:]:
            content.append({"type": "image"} if role == "user" else reflection_part(next(waiting, ())))
            content += [text_part(text)] if text else []
        messages.append({"role": role, "content": content})
    for what, found, given in (("<image>", counts["user"], images), ("<lvr>", counts["assistant"], len(boxes))):
        if found != given:
            key = {"<image>": "images in `image`", "<lvr>": "boxes in `bboxes`"}[what]
            raise ValueError(f"the conversation holds {what} {found} times, but there are {given} {key}.")
    return messages
