"""Rows as training by reward reads them: a question to answer, and the right answer apart."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset

from modeling_vreflection import VReflectionProcessor
from vreflection_hub_card.rows import BadRow, row_name

from .images import load_image
from .inspection import check_messages, read_messages


def prompt_row(row: dict[str, Any], processor: VReflectionProcessor) -> dict[str, Any]:
    """A row without its last answer: `id`, `prompt`, the messages with opened pictures, and `answer`, a text.

    Reflections, with their boxes, are left out: nothing reads them.

    Raises:
        BadRow: What is wrong with the row.
    """
    name = row_name(row)
    messages = read_messages(row, reflect=False)
    check_messages(messages, name, row, processor)
    *prompt, last = messages
    if last["role"] != "assistant":
        raise BadRow(f"{name}: its last message must be the assistant's, the right answer.", "nothing to learn")
    answer = "".join(part["text"] for part in last["content"]).strip()
    if not answer:
        raise BadRow(f"{name}: its last answer holds no text, so that no answer would be right.", "nothing to learn")
    try:
        prompt = [
            {
                **message,
                "content": [
                    {**part, "image": load_image(part["image"], processor.image_processor)}
                    if part["type"] == "image"
                    else part
                    for part in message["content"]
                ],
            }
            for message in prompt
        ]
    except (OSError, ValueError) as error:
        raise BadRow(f"{name}: {error}", "picture") from error
    return {"id": row.get("id"), "prompt": prompt, "answer": answer}


def prompt_rows(
    rows: Dataset | IterableDataset | Sequence[dict[str, Any]], processor: VReflectionProcessor
) -> Dataset | IterableDataset:
    """All rows as [`prompt_row`] has them, made when they are read."""
    if isinstance(rows, IterableDataset):
        return rows.map(partial(prompt_row, processor=processor), remove_columns=rows.column_names)
    numbers = Dataset.from_dict({"index": range(len(rows))})
    return numbers.with_transform(partial(_read, rows=rows, processor=processor))


def _read(batch: dict[str, list[int]], rows: Sequence[dict[str, Any]], processor: VReflectionProcessor) -> dict:
    """Columns of the rows with these numbers; a row that is asked for several times is read once."""
    read = {index: prompt_row(rows[index], processor) for index in dict.fromkeys(batch["index"])}
    return {name: [read[index][name] for index in batch["index"]] for name in ("id", "prompt", "answer")}
