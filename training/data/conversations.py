"""Rows as LLaVA, ms-swift and LLaMA-Factory write them, with `<image>` in their texts, in the project's format."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from vreflection_hub_card.rows import (
    FEATURES,
    FOREIGN_COLUMNS,
    PLACEHOLDER,
    REFUSED_COLUMNS,
    is_given,
    make_bad_row,
    normalise_row,
    refused_column,
    row_names,
    text_part,
)

from .conversation_boxes import as_text, read_regions, region_parts, take_boxes
from .images import place_image
from .released import ROLES


@dataclass
class Form:
    """Where a trainer's rows have what; of `dialogues`, `images` and `boxes` a row uses one column each."""

    dialogues: tuple[str, ...]
    images: tuple[str, ...]
    boxes: tuple[str, ...]  # `objects` holds them with names and pictures, the others alone
    refused: tuple[str, ...] = ()

    @property
    def columns(self) -> set[str]:
        """All columns that are read."""
        prompts = {"instruction": ("input", "output", "history"), "query": ("response", "history")}
        further = [column for dialogue in self.dialogues for column in prompts.get(dialogue, ())]
        return {"id", "dataset", "system", *self.dialogues, *further, *self.images, *self.boxes, *self.refused}


FORMS = {
    "llava": Form(("conversations",), ("image", "images"), ("bbox", "bboxes")),
    "ms_swift": Form(
        ("messages", "conversations", "query", "instruction"), ("images", "image"), ("objects",), refused=("label",)
    ),
    "llama_factory": Form(("conversations", "messages", "instruction"), ("images", "image"), ("bbox", "bboxes")),
}


def unread_columns(columns: Collection[str], form: str) -> list[str]:
    """Those that nothing reads in rows of this form, `messages` included, and that aren't refused either."""
    further = {"system"} if "messages" in columns else {*FOREIGN_COLUMNS, "question", "answer"}
    read = FORMS[form].columns if form in FORMS else {*FEATURES, "image", *further}
    return [column for column in columns if column not in read | {*REFUSED_COLUMNS}]


def conversation_row(
    item: dict[str, Any], row_id: str, dataset: str, folder: str | None, form: str, boxes: str | None = None
) -> dict[str, Any]:
    """Brings a row of another trainer to the project's format; one that can't be brought becomes a bad row.

    Each `<image>` takes the next picture, exactly where it stands. The boxes become the path of one reflection at the head of
    the answer that names them with `<bbox>`, or of the last answer if none does, in the order of the row.

    ```python
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cup."}]}
    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>What?"},
                                       {"role": "assistant", "content": "<ref-object><bbox> and tea."}],
     "objects": {"ref": ["A cup"], "bbox": [[10, 20, 30, 40]]}}
    {"images": ["a.jpg"], "instruction": "<image>What?", "input": "", "output": "A cup.", "system": "Be short."}
    ```

    Args:
        item (`dict`): The row.
        row_id (`str`): Its name, if it has no `id`.
        dataset (`str`): The name of its data set, if it has no `dataset`.
        folder (`str`, *optional*): Where relative paths of pictures begin.
        form (`str`): One of `FORMS`.
        boxes (`str`, *optional*): What the numbers of a box count, one of `BOX_UNITS`. Rows with boxes need it, unless they
            say it themselves, as `objects.bbox_type`.
    """
    row_id, dataset = row_names(item, row_id, dataset)
    images: list[Any] = []
    try:
        images += [place_image(image, folder) for image in _images(item, FORMS[form])]
        messages = _messages(item, form, images, boxes)
    except (ValueError, TypeError, LookupError, OSError) as error:
        return make_bad_row(row_id, dataset, str(error) or repr(error), images)
    return normalise_row({"images": images, "messages": messages}, row_id, dataset)


def _images(item: dict[str, Any], form: Form) -> list[Any]:
    given = [item[column] for column in form.images if is_given(item.get(column))]
    if len(given) > 1:
        raise ValueError("there are both `images` and `image`: leave one of them out.")
    if not given:
        return []
    return list(given[0]) if isinstance(given[0], (list, tuple)) else given


