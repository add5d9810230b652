"""Figures hold what they promise, for odd pictures and texts too."""

import re
from itertools import combinations, product

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.text import Text
from PIL import Image

from vreflection_hub_card.inference.attention_maps import Reflection
from vreflection_hub_card.inference.drawing import BOX_COLOUR, draw_heatmap, save_figure


def reflection(*grids, steps=8, sources=("dac", "llm")):
    maps = {source: [torch.rand(steps, *grid).div(100) for grid in grids] for source in sources}
    return Reflection(steps, maps)


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text)).replace("\n", " ")


@pytest.mark.parametrize("per_step, panels", [(False, 1), (True, 18)])
@pytest.mark.parametrize("size, grid", [((168, 168), (6, 6)), ((8000, 400), (1, 20)), ((30, 900), (30, 1))])
def test_a_panel_for_every_picture_or_map(tmp_path, per_step, panels, size, grid):
    figure = draw_heatmap(
        [Image.new("RGB", size)], [reflection(grid)], "Where?", "There", [(0.1, 0.2, 0.3, 0.9)], per_step
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == panels
    assert all(outlines(axes, BOX_COLOUR) == [(0.1, 0.2)] for axes in shown)  # the box, everywhere
    save_figure(figure, tmp_path / "heatmap.png")
    assert Image.open(tmp_path / "heatmap.png").width > 800
    assert "DAC's attention" in texts(figure)
    if per_step:
        assert "LLM's own attention" in texts(figure)
        assert f"{grid[0]} × {grid[1]} patches" in texts(figure)


def outlines(axes, colour):
    """The upper left corners of outlines in a colour, as fractions of the picture's sides."""
    _, width, height, _ = axes.images[0].get_extent()
    boxes = [box for box in axes.patches if isinstance(box, Rectangle) and to_hex(box.get_edgecolor()) == colour]
    return [pytest.approx((box.get_x() / width, box.get_y() / height)) for box in boxes]


def test_each_step_has_its_own_box_of_a_path():
    path = [(0.0, 0.0, 0.2, 0.2), (0.5, 0.0, 0.7, 0.2), (0.5, 0.5, 0.7, 0.7)]
    sources = {"sources": ("dac",), "steps": 4}
    steps = draw_heatmap(
        [Image.new("RGB", (100, 100))], [reflection((6, 6), **sources)], "Where?", "There", path, True
    )
    first, *others = (axes for axes in steps.axes if axes.images)
    assert [text.get_text() for text in first.texts] == ["1", "2", "3"]
    assert [[box.get_xy() for box in axes.patches] for axes in others] == [[(0, 0)], [(50, 0)], [(50, 50)], [(50, 50)]]


def test_several_pictures_and_reflections_get_a_line_each():
    pictures = [Image.new("RGB", (168, 168)), Image.new("RGB", (140, 84))]
    reflections = [reflection((6, 6), (3, 5), sources=("llm",)) for _ in range(2)]
    figure = draw_heatmap(pictures, reflections, "Where?", "There", per_step=True)
    assert len([axes for axes in figure.axes if axes.images]) == 4 * 9
    assert "reflection 1, picture 2: LLM" in texts(figure)
    assert "DAC" not in texts(figure)


def test_looks_are_numbered_through_and_joined_within_a_picture():
    def looking(*places):
        first, second = torch.zeros(len(places), 5, 5), torch.zeros(len(places), 4, 4)
        for step, (index, row, column) in enumerate(places):
            (first, second)[index][step, row, column] = 1
        return Reflection(len(places), {"dac": [first, second]})

    pictures = [Image.new("RGB", (100, 100)), Image.new("RGB", (80, 80))]
    # There and back, beside it, into the other picture, back; and a second reflection.
    reflections = [
        looking((0, 0, 0), (0, 4, 4), (0, 0, 0), (0, 0, 0), (1, 1, 1), (0, 2, 2)),
        looking((0, 0, 0), (0, 2, 2)),
    ]
    figure = draw_heatmap(pictures, reflections, "Where?", "There")
    first, second = (axes for axes in figure.axes if axes.images)
    assert [text.get_text() for text in first.texts] == ["1, 3, 6", "2", "5, 7"]
    assert [text.get_text() for text in second.texts] == ["4"]
    assert outlines(first, "#ffffff") == [(0, 0), (0.8, 0.8), (0.4, 0.4)]
    arrows = [len([patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]) for axes in (first, second)]
    assert arrows == [3, 0]  # 1 to 2, 2 to 3, and 6 to 7
    assert len({axes.images[1].get_clim() for axes in (first, second)}) == 1  # one scale


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_looks_are_seen_on_dark_and_bright_pictures(shade):
    """Under a look the picture keeps its colour and elsewhere it is veiled; outlines hold white and black."""
    maps = torch.zeros(1, 6, 6)
    maps[0, 2:4, 2:4] = 0.25
    seen = Reflection(1, {"dac": [maps]})
    plain = Image.new("RGB", (120, 120), (shade, shade, shade))
    figure = draw_heatmap([plain], [seen], "Where?", "There")
    axes = next(axes for axes in figure.axes if axes.images)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)

    def at(x, y):
        column, row = axes.transData.transform((x, y))
        return pixels[pixels.shape[0] - 1 - int(row), int(column)]

    assert np.abs(at(70, 70) - shade).max() <= 3  # clear
    veiled = 0.18 * shade + 0.82 * 127.5
    assert np.abs(at(110, 10) - veiled).max() <= 3
    line = np.array([at(x, 50) for x in np.arange(35, 45, 0.2)])  # across the left side of the outline
    assert line.max() > 240 and line.min() < 15


