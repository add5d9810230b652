"""GlyphSearch as a task: unseen scenes, and whether the model answers right, reflects, and looks at the right place."""

from dataclasses import dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor
from modeling_vreflection.generation_vreflection import LATENT_FEEDBACK, first_given

from ..attention import GREEDY, Reflection, generate_and_look, offered_sources
from ..glyphsearch import GLYPHS, Question, Scene, draw_question, scene_seed
from .shuffling import LatentShufflingModel
from .statistics import proportion


# An answer is a glyph and the end of the turn; a model that hasn't learned to stop isn't followed further.
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """What became of one question.

    Args:
        question (`Question`): The question.
        correct (`bool`): Decoded as usual, whether the answer is right.
        reflected (`bool`): Whether that answer holds a reflection.
        points (`dict[str, bool]`): For each source of attention, whether the first reflection's map, averaged over its
            steps, is largest at a patch whose centre lies in the target's box. Empty without a reflection.
        correct_plain (`bool`): Whether the answer is right without any latent step.
        correct_shuffled (`bool`, *optional*): Whether it is right with the latents of another sample; `None` where
            there were none to exchange.
    """

    question: Question
    correct: bool
    reflected: bool
    points: dict[str, bool]
    correct_plain: bool
    correct_shuffled: bool | None


def evaluate_glyphsearch(
    model: LatentShufflingModel,
    processor: VReflectionProcessor,
    limit: int = 500,
    split: str = "test",
    difficulty: str = "default",
    batch_size: int = 50,
    latent_feedback: str | None = None,
) -> dict:
    """Asks one question about each of a split's first scenes: as usual, without latents, with shuffled latents.

    Args:
        model (`LatentShufflingModel`): The model.
        processor (`VReflectionProcessor`): Its processor.
        limit (`int`): Scenes.
        split (`str`): `"test"` or `"validation"`.
        difficulty (`str`): A preset's name.
        batch_size (`int`): Questions decoded at once; latents are shuffled within these.
        latent_feedback (`str`, *optional*): What a latent step feeds back; without it the checkpoint's choice.

    Returns:
        `dict`: What was asked, how it was decoded, and the results, ready for JSON.
    """
    samples = []
    with tqdm(total=limit, desc="glyphsearch", unit="scene") as progress:
        for first in range(0, limit, batch_size):
            drawn = [draw_question(split, index, difficulty) for index in range(first, min(first + batch_size, limit))]
            samples += answer_batch(model, processor, drawn, latent_feedback)
            progress.update(len(drawn))
    return {
        "data": {
            "split": split,
            "difficulty": difficulty,
            "first_scene": 0,
            "count": limit,
            "first_seed": scene_seed(split, 0),
            "last_seed": scene_seed(split, limit - 1),
            "chance": 1 / len(GLYPHS),
        },
        "decoding": {
            "method": "greedy",
            "batch_size": batch_size,
            "latent_steps": default_latent_steps(model),
            "latent_feedback": first_given(
                latent_feedback, model.generation_config, None, "latent_feedback", LATENT_FEEDBACK[0]
            ),
        },
        **summarise(samples),
    }


def answer_batch(
    model: LatentShufflingModel,
    processor: VReflectionProcessor,
    drawn: list[tuple[Scene, Question]],
    latent_feedback: str | None,
) -> list[Sample]:
    """Asks a batch of questions in the three ways."""
    inputs = processor.apply_chat_template(
        [conversation(scene, question) for scene, question in drawn],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    room = {"max_new_tokens": default_latent_steps(model) + 2 + ANSWER_TOKENS}
    options = {"latent_feedback": latent_feedback, **room}

    tokens, reflections = generate_and_look(model, inputs, offered_sources(model.config), **options)
    prompt_length = inputs["input_ids"].shape[1]
    plain = model.generate(**inputs, **GREEDY, latent_steps=0, **room)[:, prompt_length:]
    shuffled, exchanged = model.generate_shuffled(**inputs, **GREEDY, **options)
    usual, plain, shuffled = (
        processor.batch_decode(answers, skip_special_tokens=True)
        for answers in (tokens, plain, shuffled[:, prompt_length:])
    )
    return [
        Sample(
            question=question,
            correct=usual[row].strip() == question.answer,
            reflected=bool(reflections[row]),
            points=points_at(reflections[row][0], question.target.box) if reflections[row] else {},
            correct_plain=plain[row].strip() == question.answer,
            correct_shuffled=shuffled[row].strip() == question.answer if exchanged[row] else None,
        )
        for row, (_, question) in enumerate(drawn)
    ]


def default_latent_steps(model: LatentShufflingModel) -> int:
    """S, if nothing else is asked for."""
    return first_given(None, model.generation_config, None, "latent_steps", model.config.num_latent_tokens)


def conversation(scene: Scene, question: Question) -> list[dict]:
    """A question about a scene, as messages."""
    return [
        {"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]}
    ]


def points_at(reflection: Reflection, box: tuple[float, float, float, float]) -> dict[str, bool]:
    """For each source, whether its mean map over the steps (h, w) is largest at a patch whose centre lies in the box."""
    points = {}
    x0, y0, x1, y1 = box
    for source, (maps, *_) in reflection.maps.items():
        height, width = maps.shape[1:]
        row, column = divmod(int(torch.argmax(maps.mean(0))), width)
        points[source] = x0 <= (column + 0.5) / width < x1 and y0 <= (row + 0.5) / height < y1
    return points


def summarise(samples: list[Sample]) -> dict:
    """The results over all samples, see [`evaluate_glyphsearch`]."""
    exchanged = [sample for sample in samples if sample.correct_shuffled is not None]
    reflected = [sample for sample in samples if sample.reflected]
    x0, y0, x1, y1 = zip(*(sample.question.target.box for sample in samples))
    return {
        "accuracy": by_kind(samples, "correct"),
        "reflection_rate": proportion([sample.reflected for sample in samples]),
        "without_latents": {"latent_steps": 0, "accuracy": by_kind(samples, "correct_plain")},
        "shuffled_latents": {
            "accuracy": by_kind(exchanged, "correct_shuffled"),
            "unshuffled_accuracy_of_the_same": by_kind(exchanged, "correct"),
        },
        "pointing": {
            source: proportion([sample.points[source] for sample in reflected])
            for source in (reflected[0].points if reflected else ())
        },
        "mean_box_area": round(fmean((b - a) * (d - c) for a, b, c, d in zip(x0, x1, y0, y1)), 4),
    }


def by_kind(samples: list[Sample], outcome: str) -> dict[str, dict]:
    """The proportion of an outcome, a field of `Sample`, over all samples and over each kind of question."""
    kinds = {
        kind: [sample for sample in samples if sample.question.kind == kind] for kind in ("attribute", "relation")
    }
    return {
        name: proportion([getattr(sample, outcome) for sample in group])
        for name, group in {"overall": samples, **kinds}.items()
    }