def _messages(item: dict[str, Any], form: str, images: list[Any], unit: str | None) -> list[dict[str, Any]]:
    if problem := refused_column(item):
        raise ValueError(problem)
    for column in FORMS[form].refused:
        if is_given(item.get(column)):
            raise ValueError(f"`{column}` belongs to another training than of answers: leave the column out.")
    turns = _turns(item, form)
    for _, text in turns:
        for mark in set(PLACEHOLDER.findall(text)) - {"<image>", "<bbox>", "<ref-object>"}:
            hint = "`format: released` reads it" if mark == "<lvr>" else "V-Reflection looks at pictures alone"
            raise ValueError(f"a text holds {mark}: {hint}.")
    regions, names = read_regions(item, FORMS[form].boxes, images, unit)
    _check_counts(turns, images, regions, names)
    last = max((number for number, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    named = any("<bbox>" in text for _, text in turns)
    waiting_regions, waiting_names = iter(regions), iter(names)
    messages = []
    for number, (role, text) in enumerate(turns):
        path = []
        if role == "assistant":
            text, path = take_boxes(text, waiting_regions)
            if regions and not named and number == last:
                path = regions
        elif "<bbox>" in text:
            raise ValueError(
                f"the {role}'s text holds <bbox>: boxes are looked at in an answer, and can't be told in a question."
            )
        if role == "assistant" and "<image>" in text:
            raise ValueError("an answer holds <image>: V-Reflection answers with text.")
        content = region_parts(path)
        for place, piece in enumerate(text.split("<image>")):
            content += [{"type": "image"}] if place else []
            piece = re.sub("<ref-object>", lambda _: next(waiting_names), piece)
            content += [text_part(piece)] if piece else []
        messages.append({"role": role, "content": content})
    return messages


def _turns(item: dict[str, Any], form: str) -> list[tuple[str, str]]:
    """Role and text of each turn."""
    dialogues = FORMS[form].dialogues
    found = [column for column in dialogues if is_given(item.get(column))]
    if len(found) > 1:
        raise ValueError(f"there are both `{found[0]}` and `{found[1]}`: leave one of them out.")
    if not found:
        given = ", ".join(column for column in item if is_given(item[column])) or "nothing"
        raise ValueError(
            f"a row of {form} holds {' or '.join(f'`{name}`' for name in dialogues)}; this one has {given}."
        )
    column = found[0]
    turns = list(_prompt_turns(item, column) if column in ("instruction", "query") else _listed_turns(item, column))
    if is_given(item.get("system")):
        if turns[0][0] == "system":
            raise ValueError("there is a `system` column and a turn of the system: leave one of them out.")
        turns.insert(0, ("system", as_text(item["system"], "system")))
    return turns


def _listed_turns(item: dict[str, Any], column: str) -> Iterator[tuple[str, str]]:
    """Turns with `from` and `value`, or with `role` and `content`."""
    if not isinstance(item[column], (list, tuple)):
        raise ValueError(f"`{column}` must be a list of turns, got {item[column]!r}.")
    for turn in item[column]:
        keys = [key for key in turn if is_given(turn[key])] if isinstance(turn, dict) else []
        who, what = ("from", "value") if "from" in keys else ("role", "content")
        role = ROLES.get(turn[who]) if who in keys else None
        if role is None:
            raise ValueError(f"a turn of `{column}` must be of {', '.join(ROLES)}, got {turn!r}.")
        if unknown := [key for key in keys if key not in (who, what)]:
            raise ValueError(f"a turn holds `{who}` and `{what}`, and nothing reads `{unknown[0]}`: {turn!r}.")
        yield role, as_text(turn.get(what), what)


def _prompt_turns(item: dict[str, Any], column: str) -> Iterator[tuple[str, str]]:
    """Turns of a question and its answer in columns of their own, after those of `history`."""
    answer = "output" if column == "instruction" else "response"
    for pair in item.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"`history` must be a list of questions with their answers, got {pair!r}.")
        yield "user", as_text(pair[0], "history")
        yield "assistant", as_text(pair[1], "history")
    further = as_text(item["input"], "input") if is_given(item.get("input")) else ""
    yield "user", "\n".join(filter(None, (as_text(item[column], column), further)))
    yield "assistant", as_text(item.get(answer), answer)


def _check_counts(turns: list[tuple[str, str]], images: list, regions: list, names: list):
    """Raises where a placeholder stands more or less often than there is something for it; boxes and names may go without."""
    for mark, given, what in (
        ("<image>", images, "pictures"),
        ("<bbox>", regions, "boxes"),
        ("<ref-object>", names, "names"),
    ):
        found = sum(text.count(mark) for _, text in turns)
        if found != len(given) and (found or mark == "<image>"):
            raise ValueError(f"the texts hold {mark} {found} times, but the row has {len(given)} {what}.")
