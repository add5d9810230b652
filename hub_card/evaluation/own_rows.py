"""Rows of one's own as questions: the conversation up to the last answer, that answer as the reference, and the pictures."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Context, localcontext
from pathlib import Path
from typing import Any

import PIL.Image

from modeling_vreflection.pictures_vreflection import PictureError, open_picture, picture_size

from ..rows import BadRow, row_messages, row_name
from .matching import Match


@dataclass(frozen=True)
class OwnRow:
    """A row as it is asked."""

    id: str
    messages: list[dict[str, Any]]  # up to the last question, pictures in their places as given, without reflections
    reference: str

    @property
    def question(self) -> str:
        """The text of the last question."""
        return "".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")

    @property
    def images(self) -> list[Any]:
        """The conversation's pictures, as given."""
        return [part["image"] for message in self.messages for part in message["content"] if part["type"] == "image"]

    def conversation(self, images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """The messages with their pictures opened, or others in their places; a `BadRow` if one can't be."""
        given = iter(self.images if images is None else images)
        try:
            return [
                {
                    **message,
                    "content": [
                        {**part, "image": open_picture(next(given))} if part["type"] == "image" else part
                        for part in message["content"]
                    ],
                }
                for message in self.messages
            ]
        except PictureError as error:
            raise BadRow(f"Sample {self.id}: {error}", "picture") from error


def read_own_rows(rows: Iterable[dict[str, Any]], match: Match) -> list[OwnRow]:
    """Checks all rows before any is asked; of pictures the headers are read.

    Args:
        rows (`Iterable[dict]`): Rows in the project's format, or with `question`, `answer` and `image` or `images`. A row
            without `id` is called by its number, from 0 on.
        match (`Match`): A row's own answer must hold what it compares.

    Raises:
        BadRow: No rows; an id that stands for two of them; what is wrong with the first bad row, and how many more there are.
    """
    read, problems = [], []
    for number, row in enumerate(rows):
        row = {**row, "id": str(number) if row.get("id") is None else str(row["id"])}
        try:
            read.append(read_own_row(row, match))
        except BadRow as error:
            problems.append(error)
    if problems:
        more = f" ({len(problems)} of {len(read) + len(problems)} rows are bad)" if len(problems) > 1 else ""
        raise BadRow(f"{problems[0]}{more}", problems[0].kind)
    if not read:
        raise BadRow("There are no rows.")
    if twice := [name for name, count in Counter(row.id for row in read).items() if count > 1]:
        raise BadRow(
            f"{len(twice)} ids stand for several rows, {twice[0]!r} first: give each row its own, or leave `id` out."
        )
    return read


def read_own_row(row: dict[str, Any], match: Match) -> OwnRow:
    """Checks one row, which has an `id`; raises a `BadRow`."""
    name = row_name(row)
    *before, last = row_messages(row)
    if last["role"] != "assistant":
        raise BadRow(
            f"{name} ends with a turn of role {last['role']!r}: the last one must be the right answer.", "answer"
        )
    reference = "".join(part["text"] for part in last["content"] if part["type"] == "text").strip()
    if not reference:
        raise BadRow(f"{name} has an empty answer: there is nothing to compare with.", "answer")
    with localcontext(Context(traps=[])):  # as for an answer's numbers
        found = match.find(reference)
    if found is None:
        wanted = {"letter": "one letter A to E", "number": "one number in digits"}[match.rule]
        raise BadRow(f"{name}: to match by {match.rule!r} its answer must hold {wanted}, got {reference!r}.", "answer")
    if not before or before[-1]["role"] != "user":
        raise BadRow(f"{name} has no question before its last answer.", "messages")
    asked = [
        {**message, "content": [part for part in message["content"] if part["type"] != "reflection"]}
        for message in before
    ]
    found = OwnRow(row["id"], asked, reference)
    for image in found.images:
        try:
            picture_size(image)
        except PictureError as error:
            raise BadRow(f"{name}: {error}", "picture") from error
    return found


def fingerprint(rows: Iterable[OwnRow]) -> str:
    """A hash of what is asked, which a resumed run must share: ids, conversations, answers, and the pictures' names and sizes."""
    digest = hashlib.sha256()
    for row in rows:
        messages = [
            [message["role"], *({**part, "image": image_key(part["image"])} if "image" in part else part for part in message["content"])]
            for message in row.messages
        ]  # fmt: skip
        digest.update(json.dumps([row.id, messages, row.reference]).encode())
    return digest.hexdigest()


def image_key(image: Any) -> list:
    """What tells pictures apart, without reading files whole."""
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, PIL.Image.Image):
        image = image.tobytes()
    if isinstance(image, str) and image.startswith("data:"):
        image = image.encode()
    if isinstance(image, (str, Path)):
        path = Path(image)
        return [path.name, path.stat().st_size]
    if not isinstance(image, bytes):
        image = image.tobytes() if hasattr(image, "tobytes") else open_picture(image).tobytes()
    return [hashlib.sha256(image).hexdigest()]  # the content alone
