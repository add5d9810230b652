"""Which threshold for `reflect="uncertain"`? Accuracy and latent steps at each, as numbers, a table and a figure."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import LogitsProcessor

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.decoding_vreflection import UNCERTAIN, ReflectionOptions, ReflectionProgress, entropy

from ..inference.attention_maps import GREEDY
from ..inference.drawing import new_figure
from ..inference.encoding import answer_texts, encode_prompts
from .comparison import aligned_table
from .dependence import accuracy_cells
from .matching import Match
from .own_rows import fingerprint, read_own_rows
from .statistics import proportion


# Of the entropies where the answers begin: the thresholds that are tried, beside 0 and infinity.
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
NEVER = float("inf")


class EntropyRecorder(LogitsProcessor):
    """Keeps the entropy of every step, (rows,) in nats; with `reflect="uncertain"` that which decides."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.steps.append(entropy(scores))
        return scores


def evaluate_thresholds(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    rows: Iterable[dict[str, Any]],
    thresholds: Sequence[float] | None = None,
    match: str = "exact",
    tolerance: float | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 512,
    max_reflections: int | None = None,
    latent_steps: int | None = None,
    latent_feedback: str | None = None,
) -> dict[str, Any]:
    """Asks the last question of each row, greedily, with `reflect="uncertain"` and each threshold.

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
        processor (`VReflectionProcessor`): Its processor.
        rows (`Iterable[dict]`): Validation rows, see `evaluate_rows`.
        thresholds (`Sequence[float]`, *optional*): In nats. Defaults to 0 (always) and the `QUANTILES` of the rows'
            entropies where their answers begin. Infinity (never) is always measured, since that gives these entropies.
        match, tolerance, batch_size, max_new_tokens: See `evaluate_rows`.
        max_reflections, latent_steps, latent_feedback (*optional*): See the model's `generate`.

    Returns:
        `dict`: How it was asked, the quantiles of the entropies, and for each threshold, in rising order, accuracy, how many
        answers reflect and their mean number of latent steps, ready for JSON; the threshold infinity is `"inf"`.

    Raises:
        BadRow: The first row that can't be asked, before any is.
        ValueError: Options that aren't allowed, contradict each other, or that the checkpoint can't follow.
    """
    rule, given = Match(match, tolerance), {"latent_steps": latent_steps, "latent_feedback": latent_feedback}
    given |= {"reflect": UNCERTAIN, "max_reflections": max_reflections}
    for threshold in (*(thresholds or ()), NEVER):
        options = model.reflection_options(**given, reflect_threshold=threshold)
    asked = read_own_rows(rows, rule)
    data = {"count": len(asked), "fingerprint": fingerprint(asked)}
    decoding = asdict(options) | {"max_new_tokens": max_new_tokens}
    del decoding["reflect_threshold"]
    batches = [asked[first : first + batch_size] for first in range(0, len(asked), batch_size)]

    def ask(inputs: dict, threshold: float, **more) -> torch.LongTensor:
        sequences = model.generate(**inputs, **GREEDY, **decoding, reflect_threshold=threshold, **more)
        return sequences[:, inputs["input_ids"].shape[1] :]

    def judge(batch: Sequence, tokens: torch.LongTensor) -> list[tuple[bool, int]]:
        pairs = zip(answer_texts(processor, tokens), batch)
        right = [rule.verdict(text, row.reference)["correct"] for text, row in pairs]
        return list(zip(right, (tokens == model.config.latent_token_id).sum(1).tolist()))

    found: dict[float, list[tuple[bool, int]]] = {NEVER: []}
    begin: list[float] = []
    for batch in tqdm(batches, desc="without reflections", unit="batch"):
        recorder = EntropyRecorder()
        inputs = encode_prompts(processor, [row.conversation() for row in batch], model.device)
        tokens = ask(inputs, NEVER, logits_processor=[recorder])
        found[NEVER] += judge(batch, tokens)
        begin += entropies_where_answers_begin(model.config, options, tokens, recorder.steps)
    if thresholds is None:
        quantiles = torch.tensor(begin).quantile(torch.tensor(QUANTILES)).tolist() if begin else ()
        thresholds = (0, *(round(quantile, 4) for quantile in quantiles))
    thresholds = sorted({float(threshold) for threshold in thresholds} - {NEVER})
    found = {threshold: [] for threshold in thresholds} | found
    for batch in tqdm(batches, desc="with each threshold", unit="batch"):
        inputs = encode_prompts(processor, [row.conversation() for row in batch], model.device)
        for threshold in thresholds:
            found[threshold] += judge(batch, ask(inputs, threshold))
    return {
        "data": data,
        "match": {"rule": rule.rule, "tolerance": rule.tolerance},
        "decoding": {"method": "greedy", "batch_size": batch_size, **decoding},
        "entropy_quantiles": {
            str(quantile): round(torch.tensor(begin).quantile(quantile).item(), 4) for quantile in QUANTILES if begin
        },
        "thresholds": [
            {
                "threshold": "inf" if threshold == NEVER else threshold,
                "accuracy": proportion([right for right, _ in answers]),
                "reflection_rate": proportion([steps > 0 for _, steps in answers]),
                "mean_latent_steps": round(fmean(steps for _, steps in answers), 4),
            }
            for threshold, answers in found.items()
        ],
    }


def entropies_where_answers_begin(
    config: VReflectionConfig,
    options: ReflectionOptions,
    tokens: torch.LongTensor,
    steps: Sequence[torch.Tensor],
) -> list[float]:
    """Of rows of new tokens (B, N) and the entropies (B,) of their N steps; without rows whose thoughts don't end."""
    progress = ReflectionProgress(options, config.latent_token_ids, think_end_id=config.think_end_token_id)
    begins = progress.begins_answer(tokens)[:, : len(steps)]
    return torch.stack(steps, 1)[begins].tolist()


def thresholds_table(result: dict) -> str:
    """A line for each threshold, as a Markdown table that is readable in a terminal."""
    lines = [
        ("threshold, nats", "rows", "right", "accuracy", "95 % interval", "answers that reflect", "mean latent steps")
    ]
    for one in result["thresholds"]:
        reflecting = f"{one['reflection_rate']['share']:.1%}"
        cells = accuracy_cells(name_of(one), one["accuracy"])
        lines.append((*cells, reflecting, f"{one['mean_latent_steps']:.2f}"))
    return aligned_table(lines)


def name_of(one: dict) -> str:
    """The threshold of a line as text."""
    return f"{float(one['threshold']):g}"


def draw_thresholds(result: dict) -> Figure:
    """Accuracy with 95 % intervals against the mean number of latent steps; the thresholds stand beside their points."""
    points = result["thresholds"]
    steps = [one["mean_latent_steps"] for one in points]
    shares, lows, highs = ([100 * one["accuracy"][name] for one in points] for name in ("share", "low", "high"))
    figure = new_figure((6.4, 4.2))
    axes = figure.subplots()
    errors = [[share - low for share, low in zip(shares, lows)], [high - share for share, high in zip(shares, highs)]]
    axes.errorbar(steps, shares, yerr=errors, color="#2b6cb0", ecolor="0.6", marker="o", capsize=3)
    for one, x, y in zip(points, steps, shares):
        axes.annotate(name_of(one), (x, y), (-6, 4), textcoords="offset points", ha="right", fontsize=8)
    axes.margins(x=0.08)
    axes.set_ylim(0, 102)
    axes.set_xlabel("mean latent steps an answer; at the points the threshold in nats", fontsize=9)
    axes.set_ylabel(f"right answers in %, {result['data']['count']} rows", fontsize=9)
    axes.grid(axis="y", color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
