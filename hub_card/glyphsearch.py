"""GlyphSearch: seeded scenes of coloured shapes, each with a glyph on it, and questions whose region is known exactly.

A scene is a square picture divided into cells. Some cells hold one shape, somewhere inside the cell, with a letter on
it. A question names one shape, by its colour and form or by what it stands next to; the answer is the letter, and the
box is the shape's own. Everything is a pure function of `(split, index, difficulty)`: no files, no fonts.

Examples:

```python
>>> scene = make_scene(scene_seed("test", 0))
>>> questions(scene)[0].text
'Which glyph is on the blue circle?'

>>> dataset = glyphsearch_dataset("train", 100_000)  # nothing is drawn yet
>>> dataset[0]["messages"][1]["content"]
[{'type': 'reflection', 'box': [0.68..., 0.38..., 0.97..., 0.66...], 'image_index': 0}, {'type': 'text', 'text': 'Z'}]
```
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw


if TYPE_CHECKING:
    from datasets import Dataset

COLOURS = {
    "red": (226, 58, 52),
    "orange": (245, 146, 40),
    "yellow": (248, 222, 66),
    "green": (64, 178, 84),
    "blue": (72, 132, 238),
    "purple": (172, 96, 214),
    "pink": (250, 150, 200),
    "brown": (150, 98, 52),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")

# 5 x 5 bitmaps instead of a font, so that a scene is the same on every machine. Of all sets of ten letters this one is
# among those whose closest pair differs most (7 of 25 cells).
GLYPHS = {
    "A": "01110 10001 11111 10001 10001",
    "D": "11110 10001 10001 10001 11110",
    "J": "00001 00001 00001 10001 01110",
    "L": "10000 10000 10000 10000 11111",
    "N": "10001 11001 10101 10011 10001",
    "S": "01111 10000 01110 00001 11110",
    "T": "11111 00100 00100 00100 00100",
    "V": "10001 10001 10001 01010 00100",
    "X": "10001 01010 00100 01010 10001",
    "Z": "11111 00010 00100 01000 11111",
}

# Where the answer lies, seen from the shape that the question names: (rows down, columns right).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

SPLITS = ("train", "validation", "test")
SPLIT_SIZE = 2**40

BACKGROUND = (236, 236, 232)
CLUTTER = (188, 188, 184)
INK = (16, 16, 16)

DESCRIBE = "What is this?"

RowFunction = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Difficulty:
    """How hard a scene is to search.

    Args:
        grid (`int`): Cells a side; the picture is `grid * cell` pixels wide and high.
        cell (`int`): Side of a cell, in pixels.
        min_objects (`int`): Fewest shapes in a scene.
        max_objects (`int`): Most shapes in a scene, at most `grid**2`.
        extent (`int`): Width and height of a shape, in pixels. It stands anywhere inside its cell, so that the slack
            `cell - extent` is the range of its jitter.
        glyph_cell (`int`): Side of one of the 5 x 5 cells of a glyph, in pixels.
        distinct_colours (`bool`): Whether no colour comes twice in a scene, so that finding a shape takes one feature
            instead of the conjunction of two; `max_objects` is at most 8 then.
        clutter (`int`): Grey strokes drawn under the shapes.
        relation_share (`float`): Share of relation questions; the others are attribute questions.
    """

    grid: int = 3
    cell: int = 56
    min_objects: int = 4
    max_objects: int = 8
    extent: int = 48
    glyph_cell: int = 6
    distinct_colours: bool = True
    clutter: int = 0
    relation_share: float = 0.0

    @property
    def image_size(self) -> int:
        """Side of the picture, in pixels."""
        return self.grid * self.cell


DIFFICULTIES = {
    "easy": Difficulty(max_objects=5),
    "default": Difficulty(),
    "mixed": Difficulty(relation_share=0.25),
    "study": Difficulty(min_objects=6, max_objects=9, distinct_colours=False, relation_share=0.25),
    "hard": Difficulty(
        grid=4,
        min_objects=8,
        max_objects=12,
        extent=40,
        glyph_cell=4,
        distinct_colours=False,
        clutter=24,
        relation_share=0.5,
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Args:
        colour (`str`): A key of `COLOURS`.
        shape (`str`): One of `SHAPES`.
        glyph (`str`): A key of `GLYPHS`.
        cell (`tuple[int, int]`): Row and column.
        pixel_box (`tuple[int, int, int, int]`): The tight box of what is drawn, in pixels, high corner exclusive.
        box (`tuple[float, float, float, float]`): The same box as fractions of the picture: x0, y0, x1, y1.
    """

    colour: str
    shape: str
    glyph: str
    cell: tuple[int, int]
    pixel_box: tuple[int, int, int, int]
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """What a question calls it, e.g. `"red triangle"`; unique in its scene."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; `objects` in random order."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    difficulty: Difficulty


@dataclass(frozen=True)
class Question:
    """A question with its only right answer.

    Args:
        kind (`str`): `"attribute"` or `"relation"`.
        text (`str`): The question.
        answer (`str`): The glyph.
        target (`SceneObject`): The shape that carries the glyph; its box is where to look.
    """

    kind: str
    text: str
    answer: str
    target: SceneObject


def get_difficulty(difficulty: str | Difficulty) -> Difficulty:
    """Returns the preset of that name, or the difficulty itself."""
    if isinstance(difficulty, Difficulty):
        return difficulty
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"Unknown difficulty {difficulty!r}; choose one of {', '.join(DIFFICULTIES)}.")
    return DIFFICULTIES[difficulty]


def scene_seed(split: str, index: int) -> int:
    """Maps a split and an index to a seed; the ranges of the splits are disjoint."""
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; choose one of {', '.join(SPLITS)}.")
    if not 0 <= index < SPLIT_SIZE:
        raise ValueError(f"index must lie in [0, {SPLIT_SIZE}), got {index}.")
    return SPLITS.index(split) * SPLIT_SIZE + index


def make_scene(seed: int, difficulty: str | Difficulty = "default") -> Scene:
    """Draws the scene of a seed, the same every time; at least one relation question can be asked about it."""
    difficulty = get_difficulty(difficulty)
    rng = random.Random(seed)
    count = rng.randint(difficulty.min_objects, difficulty.max_objects)
    all_cells = [(row, column) for row in range(difficulty.grid) for column in range(difficulty.grid)]
    cells = rng.sample(all_cells, count)
    while not any(_neighbour(cell, cells, relation) for cell in cells for relation in RELATIONS):
        cells = rng.sample(all_cells, count)
    if difficulty.distinct_colours:
        names = [(colour, rng.choice(SHAPES)) for colour in rng.sample(list(COLOURS), count)]
    else:
        names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)

    image = Image.new("RGB", (difficulty.image_size, difficulty.image_size), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for _ in range(difficulty.clutter):
        x, y = rng.randrange(difficulty.image_size), rng.randrange(difficulty.image_size)
        draw.line((x, y, x + rng.randint(-20, 20), y + rng.randint(-20, 20)), fill=CLUTTER, width=2)

    objects = []
    slack = difficulty.cell - difficulty.extent
    for (row, column), (colour, shape) in zip(cells, names):
        glyph = rng.choice(list(GLYPHS))
        x = column * difficulty.cell + rng.randint(0, slack)
        y = row * difficulty.cell + rng.randint(0, slack)
        pixel_box = _draw_object(image, x, y, colour, shape, glyph, difficulty)
        box = tuple(corner / difficulty.image_size for corner in pixel_box)
        objects.append(SceneObject(colour, shape, glyph, (row, column), pixel_box, box))
    return Scene(image, tuple(objects), difficulty)


def questions(scene: Scene) -> list[Question]:
    """Returns every question that has one right answer: first one attribute question an object, then the relations.

    A relation is asked only where it can be read in one way: on that side of the named shape, its row or column holds
    exactly one other shape, and that shape is the next one.
    """
    asked = [
        Question("attribute", f"Which glyph is on the {target.name}?", target.glyph, target)
        for target in scene.objects
    ]
    by_cell = {item.cell: item for item in scene.objects}
    for anchor in scene.objects:
        for relation in RELATIONS:
            cell = _neighbour(anchor.cell, by_cell, relation)
            if cell is not None:
                target = by_cell[cell]
                text = f"Which glyph is on the shape {relation} the {anchor.name}?"
                asked.append(Question("relation", text, target.glyph, target))
    return asked


def choose_questions(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Draws `count` different questions, or all where there are fewer, with the difficulty's share of relations."""
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


