"""GlyphSearch as a task: unseen scenes, and whether the model answers right, reflects, and looks at the right place.

And whether the latents matter: the same questions without latents, and with others than the model's own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from modeling_vreflection import VReflectionProcessor

from ..glyphsearch import GLYPHS, Question, Scene, draw_question, scene_seed
from ..inference.attention_maps import GREEDY, Reflection, generate_and_look, offered_sources
from .interventions import EXCHANGED, INTERVENTIONS, LatentInterventionModel, replace_latents
from .statistics import proportion


# An answer is a glyph and the end of the turn; a model that hasn't learned to stop isn't followed further.
ANSWER_TOKENS = 8
USUAL, WITHOUT_LATENTS = "usual", "without_latents"


@dataclass(frozen=True)
class Sample:
    """What became of one question.

    Args:
        question (`Question`): The question.
        answers (`dict[str, str]`): What was answered: as usual, without latents, and under each intervention that could
            be made. None can in an answer without a reflection, or where there is nobody to exchange latents with.
        points (`dict[str, bool]`): For each source of attention, whether the first reflection's map, averaged over its
            steps, is largest at a patch whose centre lies in the target's box. Empty without a reflection.
        inside (`dict[str, float]`): For each source, that map's share on the patches whose centres lie in the box, of all
            attention to the picture. Empty without a reflection.
    """

    question: Question
    answers: dict[str, str]
    points: dict[str, bool]
    inside: dict[str, float]

    def correct(self, way: str = USUAL) -> bool:
        """Whether an answer is right."""
        return self.answers[way] == self.question.answer


def evaluate_glyphsearch(
    model: LatentInterventionModel,
    processor: VReflectionProcessor,
    limit: int = 500,
    split: str = "test",
    difficulty: str = "default",
    batch_size: int = 50,
    latent_feedback: str | None = None,
    latent_steps: int | None = None,
    reflect: bool | None = None,
    interventions: Sequence[str] = tuple(INTERVENTIONS),
) -> dict:
    """Asks one question about each of a split's first scenes: as usual, without latents, and with other latents.

    Args:
        model (`LatentInterventionModel`): The model.
        processor (`VReflectionProcessor`): Its processor.
        limit (`int`): Scenes.
        split (`str`): `"test"` or `"validation"`.
        difficulty (`str`): A preset's name.
        batch_size (`int`): Questions decoded at once; latents and pictures are exchanged within these.
        latent_feedback (`str`, *optional*): What a latent step feeds back; without it the checkpoint's choice.
        latent_steps (`int`, *optional*): S, at least 1; without it the checkpoint's choice.
        reflect (`bool`, *optional*): Whether each answer begins with a reflection; without it the model decides.
        interventions (`Sequence[str]`): Keys of `INTERVENTIONS`.

    Returns:
        `dict`: What was asked, how it was decoded, and the results, ready for JSON.
    """
    options = asdict(model.reflection_options(latent_steps, latent_feedback, reflect))
    samples = []
    with tqdm(total=limit, desc="glyphsearch", unit="scene") as progress:
        for first in range(0, limit, batch_size):
            drawn = [draw_question(split, index, difficulty) for index in range(first, min(first + batch_size, limit))]
            generator = torch.Generator().manual_seed(first)
            samples += answer_batch(model, processor, drawn, options, interventions, generator)
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
        "decoding": {"method": "greedy", "batch_size": batch_size, **options},
        **summarise(samples),
    }


def answer_batch(
    model: LatentInterventionModel,
    processor: VReflectionProcessor,
    drawn: list[tuple[Scene, Question]],
    options: dict,
    interventions: Sequence[str],
    generator: torch.Generator,
) -> list[Sample]:
    """Asks a batch of questions in all ways."""
    questions = [question for _, question in drawn]
    scenes = [scene for scene, _ in drawn]
    inputs = prepare(model, processor, scenes, questions)
    prompt_length = inputs["input_ids"].shape[1]
    limit = {"max_new_tokens": options["latent_steps"] + 2 + ANSWER_TOKENS}

    def read(tokens: torch.Tensor) -> list[str]:
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]

    def answer(inputs: dict, rows: list[int], **options) -> dict[int, str]:
        sequences = model.generate(**inputs, **GREEDY, **limit, **options)
        return dict(zip(rows, read(sequences[:, prompt_length:])))

    with model.recording() as record:
        tokens, reflections = generate_and_look(model, inputs, offered_sources(model.config), **options, **limit)
    everybody = list(range(len(drawn)))
    answers = {USUAL: dict(zip(everybody, read(tokens)))}
    answers[WITHOUT_LATENTS] = answer(inputs, everybody, latent_steps=0)

    # Interventions are made between those that reflect, so that nobody is given what isn't a latent.
    rows = [row for row in everybody if reflections[row]]
    exchanging = rows if len(rows) > 1 else []
    if rows and interventions:
        latents = record.latents[rows]
        among = prepare(model, processor, [scenes[row] for row in rows], [questions[row] for row in rows])
        others = [scenes[row] for row in rows[1:] + rows[:1]]
        with model.recording() as record:
            swapped = prepare(model, processor, others, [questions[row] for row in rows])
            model.generate(**swapped, **GREEDY, **limit, **options | {"reflect": True})
        prompt_length = among["input_ids"].shape[1]
        for name in interventions:
            replaced = replace_latents(name, latents, model, record.latents, generator)
            with model.feeding(replaced):
                given = answer(among, rows, **options)
            answers[name] = {row: given[row] for row in (exchanging if name in EXCHANGED else rows)}
    return [
        Sample(
            question=question,
            answers={way: given[row] for way, given in answers.items() if row in given},
            points=points_at(reflections[row][0], question.target.box) if reflections[row] else {},
            inside=inside_box(reflections[row][0], question.target.box) if reflections[row] else {},
        )
        for row, question in enumerate(questions)
    ]


def prepare(model, processor: VReflectionProcessor, scenes: list[Scene], questions: list[Question]):
    """The inputs of a batch of questions about scenes, padded on the left."""
    return processor.apply_chat_template(
        [conversation(scene, question) for scene, question in zip(scenes, questions)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)


def conversation(scene: Scene, question: Question) -> list[dict]:
    """A question about a scene, as messages."""
    return [
        {"role": "user", "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]}
    ]


def points_at(reflection: Reflection, box: tuple[float, float, float, float]) -> dict[str, bool]:
    """For each source, whether its mean map over the steps (h, w) is largest at a patch whose centre lies in the box."""
    return {
        source: bool(centres_inside(box, *maps.shape[1:]).flatten()[maps.mean(0).argmax()])
        for source, (maps, *_) in reflection.maps.items()
    }


def inside_box(reflection: Reflection, box: tuple[float, float, float, float]) -> dict[str, float]:
    """For each source, the share of its mean map over the steps (h, w) at patches whose centres lie in the box."""
    shares = {}
    for source, (maps, *_) in reflection.maps.items():
        mean = maps.mean(0)
        shares[source] = float(mean[centres_inside(box, *mean.shape)].sum() / mean.sum())
    return shares


def centres_inside(box: tuple[float, float, float, float], height: int, width: int) -> torch.BoolTensor:
    """Which patches (h, w) have their centres in a box of fractions of the picture."""
    x0, y0, x1, y1 = box
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))


def summarise(samples: list[Sample]) -> dict:
    """The results over all samples, see [`evaluate_glyphsearch`]."""
    reflected = [sample for sample in samples if sample.points]
    sources = tuple(reflected[0].points) if reflected else ()
    ways = dict.fromkeys(way for sample in samples for way in sample.answers)
    x0, y0, x1, y1 = zip(*(sample.question.target.box for sample in samples))
    return {
        "accuracy": by_kind(samples, USUAL),
        "reflection_rate": proportion([bool(sample.points) for sample in samples]),
        "without_latents": {"latent_steps": 0, "accuracy": by_kind(samples, WITHOUT_LATENTS)},
        "interventions": {
            way: summarise_intervention([sample for sample in samples if way in sample.answers], way)
            for way in ways
            if way in INTERVENTIONS
        },
        "pointing": {source: proportion([sample.points[source] for sample in reflected]) for source in sources},
        "attention_inside_box": {
            source: round(fmean(sample.inside[source] for sample in reflected), 4) for source in sources
        },
        "mean_box_area": round(fmean((b - a) * (d - c) for a, b, c, d in zip(x0, x1, y0, y1)), 4),
        # One character a scene, for paired comparisons: right, wrong, or not asked in this way.
        "outcomes": {
            way: "".join(str(int(sample.correct(way))) if way in sample.answers else "-" for sample in samples)
            for way in ways
        },
    }


def summarise_intervention(samples: list[Sample], way: str) -> dict:
    """The accuracy under an intervention, that of the same questions as usual, and how often the answer changed."""
    return {
        "accuracy": by_kind(samples, way),
        "usual_accuracy_of_the_same": by_kind(samples, USUAL),
        "changed": proportion([sample.answers[way] != sample.answers[USUAL] for sample in samples]),
    }


def by_kind(samples: list[Sample], way: str) -> dict[str, dict]:
    """How many answers are right over all samples and over each kind of question."""
    kinds = {
        kind: [sample for sample in samples if sample.question.kind == kind] for kind in ("attribute", "relation")
    }
    return {
        name: proportion([sample.correct(way) for sample in group])
        for name, group in {"overall": samples, **kinds}.items()
    }
