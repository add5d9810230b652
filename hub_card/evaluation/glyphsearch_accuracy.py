"""GlyphSearch as a benchmark: does the model answer right on unseen scenes, reflect, and look at the right place?

And do the latents matter? The same questions are asked without latents, and with others than the model's own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from tqdm import tqdm

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor

from ..glyphsearch import CHAIN_KINDS, GLYPHS, Question, Scene, draw_question, scene_seed
from ..inference.attention_maps import GREEDY, Reflection, generate_and_look, offered_sources
from ..inference.encoding import answer_texts, encode_prompts, user_turn
from .interventions import ALWAYS, EXCHANGED, INTERVENTIONS, first_latents, fit_steps, replace_latents
from .statistics import paired_difference, proportion


# An answer is a glyph and the end of the turn; a model that hasn't learned to stop isn't followed further.
ANSWER_TOKENS = 8
# Ways of asking by their names in result files: as the model decodes by itself, and without reflections. The others are
# `INTERVENTIONS`.
UNCHANGED, WITHOUT_LATENTS = "usual", "without_latents"
# Kinds of questions, in the order of result files.
KINDS = ("attribute", "relation", *CHAIN_KINDS)


@dataclass(frozen=True)
class Sample:
    """The answers to one question by way of asking; by source of attention what `compare_with_box` says, and `look_by_step`.

    Without a reflection there are no interventions and no looks; without a second reflection in the batch no interventions
    that exchange latents.
    """

    question: Question
    answers: dict[str, str]
    looks: dict[str, tuple[bool, float]]
    steps: dict[str, list[bool]]

    def correct(self, way: str) -> bool:
        """Whether an answer is right."""
        return self.answers[way] == self.question.answer


def evaluate_glyphsearch(
    model: VReflectionForConditionalGeneration,
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
    """Asks one question about each of a split's first scenes: unchanged, without latents, and with other latents.

    Args:
        model (`VReflectionForConditionalGeneration`): The model.
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
    for first in tqdm(range(0, limit, batch_size), desc="glyphsearch", unit="batch"):
        drawn = [draw_question(split, index, difficulty) for index in range(limit)[first : first + batch_size]]
        generator = torch.Generator().manual_seed(first)
        samples += answer_batch(model, processor, drawn, options, interventions, generator)
    return {
        "data": describe_scenes(split, difficulty, limit),
        "decoding": {"method": "greedy", "batch_size": batch_size, **options},
        **summarise_glyphsearch(samples),
    }


def describe_scenes(split: str, difficulty: str, count: int) -> dict:
    """Which scenes were asked about: the first ones of a split."""
    return {
        "split": split,
        "difficulty": difficulty,
        "first_scene": 0,
        "count": count,
        "first_seed": scene_seed(split, 0),
        "last_seed": scene_seed(split, count - 1),
        "chance": 1 / len(GLYPHS),
    }


def answer_batch(
    model: VReflectionForConditionalGeneration,
    processor: VReflectionProcessor,
    drawn: list[tuple[Scene, Question]],
    options: dict,
    interventions: Sequence[str],
    generator: torch.Generator,
) -> list[Sample]:
    """Asks a batch of questions in all ways."""
    scenes, questions = zip(*drawn)
    limit = {"max_new_tokens": (options.get("max_reflections") or 1) * (options["latent_steps"] + 2) + ANSWER_TOKENS}

    def encode(scene_rows: list[int], question_rows: list[int]) -> dict:
        pairs = zip(scene_rows, question_rows)
        turns = [user_turn([scenes[scene].image], questions[question].text) for scene, question in pairs]
        return encode_prompts(processor, turns, model.device)

    def generate(inputs: dict, **options) -> tuple[torch.LongTensor, torch.Tensor]:
        result = model.generate(**inputs, **GREEDY, **limit, **options, return_dict_in_generate=True)
        return result.sequences[:, inputs["input_ids"].shape[1] :], result.latents

    def decode(tokens: torch.LongTensor, rows: list[int]) -> dict[int, str]:
        return dict(zip(rows, answer_texts(processor, tokens)))

    all_rows = list(range(len(drawn)))
    inputs = encode(all_rows, all_rows)
    tokens, latents, reflections = generate_and_look(model, inputs, offered_sources(model.config), **options, **limit)
    first = first_latents(latents, tokens, model.config)
    answers = {UNCHANGED: decode(tokens, all_rows)}
    answers[WITHOUT_LATENTS] = decode(generate(inputs, latent_steps=0)[0], all_rows)

    # Interventions are made among the rows that reflect, so that only latents are exchanged.
    rows = list(first)
    if rows and interventions:
        tokens, latents = generate(encode(rows[1:] + rows[:1], rows), **options | ALWAYS)
        own = stack_latents(first, options["latent_steps"])
        others = stack_latents(first_latents(latents, tokens, model.config), options["latent_steps"])
        exchanged = {"shuffled": own.roll(1, 0), "other_picture": others}
        inputs = encode(rows, rows)
        for name in interventions:
            # Every reflection of an answer is fed the same.
            replaced = replace_latents(name, own, model, exchanged.get(name), generator).repeat(
                1, limit["max_new_tokens"], 1
            )
            tokens, _ = generate(inputs, **options, latents=replaced)
            answers[name] = {} if name in EXCHANGED and len(rows) == 1 else decode(tokens, rows)
    return [
        Sample(
            question=question,
            answers={way: given[row] for way, given in answers.items() if row in given},
            looks=compare_with_box(reflections[row][0], question.target.box) if reflections[row] else {},
            steps=look_by_step(reflections[row][0], [item.box for item in question.path]) if reflections[row] else {},
        )
        for row, question in enumerate(questions)
    ]


