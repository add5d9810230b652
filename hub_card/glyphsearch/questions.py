"""GlyphSearch's questions about a scene, and its data sets of rows."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .chains import CHAIN_KINDS, RELATIONS, chain_text, find_chains, neighbour
from .scenes import Difficulty, Scene, SceneObject, get_difficulty, make_scene, scene_seed


if TYPE_CHECKING:
    from datasets import Dataset

DESCRIBE = "What is this?"

RowFunction = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question with its only right answer, the glyph of the last shape of its path.

    The path leads from the shape that the question names to the one that it asks for: where to look, in this order.
    """

    kind: str  # "attribute", "relation", "kinship" or "spatial"
    text: str
    path: tuple[SceneObject, ...]

    @property
    def target(self) -> SceneObject:
        """The shape that the question asks for."""
        return self.path[-1]

    @property
    def answer(self) -> str:
        """The target's glyph."""
        return self.target.glyph

    @property
    def hops(self) -> int:
        """How many steps lead from the shape that the question names to the target."""
        return len(self.path) - 1


def questions(scene: Scene) -> list[Question]:
    """Returns every question that has one right answer: first one attribute question an object, then the relations.

    A relation is asked only where it can be read in one way: on that side of the named shape, its row or column holds
    exactly one other shape, and that shape is the next one.
    """
    asked = [Question("attribute", chain_text((), target.name), (target,)) for target in scene.objects]
    by_cell = {item.cell: item for item in scene.objects}
    for anchor in scene.objects:
        for relation in RELATIONS:
            cell = neighbour(anchor.cell, by_cell, relation)
            if cell is not None:
                text = chain_text((relation,), anchor.name)
                asked.append(Question("relation", text, (anchor, by_cell[cell])))
    return asked


def chain_questions(scene: Scene, kind: str, hops: int, longest: int | None = None) -> list[Question]:
    """Returns every question for the end of a chain.

    Args:
        scene (`Scene`): The scene.
        kind (`str`): `"kinship"` or `"spatial"`.
        hops (`int`): The chain's length; 0 asks for a shape by its name.
        longest (`int`, *optional*): Only shapes at the end of some chain of so many hops are asked for. With the same
            `longest`, questions of all lengths up to it ask for the same shapes.
    """
    cells = [item.cell for item in scene.objects]
    names = [(item.colour, item.shape) for item in scene.objects]
    chains = find_chains(kind, cells, names, hops)
    if longest is not None:
        ends = {path[-1] for _, path in find_chains(kind, cells, names, longest)}
        chains = [(words, path) for words, path in chains if path[-1] in ends]
    return [
        Question(kind, chain_text(words, scene.objects[path[0]].name), tuple(scene.objects[index] for index in path))
        for words, path in chains
    ]


def choose_questions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Draws `count` different questions, or all where there are fewer: those that the scene's difficulty asks for."""
    choose = _choose_chains if scene.difficulty.chains else _choose_attributes_and_relations
    return choose(scene, count, rng)


