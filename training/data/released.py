"""Reader of the authors' released training data: conversations with `<image>` and `<lvr>` in them, and its meta file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vreflection_hub_card.rows import flatten_boxes, reflection_part, text_part

from .image_folders import ImageFolders
from .json_files import read_rows


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# As the authors' loader takes them: the line breaks around a picture go with it, those around a reflection are text.
PLACEHOLDERS = {"user": re.compile(r"\n?<image>\n?"), "assistant": re.compile(r"<lvr>")}


def released_rows(path: str | Path, folders: ImageFolders) -> Iterator[dict[str, Any]]:
    """Reads the authors' formatted JSON, a list or JSON Lines, as rows of the project's format.

    ```python
    {"dataset": "flickr30k", "image": ["viscot/flickr30k/2618322793.jpg"],
     "conversations": [{"from": "human", "value": "<image>\\nWhat does the child wear?\\nProvide a short and direct response."},
                       {"from": "gpt", "value": "<lvr>\\n<answer> Blue shorts. </answer>"}],
     "bboxes": [[0.382, 0.456, 0.718, 0.656]]}
    ```

    Each `<image>` takes the next picture, and each `<lvr>` the next box, which lies in the first picture. A line break
    before or behind `<image>` goes; all else of the text stays as it is, `<answer>` too. `image` may be a string or a list,
    `bboxes` one box, a list, or nested more deeply. Other numbers of placeholders than of pictures or boxes make a bad row.
    """

    def fill(row: dict[str, Any], item: dict[str, Any]):
        images = [folders.find(image, item.get("dataset")) for image in _images(item)]
        row.update(messages=_messages(item, len(images)), images=images)

    return read_rows(path, Path(path).stem, fill)


def read_meta(path: str | Path) -> list[dict[str, str]]:
    """The entries of the authors' meta file, a JSON list or an object of entries by `ds_name`; paths are relative to it.

    Raises:
        ValueError: An entry without `data_path` or `image_folder`; a file that holds something else.
    """
    path = Path(path)
    entries = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(entries, dict):
        entries = [{"ds_name": name, **entry} if isinstance(entry, dict) else entry for name, entry in entries.items()]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a meta file must be a list of entries, or an object of them, and not empty.")
    for number, entry in enumerate(entries):
        for key in ("data_path", "image_folder"):
            if not isinstance(entry.get(key), str):
                raise ValueError(f"{path}: entry {entry.get('ds_name', number)!r} has no `{key}`.")
    return [{key: str(path.parent / entry[key]) for key in ("data_path", "image_folder")} for entry in entries]


def _images(item: dict[str, Any]) -> list[str]:
    images = item.get("image")
    if images is None or isinstance(images, str):
        return [images] if images is not None else []
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"`image` must be a path or a list of paths, got {images!r}.")
    return images


def _messages(item: dict[str, Any], images: int) -> list[dict[str, Any]]:
    turns = item.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"`conversations` must be a list of turns, got {turns!r}.")
    boxes = flatten_boxes(item["bboxes"]) if item.get("bboxes") else []
    waiting = iter(boxes)
    counts = dict.fromkeys(ROLES.values(), 0)
    messages = []
    for turn in turns:
        role, value = ROLES.get(turn.get("from")), turn.get("value")
        if role is None or not isinstance(value, str):
            raise ValueError(f"a turn must have `from` ({', '.join(ROLES)}) and `value`, got {turn!r}.")
        before, *after = PLACEHOLDERS[role].split(value) if role in PLACEHOLDERS else [value]
        counts[role] += len(after)
        content = [text_part(before)]
        for text in after:
            content += [{"type": "image"} if role == "user" else reflection_part(next(waiting, ())), text_part(text)]
        messages.append({"role": role, "content": [part for part in content if part.get("text") != ""]})
    for placeholder, found, given, what in (
        ("<image>", counts["user"], images, "images in `image`"),
        ("<lvr>", counts["assistant"], len(boxes), "boxes in `bboxes`"),
    ):
        if found != given:
            raise ValueError(f"the conversation holds {placeholder} {found} times, but there are {given} {what}.")
    return messages