def draw_question(split: str, index: int, difficulty: str | Difficulty = "default") -> tuple[Scene, Question]:
    """The scene of an index and the question that [`glyphsearch_dataset`] asks about it."""
    seed = scene_seed(split, index)
    scene = make_scene(seed, difficulty)
    return scene, choose_questions(scene, 1, _questions_stream(seed))[0]


def glyphsearch_dataset(
    split: str,
    count: int,
    difficulty: str | Difficulty = "default",
    reflection: bool = True,
    questions_per_scene: int = 1,
    start: int = 0,
) -> "Dataset":
    """A dataset of scenes in the project's message format, drawn when they are read.

    Args:
        split (`str`): One of `SPLITS`.
        count (`int`): Rows, one scene each.
        difficulty (`str` or `Difficulty`): A preset's name, or a difficulty.
        reflection (`bool`): Whether every answer begins with the target's box.
        questions_per_scene (`int`): Turns of a row's conversation; fewer where a scene allows no more.
        start (`int`): Index of the first scene in its split.

    Returns:
        `Dataset`: Rows of `id`, `images` (one picture) and `messages`.
    """
    row = partial(
        scene_row,
        split=split,
        difficulty=get_difficulty(difficulty),
        reflection=reflection,
        questions_per_scene=questions_per_scene,
    )
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
        crops (`int`): Rows of the first part: one scene each, one turn and one picture for each of its objects.
        lists (`int`): Rows of the second part: one scene each, one turn that names all its objects.
        scenes (`int`): Rows of the third part: one scene each, `questions_per_scene` turns.
        split (`str`): One of `SPLITS`.
        difficulty (`str` or `Difficulty`): A preset's name, or a difficulty.
        questions_per_scene (`int`): Turns of a row of the third part; fewer where a scene allows no more.

    Returns:
        `Dataset`: Rows of `id`, `images` and `messages`.
    """
    options = {"split": split, "difficulty": get_difficulty(difficulty)}
    questions_row = partial(scene_row, reflection=False, questions_per_scene=questions_per_scene, **options)
    parts = [(crops, partial(crops_row, **options)), (lists, partial(list_row, **options)), (scenes, questions_row)]
    return _lazy_dataset(parts)


def scene_row(
    index: int, split: str, difficulty: Difficulty, reflection: bool = True, questions_per_scene: int = 1
) -> dict[str, Any]:
    """One scene and a conversation about it, as a row."""
    seed = scene_seed(split, index)
    scene = make_scene(seed, difficulty)
    messages = []
    for question in choose_questions(scene, questions_per_scene, _questions_stream(seed)):
        content = [{"type": "text", "text": question.text}]
        if not messages:
            content.insert(0, {"type": "image"})
        answer = [{"type": "text", "text": question.answer}]
        if reflection:
            answer.insert(0, {"type": "reflection", "box": list(question.target.box), "image_index": 0})
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


def _questions_stream(seed: int) -> random.Random:
    """The questions have a random stream of their own: how many are asked doesn't change the picture."""
    return random.Random(f"questions {seed}")


