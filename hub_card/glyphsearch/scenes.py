"""GlyphSearch's scenes: a picture of coloured shapes with a glyph on each, a pure function of a seed and a difficulty."""

import random
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from .chains import RELATIONS, Cell, Name, find_chains, neighbour


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

SPLITS = ("train", "validation", "test")
SPLIT_SIZE = 2**40

BACKGROUND = (236, 236, 232)
CLUTTER = (188, 188, 184)
INK = (16, 16, 16)
MOST_TRIES = 10_000


@dataclass(frozen=True)
class Difficulty:
    """How hard a scene is to search; sizes are in pixels.

    A shape stands anywhere inside its cell. Where no colour comes twice, finding a shape takes one feature instead of the
    conjunction of two.
    """

    grid: int = 3  # cells a side
    cell: int = 56
    min_objects: int = 4
    max_objects: int = 8  # at most `grid**2`, and 8 with distinct colours
    extent: int = 48  # width and height of a shape
    glyph_cell: int = 6  # of the 5 x 5 cells of a glyph
    distinct_colours: bool = True
    colours: int = len(COLOURS)  # of a scene's shapes, at most
    distinct_glyphs: bool = False
    clutter: int = 0  # grey strokes under the shapes
    relation_share: float = 0.0  # of the questions; the others are attribute questions
    # The longest chains of each kind, by `CHAIN_KINDS`, in hops; with these all questions ask for chains.
    chains: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def image_size(self) -> int:
        """Side of the picture, in pixels."""
        return self.grid * self.cell


CHAIN_SCENES = {
    "min_objects": 6,
    "max_objects": 9,
    "distinct_colours": False,
    "colours": 6,
    "distinct_glyphs": True,
}
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
    "chains": Difficulty(**CHAIN_SCENES, chains={"kinship": 3, "spatial": 2}),
    # Nine shapes fill the grid, and then no spatial chain has three hops.
    "longer_chains": Difficulty(**CHAIN_SCENES | {"max_objects": 8}, chains={"kinship": 4, "spatial": 3}),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene."""

    colour: str
    shape: str
    glyph: str
    cell: tuple[int, int]  # row and column
    pixel_box: tuple[int, int, int, int]  # tight, x0, y0, x1, y1, the high corner exclusive
    box: tuple[float, float, float, float]  # the same as fractions of the picture

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
    """Draws the scene of a seed, the same every time.

    At least one relation question can be asked about it; or, where the difficulty has chains, the longest of each kind.

    Raises:
        ValueError: A difficulty whose scenes hardly ever hold such chains.
    """
    difficulty = get_difficulty(difficulty)
    rng = random.Random(seed)
    for _ in range(MOST_TRIES):
        cells, names = _draw_cells_and_names(difficulty, rng)
        if all(find_chains(kind, cells, names, hops) for kind, hops in difficulty.chains.items()):
            break
    else:
        raise ValueError(f"None of {MOST_TRIES} scenes holds chains of {difficulty.chains}: ask for shorter ones.")

    image = Image.new("RGB", (difficulty.image_size, difficulty.image_size), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for _ in range(difficulty.clutter):
        x, y = rng.randrange(difficulty.image_size), rng.randrange(difficulty.image_size)
        draw.line((x, y, x + rng.randint(-20, 20), y + rng.randint(-20, 20)), fill=CLUTTER, width=2)

    objects = []
    slack = difficulty.cell - difficulty.extent
    glyphs = rng.sample(list(GLYPHS), len(cells)) if difficulty.distinct_glyphs else None
    for index, ((row, column), (colour, shape)) in enumerate(zip(cells, names)):
        glyph = glyphs[index] if glyphs else rng.choice(list(GLYPHS))
        x = column * difficulty.cell + rng.randint(0, slack)
        y = row * difficulty.cell + rng.randint(0, slack)
        pixel_box = _draw_object(image, x, y, colour, shape, glyph, difficulty)
        box = tuple(corner / difficulty.image_size for corner in pixel_box)
        objects.append(SceneObject(colour, shape, glyph, (row, column), pixel_box, box))
    return Scene(image, tuple(objects), difficulty)


def _draw_cells_and_names(difficulty: Difficulty, rng: random.Random) -> tuple[list[Cell], list[Name]]:
    """Where a scene's shapes stand, with two next to each other, and what they are."""
    count = rng.randint(difficulty.min_objects, difficulty.max_objects)
    all_cells = [(row, column) for row in range(difficulty.grid) for column in range(difficulty.grid)]
    cells = rng.sample(all_cells, count)
    while not any(neighbour(cell, cells, relation) for cell in cells for relation in RELATIONS):
        cells = rng.sample(all_cells, count)
    colours = list(COLOURS) if difficulty.colours == len(COLOURS) else rng.sample(list(COLOURS), difficulty.colours)
    if difficulty.distinct_colours:
        return cells, [(colour, rng.choice(SHAPES)) for colour in rng.sample(colours, count)]
    return cells, rng.sample([(colour, shape) for colour in colours for shape in SHAPES], count)


def _draw_object(
    image: Image.Image, x: int, y: int, colour: str, shape: str, glyph: str, difficulty: Difficulty
) -> tuple[int, int, int, int]:
    """Draws a shape with its low corner at (x, y), and its glyph; returns the tight box in pixels."""
    extent = difficulty.extent
    form = Image.new("1", (extent, extent))
    draw = ImageDraw.Draw(form)
    last, third = extent - 1, extent // 4
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=1)
    elif shape == "square":
        inset = third // 4
        draw.rectangle((inset, inset, last - inset, last - inset), fill=1)
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
