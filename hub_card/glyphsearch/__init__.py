# ruff: noqa: F401  these imports are what the package offers
"""GlyphSearch: seeded scenes of coloured shapes, each with a glyph on it, and questions whose region is known exactly.

A scene is a square picture divided into cells. Some cells hold one shape, somewhere inside the cell, with a letter on
it. A question names one shape and may lead on from there, to what it stands next to or to what shares its colour or
form; the answer is the letter of the last shape, and the boxes of the shapes on the way are the path of a reflection.
Everything is a pure function of `(split, index, difficulty)`: no files, no fonts.

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

from .chains import CHAIN_KINDS, KINSHIP, RELATIONS
from .questions import (
    DESCRIBE,
    Question,
    chain_questions,
    choose_questions,
    draw_chain,
    draw_question,
    glyphsearch_curriculum,
    glyphsearch_dataset,
    questions,
    scene_row,
)
from .scenes import (
    BACKGROUND,
    CLUTTER,
    COLOURS,
    DIFFICULTIES,
    GLYPHS,
    SHAPES,
    SPLIT_SIZE,
    SPLITS,
    Difficulty,
    Scene,
    SceneObject,
    get_difficulty,
    make_scene,
    scene_seed,
)
