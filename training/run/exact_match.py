"""Greedy answers to the questions of an evaluation: how many are exactly the rows' own, and whether latents matter to them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vreflection_hub_card.inference.attention_maps import GREEDY
from vreflection_hub_card.inference.encoding import answer_texts
from vreflection_hub_card.rows import BadRow, row_messages

from ..collator import NON_MODEL_KEYS, VReflectionDataCollator


OWN, TEACHER, ZEROS = "exact_match", "exact_match_teacher", "exact_match_zeros"
PADDING = {"attention_mask": 0, "mm_token_type_ids": 0}


def exact_match_ways(model, reflects: bool) -> tuple[str, ...]:
    """The ways of answering that there are: where no reflection trains, or without a teacher, some say nothing."""
    if not reflects:
        return (OWN,)
    return (OWN, ZEROS) if model.config.has_bcm is False else (OWN, TEACHER, ZEROS)


@torch.no_grad()
def count_exact_matches(
    model,
    collator: VReflectionDataCollator,
    rows: Iterable[dict[str, Any]],
    ways: tuple[str, ...],
    *,
    batch_size: int,
    device: torch.device,
) -> tuple[dict[str, int], int]:
    """Answers the last question of each row in several ways.

    `OWN`: as the checkpoint decodes by default. `TEACHER`: fed Z_T, which a training forward of the same rows gives, instead of
    its own latents; where a row has no reflection that is the same. `ZEROS`: fed zeros in every slot. An answer counts if it
    is the row's, special tokens left out and spaces around it stripped.

    Args:
        model (`VReflectionForConditionalGeneration`): The model, maybe with an adapter, in eval mode.
        collator (`VReflectionDataCollator`): With `slot_ce=True`, whose labels hold whole turns, and no `every_module`.
        rows (`Iterable[dict]`): Rows in the project's format.
        ways (`tuple[str, ...]`): See [`exact_match_ways`].
        batch_size (`int`): Rows at once.
        device (`torch.device`): The model's.

    Returns:
        `tuple`: How many answers were right in each way, and how many were asked for.
    """
    right, count = dict.fromkeys(ways, 0), 0
    for reflections, batch in batches(rows, batch_size, collator.reflect):
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in collator(batch).items()}
        if not inputs["sample_ids"]:  # all were left out
            continue
        prompts, turns = split_at_last_turn(inputs, collator.processor.tokenizer.pad_token_id)
        expected = answer_texts(collator.processor, turns)
        # One reflection more than the row's still leaves room for its answer, and for what would make it another one.
        room = max(map(len, turns)) + model.config.num_latent_tokens + 3
        fed = {OWN: {}, ZEROS: {"latents": torch.zeros(len(turns), room, hidden_size(model), device=device)}}
        if TEACHER in ways and reflections:
            known = {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}
            latents = model(**known, latent_inputs="bcm", logits_to_keep=1, use_cache=False).teacher_latents
            fed[TEACHER] = {"latents": latents.unflatten(0, (len(turns), reflections)).flatten(1, 2)}
        matches = {}
        for way in fed:
            if way in ways:
                tokens = model.generate(**prompts, **GREEDY, **fed[way], max_new_tokens=room, use_cache=True)
                given = answer_texts(collator.processor, tokens[:, prompts["input_ids"].shape[1] :])
                matches[way] = sum(one == other for one, other in zip(given, expected))
        for way in ways:
            right[way] += matches.get(way, matches[OWN])
        count += len(turns)
    return right, count


def batches(
    rows: Iterable[dict[str, Any]], batch_size: int, reflect: bool
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Batches of rows with equally many reflections, and this number."""
    waiting = {}
    for row in rows:
        reflections = count_reflections(row) if reflect else 0
        batch = waiting.setdefault(reflections, [])
        batch.append(row)
        if len(batch) == batch_size:
            yield reflections, waiting.pop(reflections)
    yield from waiting.items()


def count_reflections(row: dict[str, Any]) -> int:
    """How many reflections a row has; none if it is a bad one, which the collator refuses or leaves out."""
    try:
        return sum(part["type"] == "reflection" for message in row_messages(row) for part in message["content"])
    except BadRow:
        return 0


def share_of_rank(rows: Iterable, rank: int, num_ranks: int) -> Iterator:
    """Every `num_ranks`-th row, from this rank's first on: each row on one rank."""
    return islice(iter(rows), rank, None, num_ranks)


def split_at_last_turn(batch: dict[str, Any], pad_token_id: int) -> tuple[dict[str, Any], list[torch.LongTensor]]:
    """Cuts rows of a collator's batch before the assistant's last turn.

    Returns:
        `tuple`: The inputs of `generate`, padded on the left, and the tokens (T,) of each turn.
    """
    prompts, turns = {"input_ids": [], **{name: [] for name in PADDING}}, []
    for row, labels in enumerate(batch["labels"]):
        labelled = labels != -100
        end = int(labelled.nonzero().max()) + 1
        start = int((~labelled[:end]).nonzero().max()) + 1
        turns.append(batch["input_ids"][row, start:end])
        there = batch["attention_mask"][row, :start].bool()
        for name, values in prompts.items():
            values.append(batch[name][row, :start][there])
    inputs = {
        name: pad_sequence(values, True, PADDING.get(name, pad_token_id), "left") for name, values in prompts.items()
    }
    return inputs | {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}, turns


def hidden_size(model) -> int:
    """D."""
    return model.config.get_text_config().hidden_size