def _choose_attributes_and_relations(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Draws questions with the difficulty's share of relations."""
    asked = questions(scene)
    rng.shuffle(asked)
    attributes = [question for question in asked if question.kind == "attribute"]
    relations = [question for question in asked if question.kind == "relation"]
    chosen = []
    while len(chosen) < min(count, len(asked)):
        relation = rng.random() < scene.difficulty.relation_share
        first, second = (relations, attributes) if relation else (attributes, relations)
        chosen.append((first or second).pop())
    return chosen


def _choose_chains(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Draws from each kind and length in turn, in random order: first the shape to ask for, then a chain that ends there.

    Each shape at the end of one of the longest chains of a kind is asked for as often as any other, at every length: of one
    kind, the place of the answer is independent of the question's length.
    """
    pools = [
        _by_target(chain_questions(scene, kind, hops, longest))
        for kind, longest in scene.difficulty.chains.items()
        for hops in range(longest + 1)
    ]
    chosen = {}  # by text: without a hop, both kinds ask the same
    while len(chosen) < count and any(pools):
        for pool in rng.sample(pools, len(pools)):
            if pool and len(chosen) < count:
                target = rng.choice(list(pool))
                question = pool[target].pop(rng.randrange(len(pool[target])))
                if not pool[target]:
                    del pool[target]
                chosen.setdefault(question.text, question)
    return list(chosen.values())


def _by_target(asked: Sequence[Question]) -> dict[SceneObject, list[Question]]:
    """Questions by the shape that they ask for."""
    grouped = {}
    for question in asked:
        grouped.setdefault(question.target, []).append(question)
    return grouped


def draw_question(split: str, index: int, difficulty: str | Difficulty = "default") -> tuple[Scene, Question]:
    """The scene of an index and the question that [`glyphsearch_dataset`] asks about it."""
    scene, (question,) = _draw_questions(split, index, difficulty, 1)
    return scene, question


def draw_chain(split: str, index: int) -> tuple[Scene, Question]:
    """The scene of an index with difficulty `"chains"`, and a question of two hops, by kinship or by place."""
    seed = scene_seed(split, index)
    scene = make_scene(seed, "chains")
    rng = random.Random(f"chain {seed}")
    return scene, rng.choice(chain_questions(scene, rng.choice(CHAIN_KINDS), hops=2))


def _draw_questions(split: str, index: int, difficulty: str | Difficulty, count: int) -> tuple[Scene, list[Question]]:
    """A scene and questions about it; their own random stream keeps the picture the same, however many are asked."""
    seed = scene_seed(split, index)
    scene = make_scene(seed, difficulty)
    return scene, choose_questions(scene, count, random.Random(f"questions {seed}"))


def glyphsearch_dataset(
    split: str,
    count: int,
    difficulty: str | Difficulty = "default",
    reflection: bool = True,
    questions_per_scene: int = 1,
    start: int = 0,
    paths: bool = True,
) -> "Dataset":
    """A dataset of scenes in the project's message format, drawn when they are read.

    Args:
        split (`str`): One of `SPLITS`.
        count (`int`): Rows, one scene each.
        difficulty (`str` or `Difficulty`): A preset's name, or a difficulty.
        reflection (`bool`): Whether every answer begins with a reflection.
        questions_per_scene (`int`): Turns of a row's conversation; fewer where a scene allows no more.
        start (`int`): Index of the first scene in its split.
        paths (`bool`): Whether a reflection has the boxes of the question's path, where that has several shapes, as
            `boxes`. Otherwise it has the target's alone, as in the paper.

    Returns:
        `Dataset`: Rows of `id`, `images` (one picture) and `messages`.
    """
    options = {"split": split, "difficulty": get_difficulty(difficulty)}
    options |= {"reflection": reflection, "questions_per_scene": questions_per_scene, "paths": paths}
    row = partial(scene_row, **options)
    return _lazy_dataset([(count, row)], start)


def glyphsearch_curriculum(
    crops: int,
    lists: int,
    scenes: int,
    split: str = "train",
    difficulty: str | Difficulty = "default",
    questions_per_scene: int = 12,
) -> "Dataset":
    """A dataset that teaches an untrained model to see, if it is read in order; no row holds a reflection.

    A model that starts from nothing learns nothing from answers alone. Crops teach it colours, forms and glyphs, with
    nothing to search for. Lists name what is in a whole scene, in random order, so that each word of a name is a query
    whose answer is the next word: the model learns to find. Only then do questions about scenes pay.

    Args:
        crops, lists, scenes (`int`): Rows of each part, one scene each. A row of crops has a turn and a picture for each
            object, a row of lists one turn that names all, and a row of scenes `questions_per_scene` turns, or all that
            the scene allows.
        split, difficulty: See [`glyphsearch_dataset`].
    """
    options = {"split": split, "difficulty": get_difficulty(difficulty)}
    questions_row = partial(scene_row, reflection=False, questions_per_scene=questions_per_scene, **options)
    parts = [(crops, partial(crops_row, **options)), (lists, partial(list_row, **options)), (scenes, questions_row)]
    return _lazy_dataset(parts)


def scene_row(
    index: int,
    split: str,
    difficulty: Difficulty,
    reflection: bool = True,
    questions_per_scene: int = 1,
    paths: bool = True,
) -> dict[str, Any]:
    """One scene and a conversation about it, as a row."""
    scene, asked = _draw_questions(split, index, difficulty, questions_per_scene)
    messages = []
    for question in asked:
        content = [{"type": "text", "text": question.text}]
        if not messages:
            content.insert(0, {"type": "image"})
        answer = [{"type": "text", "text": question.answer}]
        if reflection:
            boxes = [list(item.box) for item in question.path]
            where = {"boxes": boxes} if paths and question.hops else {"box": boxes[-1]}
            answer.insert(0, {"type": "reflection", **where, "image_index": 0})
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": f"glyphsearch-{split}-{index}", "images": [scene.image], "messages": messages}


def crops_row(index: int, split: str, difficulty: Difficulty) -> dict[str, Any]:
    """One scene, seen cell by cell: a picture and a turn for each object, the answer e.g. `"the red triangle\\nT"`."""
    scene = make_scene(scene_seed(split, index), difficulty)
    images, messages = [], []
    for item in scene.objects:
        x, y = item.cell[1] * difficulty.cell, item.cell[0] * difficulty.cell
        images.append(scene.image.crop((x, y, x + difficulty.cell, y + difficulty.cell)))
        messages += _description([item])
    return {"id": f"glyphsearch-{split}-{index}-crops", "images": images, "messages": messages}


def list_row(index: int, split: str, difficulty: Difficulty) -> dict[str, Any]:
    """One scene and all that is in it, the answer e.g. `"the red triangle\\nT\\nthe blue circle\\nA"`."""
    scene = make_scene(scene_seed(split, index), difficulty)
    messages = _description(scene.objects)
    return {"id": f"glyphsearch-{split}-{index}-list", "images": [scene.image], "messages": messages}


def _description(objects: Sequence[SceneObject]) -> list[dict[str, Any]]:
    """A turn that shows a picture and names the objects in it, each with its glyph.

    Names and glyphs are the same tokens as in questions and answers: after "the", and alone on a line.
    """
    answer = "\n".join(f"the {item.name}\n{item.glyph}" for item in objects)
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _lazy_dataset(parts: list[tuple[int, RowFunction]], start: int = 0) -> "Dataset":
    """A dataset of so many rows by each function, drawn as they are read: drawing 100,000 of them ahead takes minutes."""
    from datasets import Dataset  # not everything that draws scenes has it

    part = [number for number, (count, _) in enumerate(parts) for _ in range(count)]
    rows = Dataset.from_dict({"index": range(start, start + len(part)), "part": part})
    return rows.with_transform(partial(_draw_rows, functions=[function for _, function in parts]))


def _draw_rows(batch: dict[str, list[int]], functions: list[RowFunction]) -> dict[str, list[Any]]:
    """Turns a batch of stored numbers into columns."""
    rows = [functions[part](index) for index, part in zip(batch["index"], batch["part"])]
    return {key: [row[key] for row in rows] for key in ("id", "images", "messages")}