def stack_latents(latents: dict[int, torch.Tensor], steps: int) -> torch.Tensor:
    """The latents of all rows (B, S, D)."""
    return torch.stack([fit_steps(own, steps) for own in latents.values()])


def compare_with_box(reflection: Reflection, box: tuple[float, float, float, float]) -> dict[str, tuple[bool, float]]:
    """Compares a reflection's mean map over its steps (h, w) with the box of the shape that is asked for.

    For each source of attention: whether the map is largest at a patch whose centre lies in the box, and the share of the
    map at such patches.
    """
    looks = {}
    for source, (maps, *_) in reflection.maps.items():
        mean = maps.mean(0)
        inside = patches_inside(box, *mean.shape)
        looks[source] = bool(inside.flatten()[mean.argmax()]), float(mean[inside].sum() / mean.sum())
    return looks


def look_by_step(reflection: Reflection, path: Sequence[tuple[float, float, float, float]]) -> dict[str, list[bool]]:
    """Compares each step's map of a reflection with the box of that step: of K boxes step k has the k-th, all later ones the last.

    For each source of attention and step: whether the map is largest at a patch whose centre lies in the step's box.
    """
    return {
        source: [
            bool(patches_inside(path[min(step, len(path) - 1)], *look.shape).flatten()[look.argmax()])
            for step, look in enumerate(maps)
        ]
        for source, (maps, *_) in reflection.maps.items()
    }


def patches_inside(box: tuple[float, float, float, float], height: int, width: int) -> torch.BoolTensor:
    """Which of a picture's merged patches (h, w) have their centres in a box."""
    x0, y0, x1, y1 = box
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return ((y0 <= y) & (y < y1))[:, None] & ((x0 <= x) & (x < x1))


def summarise_glyphsearch(samples: list[Sample]) -> dict:
    """The results over all samples; an intervention's beside those of the same questions without it."""
    looks = [sample.looks for sample in samples if sample.looks]
    sources = tuple(looks[0]) if looks else ()
    ways = dict.fromkeys(way for sample in samples for way in sample.answers)
    boxes = [sample.question.target.box for sample in samples]
    interventions = {}
    for way in ways:
        if way in INTERVENTIONS:
            asked = [sample for sample in samples if way in sample.answers]
            interventions[way] = {
                "accuracy": accuracy_by_kind(asked, way),
                "usual_accuracy_of_the_same": accuracy_by_kind(asked, UNCHANGED),
                "changed": proportion([sample.answers[way] != sample.answers[UNCHANGED] for sample in asked]),
            }
    return {
        "accuracy": accuracy_by_kind(samples, UNCHANGED),
        "reflection_rate": proportion([bool(sample.looks) for sample in samples]),
        "without_latents": {"latent_steps": 0, "accuracy": accuracy_by_kind(samples, WITHOUT_LATENTS)},
        "interventions": interventions,
        "pointing": {source: proportion([look[source][0] for look in looks]) for source in sources},
        "pointing_by_step": {
            source: pointing_by_step([sample.steps[source] for sample in samples if sample.steps])
            for source in sources
        },
        "attention_inside_box": {source: round(fmean(look[source][1] for look in looks), 4) for source in sources},
        "mean_box_area": round(fmean((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes), 4),
        # One character a scene, for paired comparisons: right, wrong, or not asked in this way.
        "outcomes": {
            way: "".join(str(int(sample.correct(way))) if way in sample.answers else "-" for sample in samples)
            for way in ways
        },
    }


def replacements_of(result: dict) -> dict[str, dict]:
    """What each intervention of a result cost, as [`latents_sentence`](dependence.py) takes it: read off the paired outcomes."""
    replacements = {}
    for way, measured in result["interventions"].items():
        pairs = zip(result["outcomes"][UNCHANGED], result["outcomes"][way])
        usual, replaced = zip(*((one == "1", other == "1") for one, other in pairs if other != "-"))
        replacements[way] = {
            "accuracy": proportion(replaced),
            "usual_accuracy_of_the_same": proportion(usual),
            "changed": measured["changed"],
            "difference": paired_difference(usual, replaced),
        }
    return replacements


def accuracy_by_kind(samples: list[Sample], way: str) -> dict[str, dict]:
    """How many answers are right over all samples, and over each kind of question that there is; chains also by hops."""
    kinds: dict[str, list[bool]] = {}
    for sample in sorted(samples, key=lambda sample: (KINDS.index(sample.question.kind), sample.question.hops)):
        kind = sample.question.kind
        name = f"{kind} {sample.question.hops}" if kind in CHAIN_KINDS else kind
        kinds.setdefault(name, []).append(sample.correct(way))
    overall = [sample.correct(way) for sample in samples]
    return {name: proportion(outcomes) for name, outcomes in {"overall": overall, **kinds}.items()}


def pointing_by_step(looks: list[list[bool]]) -> dict[str, dict]:
    """How many looks lie inside their step's box, by the number of the step from 1 on, and of the last step of all answers."""
    by_step = {
        str(step + 1): [look[step] for look in looks if step < len(look)] for step in range(max(map(len, looks)))
    }
    return {name: proportion(inside) for name, inside in {**by_step, "last": [look[-1] for look in looks]}.items()}