def test_colours_start_at_zero_and_steps_share_their_scale():
    figure = draw_heatmap([Image.new("RGB", (168, 168))], [reflection((6, 6))], "Where?", "There", per_step=True)
    maps = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert len(maps) == 16
    assert {image.get_clim()[0] for image in maps} == {0}
    assert len({image.get_clim()[1] for image in maps}) == 2  # one for each source


@pytest.mark.filterwarnings("error")
def test_any_text_can_be_drawn(tmp_path):
    text = "Is $x_{1$ < 5 € or\n\x1d\x00 not? " * 100
    figure = draw_heatmap([Image.new("RGB", (168, 168))], [reflection((6, 6))], text, "")
    save_figure(figure, tmp_path / "heatmap.png")


LONG = "Which of the words " * 30 + "W" * 400
SIZES = {"square": [(168, 168)], "wide": [(2000, 100)], "tall": [(30, 900)], "many": [(8, 8), (2000, 100), (30, 900)]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "sizes, per_step, steps",
    [
        ("square", False, 1),
        ("many", False, 9),
        ("square", True, 1),
        ("wide", True, 9),
        ("tall", True, 1),
        ("many", True, 1),
    ],
)
def test_texts_are_whole(sizes, per_step, steps):
    pictures = [Image.new("RGB", size) for size in SIZES[sizes]]
    grids = [(max(1, height // 28), max(1, width // 28)) for width, height in SIZES[sizes]]
    seen = reflection(*grids, steps=steps, sources=("llm",))
    figure = draw_heatmap(pictures, [seen] * (2 if sizes == "tall" else 1), LONG, LONG, per_step=per_step)
    letters = "".join(figure.get_suptitle().split())
    assert letters == "→".join(["".join(LONG.split())] * 2)
    assert faults(figure) == []


def faults(figure):
    """Texts that leave the figure, or lie on one another or on another panel."""
    figure.canvas.draw()
    drawn = [(text, text.get_window_extent()) for text in shown_texts(figure)]
    panels = [(axes, axes.get_window_extent()) for axes in figure.axes if axes.images]
    found = [(text, "cut") for text, box in drawn if not overlap(figure.bbox, box) == (box.width, box.height)]
    for (text, box), (other, place) in [*combinations(drawn, 2), *product(drawn, panels)]:
        width, height = overlap(box, place)
        if width > 1 and height > 1 and text not in getattr(other, "texts", ()):
            found.append((text, other))
    return found


def overlap(one, other):
    """Width and height of what two boxes share, in pixels; their own if a box lies within, give or take half a pixel."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return (
        other.width if abs(width - other.width) < 0.5 else width,
        other.height if abs(height - other.height) < 0.5 else height,
    )


def shown_texts(artist):
    for child in artist.get_children():
        if isinstance(child, Text):
            if child.get_text() and child.get_visible():
                yield child
        elif not isinstance(child, Axis) or artist.axison:
            yield from shown_texts(child)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (90, 120, 200)])
@pytest.mark.parametrize("value", [0.0, 1 / 36, 1.0])
def test_a_uniform_map_has_a_colour_of_its_bar(colour, value):
    """In the figure of single steps, whose maps may also be zero in one picture of several."""
    picture = Image.new("RGB", (168, 168), colour)
    uniform = torch.full((1, 6, 6), value) if value < 1 else torch.ones(1, 1, 1)
    figure = draw_heatmap([picture], [Reflection(1, {"dac": [uniform]})], "Where?", "There", per_step=True)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)

    def inside(axes):
        box = axes.get_window_extent().shrunk(0.8, 0.9).extents.round().astype(int)
        return pixels[pixels.shape[0] - box[3] : pixels.shape[0] - box[1], box[0] : box[2]]

    panel = next(axes for axes in figure.axes if len(axes.images) == 2)
    bar = next(axes for axes in figure.findobj(Axes) if axes.get_ylabel() == "% per patch")
    shown = inside(panel).reshape(-1, 3)
    assert np.ptp(shown, axis=0).max() <= 2
    height = bar.get_window_extent().height
    labels = [float(label.get_text()) for label in bar.get_yticklabels()]
    assert labels[0] == 0 and any(label == pytest.approx(100 * value, rel=0.01) for label in labels)
    place = pixels.shape[0] - 1 - bar.transData.transform((0.5, 100 * value))[1]
    rows = np.clip([place - 0.02 * height, place + 0.02 * height], 0, pixels.shape[0]).astype(int)
    left, right = (int(round(bar.transAxes.transform((x, 0))[0])) for x in (0.2, 0.8))
    beside = pixels[rows[0] : rows[1] + 1, left:right].reshape(-1, 3)
    assert np.abs(beside - shown[0]).max(1).min() <= 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
@pytest.mark.parametrize("per_step", [False, True])
def test_maps_that_are_none_are_refused(value, per_step):
    maps = torch.full((2, 6, 6), 1 / 36)
    maps[1, 2, 3] = value
    with pytest.raises(ValueError, match="finite"):
        draw_heatmap([Image.new("RGB", (9, 9))], [Reflection(2, {"dac": [maps]})], "?", "!", per_step=per_step)


@pytest.mark.parametrize("per_step", [False, True])
def test_of_a_clip_only_the_frames_with_looks_are_drawn_and_named(per_step):
    maps = [torch.full((8, 6, 6), 1e-4) for _ in range(4)]
    maps[3][:5, 1, 1] = maps[1][5:, 2, 3] = 1.0
    pictures = [Image.new("RGB", (60, 60), colour) for colour in ("red", "lime", "blue", "white")]
    names = [f"frame {number}, {number / 2:.2f} s" for number in range(1, 5)]
    figure = draw_heatmap(pictures, [Reflection(8, {"dac": maps})], "Where?", "There", per_step=per_step, frames=names)
    assert re.findall(r"frame \d, \d\.\d\d s", texts(figure)) == [names[1], names[3]]
    drawn = [
        axes.images[0].get_array() for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 3
    ]
    colours = [tuple(picture[30, 30]) for picture in drawn if picture.shape[0] == 60]
    assert list(dict.fromkeys(colours)) == [(0, 255, 0), (255, 255, 255)]