def _description(objects: Sequence[SceneObject]) -> list[dict[str, Any]]:
    """A turn that shows a picture and names the objects in it, each with its glyph.

    Names and glyphs are the same tokens as in questions and answers: after "the", and alone on a line.
    """
    answer = "\n".join(f"the {item.name}\n{item.glyph}" for item in objects)
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": DESCRIBE}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _neighbour(cell: tuple[int, int], occupied: Iterable[tuple[int, int]], relation: str) -> tuple[int, int] | None:
    """The occupied cell next to `cell`, if it is the only one on that side of it in its row or column."""
    down, right = RELATIONS[relation]
    row, column = cell
    on_that_side = [
        (other_row, other_column)
        for other_row, other_column in occupied
        if ((other_row - row) * down + (other_column - column) * right > 0)
        and (other_column == column if down else other_row == row)
    ]
    return (row + down, column + right) if on_that_side == [(row + down, column + right)] else None


def _draw_object(
    image: Image.Image, x: int, y: int, colour: str, shape: str, glyph: str, difficulty: Difficulty
) -> tuple[int, int, int, int]:
    """Draws a shape of `extent` pixels with its low corner at (x, y), and its glyph; returns the tight box in pixels."""
    extent = difficulty.extent
    form = Image.new("1", (extent, extent))
    draw = ImageDraw.Draw(form)
    last, third = extent - 1, extent // 4
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=1)
    elif shape == "square":
        draw.rectangle((third // 4, third // 4, last - third // 4, last - third // 4), fill=1)
    elif shape == "triangle":
        draw.polygon([(0, last), (last, last), (last / 2, 0)], fill=1)
    elif shape == "diamond":
        draw.polygon([(last / 2, 0), (last, last / 2), (last / 2, last), (0, last / 2)], fill=1)
    elif shape == "cross":
        draw.rectangle((0, third, last, last - third), fill=1)
        draw.rectangle((third, 0, last - third, last), fill=1)

    size = 5 * difficulty.glyph_cell
    bitmap = Image.new("1", (5, 5))
    bitmap.putdata([int(bit) for bit in GLYPHS[glyph].replace(" ", "")])
    letter = bitmap.resize((size, size), Image.Resampling.NEAREST)
    # A triangle is widest at its base, so its letter stands lower.
    left = (extent - size) // 2
    top = last - size - extent // 16 if shape == "triangle" else left

    image.paste(COLOURS[colour], (x, y), form)
    image.paste(INK, (x + left, y + top), letter)
    form.paste(1, (left, top), letter)
    x0, y0, x1, y1 = form.getbbox()
    return x + x0, y + y0, x + x1, y + y1


def _lazy_dataset(parts: list[tuple[int, RowFunction]], start: int = 0) -> "Dataset":
    """A dataset that stores indices and draws rows as they are read: drawing 100,000 of them ahead takes minutes.

    `parts` holds, in order, how many rows to draw by which function.
    """
    from datasets import Dataset  # not everything that draws scenes has it

    part = [number for number, (count, _) in enumerate(parts) for _ in range(count)]
    rows = Dataset.from_dict({"index": range(start, start + len(part)), "part": part})
    return rows.with_transform(partial(_draw_rows, functions=[function for _, function in parts]))


def _draw_rows(batch: dict[str, list[int]], functions: list[RowFunction]) -> dict[str, list[Any]]:
    """Turns a batch of stored numbers into columns."""
    rows = [functions[part](index) for index, part in zip(batch["index"], batch["part"])]
    return {key: [row[key] for row in rows] for key in ("id", "images", "messages")}
