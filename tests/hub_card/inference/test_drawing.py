"""Figures hold what they promise, for odd pictures and texts too."""

import pytest
import torch
from PIL import Image

from vreflection_hub_card.inference.attention_maps import Reflection
from vreflection_hub_card.inference.drawing import QUESTION_LINES, draw_heatmap, save_figure, wrap


def reflection(*grids, steps=8, sources=("dac", "llm")):
    maps = {source: [torch.rand(steps, *grid).div(100) for grid in grids] for source in sources}
    return Reflection(steps, maps)


def texts(figure):
    return " ".join(
        text
        for axes in figure.axes
        for text in (axes.get_title(), axes.get_xlabel(), axes.get_ylabel().replace("\n", " "))
    ).replace("\n", " ")


@pytest.mark.parametrize("per_step, panels", [(False, 3), (True, 18)])
@pytest.mark.parametrize("size, grid", [((168, 168), (6, 6)), ((8000, 400), (1, 20)), ((30, 900), (30, 1))])
def test_a_panel_for_every_map(tmp_path, per_step, panels, size, grid):
    figure = draw_heatmap(
        [Image.new("RGB", size)], [reflection(grid)], "Where?", "There", [(0.1, 0.2, 0.3, 0.9)], per_step
    )
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == panels
    assert all(len(axes.patches) == 1 for axes in shown)  # the box, everywhere
    save_figure(figure, tmp_path / "heatmap.png")
    assert Image.open(tmp_path / "heatmap.png").width > 800
    assert "DAC's attention" in texts(figure) and "LLM's own attention" in texts(figure)
    assert f"{grid[0]} × {grid[1]} patches" in texts(figure).replace("patches,", "patches")


def test_the_boxes_of_a_path_are_numbered_and_each_step_has_its_own():
    path = [(0.0, 0.0, 0.2, 0.2), (0.5, 0.0, 0.7, 0.2), (0.5, 0.5, 0.7, 0.7)]
    drawn = draw_heatmap(
        [Image.new("RGB", (100, 100))], [reflection((6, 6), sources=("dac",))], "Where?", "There", path
    )
    for axes in (axes for axes in drawn.axes if axes.images):
        assert [box.get_xy() for box in axes.patches] == [(0, 0), (50, 0), (50, 50)]
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    sources = {"sources": ("dac",), "steps": 4}
    steps = draw_heatmap(
        [Image.new("RGB", (100, 100))], [reflection((6, 6), **sources)], "Where?", "There", path, True
    )
    first, *others = (axes for axes in steps.axes if axes.images)
    assert len(first.patches) == 3
    assert [[box.get_xy() for box in axes.patches] for axes in others] == [[(0, 0)], [(50, 0)], [(50, 50)], [(50, 50)]]


def test_several_pictures_and_reflections_get_a_line_each():
    pictures = [Image.new("RGB", (168, 168)), Image.new("RGB", (140, 84))]
    reflections = [reflection((6, 6), (3, 5), sources=("llm",)) for _ in range(2)]
    figure = draw_heatmap(pictures, reflections, "Where?", "There")
    assert len([axes for axes in figure.axes if axes.images]) == 8
    assert "picture 2, reflection 1" in texts(figure)
    assert "DAC" not in texts(figure)


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
    assert len(wrap(text, 80).splitlines()) == QUESTION_LINES
    assert wrap(text, 80).endswith("…")
