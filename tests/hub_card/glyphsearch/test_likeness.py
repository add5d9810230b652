"""Which pictures get a note beside the embedded model's answer."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from vreflection_hub_card.glyphsearch import DIFFICULTIES, make_scene
from vreflection_hub_card.glyphsearch.likeness import NOTE, unlike_note


def jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES = {
    "as drawn": lambda scene: scene,
    "jpeg 50": lambda scene: jpeg(scene, 50),
    "halved": lambda scene: scene.resize((84, 84), Image.Resampling.BICUBIC),
    "enlarged": lambda scene: scene.resize((700, 500), Image.Resampling.LANCZOS),
    "reduced, jpeg 75": lambda scene: jpeg(scene.resize((112, 112), Image.Resampling.BILINEAR), 75),
    "64 colours": lambda scene: scene.quantize(64),
}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_scenes_get_none(difficulty):
    for name, change in CHANGES.items():
        for seed in range(2):
            assert unlike_note(change(make_scene(seed, difficulty).image)) is None, (name, seed)


def photo():
    """Patches of every size with noise, in colours of skin, leaves and sky."""
    rng = np.random.default_rng(0)
    picture = np.zeros((192, 256, 3))
    for cells in (2, 4, 16, 64):
        colours = rng.uniform((90, 80, 60), (220, 200, 190), (cells, cells, 3)).astype(np.uint8)
        picture += np.asarray(Image.fromarray(colours).resize((256, 192), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray((picture + rng.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8))


def chart(style):
    with plt.style.context(style):
        figure, axes = plt.subplots()
        axes.bar(range(5), [3, 5, 2, 4, 1])
        file = io.BytesIO()
        figure.savefig(file)
        plt.close(figure)
    return Image.open(file)


@pytest.mark.parametrize(
    "draw",
    [
        photo,
        lambda: Image.new("RGB", (200, 200), "white"),
        lambda: Image.new("L", (200, 200)),
        lambda: Image.new("RGB", (200, 200), (236, 236, 232)),  # a scene without shapes
        lambda: chart("default"),
        lambda: chart("ggplot"),  # which has a scene's grey and its red
        lambda: Image.new("RGB", (1, 3000), "grey"),
    ],
    ids=["photo", "white", "black", "empty", "chart", "grey chart", "line"],
)
def test_other_pictures_get_it(draw):
    assert unlike_note(draw()) == NOTE
