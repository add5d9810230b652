"""Rewards for answers that the model sampled: functions as trl's `GRPOTrainer` takes them, a list of numbers each.

Besides the columns of the data set, such as `answer`, [`VReflectionGRPOTrainer`] hands rewards of each answer
`num_reflections`, how many whole reflections it holds; `ended`, whether it ended before the limit; and to those that have it
as an argument `latent_use`, see [`latent_use`].
"""

from typing import Any

from modeling_vreflection.processing_vreflection import THINK_TOKENS
from vreflection_hub_card.evaluation.matching import Match


def exact_answer(completions: list[list[dict[str, Any]]], answer: list[str], **kwargs) -> list[float]:
    """1 for the right answer, spaces around it aside, else 0; thoughts in words don't count."""
    rule = Match("exact")
    texts = (completion[-1]["content"].rpartition(THINK_TOKENS[1])[2] for completion in completions)
    return [float(rule.verdict(text, right)["correct"]) for text, right in zip(texts, answer)]


def reflection_format(
    completions: list[list[dict[str, Any]]], num_reflections: list[int], ended: list[bool], **kwargs
) -> list[float]:
    """1 for an answer that reflects, says something and ends, else 0."""
    texts = (completion[-1]["content"].strip() for completion in completions)
    return [float(bool(count and text and end)) for text, count, end in zip(texts, num_reflections, ended)]


def latent_use(latent_use: list[float], **kwargs) -> list[float]:
    """By how much the right answer's log-probability, behind the sampled reflections, drops when their latents are zeros.

    A sum over the answer's tokens and its end, in nats; 0 where nothing was reflected.
    """
    return latent_use


# By the names that recipes call them.
REWARDS = {"exact_answer": exact_answer, "reflection_format": reflection_format, "latent_use": latent_use}
