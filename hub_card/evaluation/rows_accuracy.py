"""Rows of one's own as a benchmark: are the answers right, where did the model look, and do its latents matter?"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from .asking_rows import RowsAsker
from .dependence import latents_sentence, summarise_replacement
from .interventions import INTERVENTIONS
from .kept_answers import USUAL
from .matching import Match
from .own_rows import OwnRow, read_own_rows
from .statistics import proportion


TASK = "rows"  # in the files of a run


@dataclass(frozen=True)
class RowsEvaluation:
    """The `result` over all rows, ready for JSON, and a `sample` for each, in the form of `samples.jsonl`."""

    result: dict[str, Any]
    samples: list[dict[str, Any]]


def evaluate_rows(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    rows: Iterable[dict[str, Any]],
    match: str = "exact",
    tolerance: float | None = None,
    replace: Sequence[str] = (),
    batch_size: int = 1,
    max_new_tokens: int = 512,
    latent_steps: int | None = None,
    latent_feedback: str | None = None,
    reflect: bool | None = None,
) -> RowsEvaluation:
    """Asks the last question of each row, greedily, and with `replace` again with other latents than the model's own.

    ```python
    from vreflection_hub_card.evaluation.rows_accuracy import evaluate_rows
    evaluation = evaluate_rows(model, processor, rows, replace=("zeroed", "shuffled"))
    print(evaluation.result["accuracy"], evaluation.result["sentence"])
    ```

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        processor (`VReflectionProcessor`): Its processor.
        rows (`Iterable[dict]`): Rows as for training, or with `question`, `answer` and `image` or `images`. The conversation up
            to the last assistant's turn is the prompt, that turn without its reflections the right answer.
        match (`str`): When an answer is right: `"exact"`, `"letter"` or `"number"`, see [`Match`].
        tolerance (`float`, *optional*): Of `"number"`, absolute.
        replace (`Sequence[str]`): Keys of `INTERVENTIONS`, tried on the rows whose answers hold a reflection.
        batch_size (`int`): Rows decoded at once.
        max_new_tokens (`int`): Of an answer, reflections included.
        latent_steps, latent_feedback, reflect (*optional*): See the model's `generate`.

    Raises:
        BadRow: The first row that can't be asked, before any is.
        ValueError: Options that aren't allowed, contradict each other, or that the checkpoint can't follow.
    """
    rule = Match(match, tolerance)
    decoding = decoding_options(model, replace, max_new_tokens, latent_steps, latent_feedback, reflect)
    asker = RowsAsker(model, processor, read_own_rows(rows, rule), decoding, batch_size)
    return ask_and_summarise(asker, rule, replace)


def decoding_options(
    model: VReflectionForConditionalGeneration,
    replace: Sequence[str],
    max_new_tokens: int,
    latent_steps: int | None,
    latent_feedback: str | None,
    reflect: bool | None,
) -> dict[str, Any]:
    """The arguments of `generate`, spelled out; raises a `ValueError` where they contradict each other or `replace`."""
    options = model.reflection_options(latent_steps, latent_feedback, reflect)
    if unknown := [name for name in replace if name not in INTERVENTIONS]:
        raise ValueError(f"Unknown replacement {unknown[0]!r}; choose of {', '.join(INTERVENTIONS)}.")
    if replace and not options.can_start:
        raise ValueError(
            "Without reflections there are no latents to replace: leave `latent_steps=0` and `reflect=False` out."
        )
    return asdict(options) | {"max_new_tokens": max_new_tokens}


def ask_and_summarise(asker: RowsAsker, match: Match, replace: Sequence[str]) -> RowsEvaluation:
    """Asks what isn't answered yet, and counts."""
    names = list(dict.fromkeys(replace))
    asker.ask()
    asker.replace(names)
    samples = []
    for index, row in enumerate(asker.rows):
        kept = ("text", "reflected", "tokens", "latent_tokens", "looks")
        sample = row_sample(TASK, row, asker.answers[USUAL, index], kept, match) | {"replaced": {}}
        for name in names:
            if (name, index) in asker.answers:
                text = asker.answers[name, index]["text"]
                sample["replaced"][name] = {"text": text, **match.verdict(text, row.reference)}
        samples.append(sample)
    return RowsEvaluation(summarise(samples, match, names), samples)


def row_sample(task: str, row: OwnRow, answer: dict, kept: Sequence[str], match: Match) -> dict[str, Any]:
    """A row of `samples.jsonl`: what was asked, the fields of the answer that are `kept`, and whether it is right."""
    sample = {"task": task, "id": row.id, "question": row.question, "answer": row.reference}
    sample |= {name: answer[name] for name in kept}
    return sample | {"verdicts": {match.rule: match.verdict(answer["text"], row.reference)}}


def summarise(samples: list[dict], match: Match, names: Sequence[str]) -> dict[str, Any]:
    """The results over all samples; a replacement's beside those of the same rows without it."""
    verdicts = [sample["verdicts"][match.rule] for sample in samples]
    right = [verdict["correct"] for verdict in verdicts]
    replacements = {}
    for name in names:
        asked = [index for index, sample in enumerate(samples) if name in sample["replaced"]]
        other = [samples[index]["replaced"][name] for index in asked]
        replacements[name] = summarise_replacement(
            [right[index] for index in asked],
            [answer["correct"] for answer in other],
            [answer["text"] != samples[index]["text"] for index, answer in zip(asked, other)],
        )
    result = {
        "match": {"rule": match.rule, "tolerance": match.tolerance},
        "accuracy": proportion(right),
        "unparsed": sum(verdict["found"] is None for verdict in verdicts),
        "reflection_rate": proportion([sample["reflected"] for sample in samples]),
        "accuracy_of_reflecting": proportion([one for one, sample in zip(right, samples) if sample["reflected"]]),
        "replacements": replacements,
    }
    return result | ({"sentence": latents_sentence(replacements)} if names else {})
