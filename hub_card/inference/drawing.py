"""Where the model looked, as figures: numbered looks on the picture, or a map of each latent step.

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from .attention_maps import Reflection
from .look_boxes import Box
from .look_drawing import draw_looks, look_map


TITLES = {"dac": "DAC's attention", "llm": "LLM's own attention"}
QUERIES = {"dac": "queries: the model's states", "llm": "from latent positions to image tokens"}
# From no attention to the most; a medium grey is seen on bright and dark pictures, whose own colours show through.
VEIL = LinearSegmentedColormap.from_list("veil", [(0.5, 0.5, 0.5, 0.82), (0.5, 0.5, 0.5, 0)])
CAPTION = "0.35"
BOX_COLOUR = "#35e0a1"
# Of the finished picture, in inches and pixels an inch.
PANEL, STEP_PANEL, DPI = 4.6, 1.75, 160
STEPS_A_LINE = 8
QUESTION_LINES = 3
FIGURE_FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
# The side that a picture is scaled down to; a panel has no more pixels.
PICTURE_SIDE = 1024


def draw_heatmap(
    pictures: list[Image.Image],
    reflections: list[Reflection],
    question: str,
    answer: str,
    path: Sequence[Box] = (),
    per_step: bool = False,
) -> Figure:
    """Draws where the model looked: its looks on each picture, numbered and joined, or one panel a latent step.

    Looks are those of [`Reflection`], and the colours under them are the largest share that any look has on a patch. A map
    is stretched over its picture with bilinear interpolation between the centres of the patches. Colours run from zero to
    the largest share in the figure, or with `per_step` in its row.

    Args:
        pictures (`list[Image.Image]`): The conversation's pictures, RGB.
        reflections (`list[Reflection]`): The answer's reflections, at least one, with maps of one or both sources.
        question (`str`): The question, wrapped and shortened to a few lines.
        answer (`str`): The model's answer.
        path (`Sequence[tuple[float, float, float, float]]`, *optional*): Where to look in the first picture, in this
            order: boxes, corners as fractions of its sides. Drawn as outlines; over the map of one step its own box alone,
            of K boxes the k-th at step k and the last one at all later steps.
        per_step (`bool`, *optional*, defaults to `False`): One panel for each latent step and source.

    Returns:
        `Figure`: Not registered with pyplot; `save_figure` writes it.
    """
    pictures = [shrink(picture) for picture in pictures]
    figure = (_draw_steps if per_step else _draw_looks)(pictures, reflections, path)
    size = 16 if per_step else 12  # figures of single steps are wider, and shown smaller
    letters = int(figure.get_size_inches()[0] * 120 / size)
    title = wrap(question, letters) + "\n" + wrap(f"→ {answer or '(an empty answer)'}", letters)
    figure.suptitle(title, fontsize=size, parse_math=False, linespacing=1.35)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the path's suffix names, one of `FIGURE_FORMATS`."""
    figure.savefig(path, facecolor="white")


def shrink(picture: Image.Image) -> Image.Image:
    """A copy no larger than a panel can show."""
    picture = picture.copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return picture


def wrap(text: str, width: int) -> str:
    """Breaks text into at most `QUESTION_LINES` lines, without characters that no font can draw."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return "\n".join(textwrap.wrap(text, width, max_lines=QUESTION_LINES, placeholder=" …"))


def _draw_looks(pictures: list[Image.Image], reflections: list[Reflection], path: Sequence[Box]) -> Figure:
    """A panel for each picture, with the looks of all reflections."""
    looks = [reflection.looks for reflection in reflections]
    seen = [reflection.maps[reflection.source] for reflection in reflections]
    maps = [look_map(looks, [of_pictures[index] for of_pictures in seen]) for index in range(len(pictures))]
    most = max(attention.max().item() for attention in maps)
    heights = [PANEL * panel_shape(picture) + 0.5 for picture in pictures]
    figure = new_figure((PANEL + 1.2, sum(heights) + 0.9))
    panels = figure.subplots(len(pictures), squeeze=False, height_ratios=heights)[:, 0]
    for index, (axes, picture, attention) in enumerate(zip(panels, pictures, maps)):
        shown = show(axes, picture, (), attention, most)
        for box in path if index == 0 else ():
            outline_box(axes, picture, box, dashed=True)
        draw_looks(axes, picture, index, looks)
        if len(pictures) > 1:
            axes.set_title(f"picture {index + 1}", fontsize=10.5)
        colour_bar(figure, shown, axes)
    steps = sum(reflection.steps for reflection in reflections)
    caption = f"{TITLES[reflections[0].source]}, {steps} latent steps. A box holds half of a look's attention on its picture."
    if path:
        caption += " Dashed: where to look."
    panels[-1].set_xlabel(wrap(caption, 66), fontsize=8, color=CAPTION)
    return figure


def _draw_steps(pictures: list[Image.Image], reflections: list[Reflection], path: Sequence[Box]) -> Figure:
    """Lines for each picture and source: the picture, and one map for each step."""
    lines = []  # name, picture, boxes, source, maps (S, h, w), and the steps of the line
    for number, reflection in enumerate(reflections, 1):
        for index, picture in enumerate(pictures):
            name = "picture" if len(pictures) == 1 else f"picture {index + 1}"
            if len(reflections) > 1:
                name += f", reflection {number}"
            for source, maps in reflection.maps.items():
                for start in range(0, reflection.steps, STEPS_A_LINE):
                    numbers = range(reflection.steps)[start : start + STEPS_A_LINE]
                    lines.append((name, picture, path if index == 0 else (), source, maps[index], numbers))
    columns = max(len(numbers) for *_, numbers in lines)
    heights = [STEP_PANEL * panel_shape(picture) + 0.75 for _, picture, *_ in lines]
    figure = new_figure((STEP_PANEL * (columns + 1) + 1.3, sum(heights) + 0.55))
    grid = figure.add_gridspec(len(lines), columns + 1, height_ratios=heights)
    for line, (name, picture, path, source, steps, numbers) in enumerate(lines):
        axes = figure.add_subplot(grid[line, 0])
        show(axes, picture, path)
        axes.set_title(name, fontsize=13)
        axes.set_ylabel(TITLES[source].replace(" att", "\natt"), fontsize=13, fontweight="bold")
        axes.set_xlabel(wrap(_caption(source, steps), 28), fontsize=7.5, color=CAPTION)
        for column, number in enumerate(numbers, 1):
            axes = figure.add_subplot(grid[line, column])
            own = path[min(number, len(path) - 1) :][:1]
            shown = show(axes, picture, own, steps[number], steps.max().item())
            axes.set_title(f"step {number + 1}", fontsize=13)
        colour_bar(figure, shown, axes)
    return figure


def new_figure(size: tuple[float, float], dpi: int = DPI) -> Figure:
    """An empty figure of a size in inches, not registered with pyplot."""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.03)
    return figure


def panel_shape(picture: Image.Image) -> float:
    """Height of a panel by its width; very long pictures leave some of it empty."""
    return min(max(picture.height / picture.width, 0.3), 1.6)


def show(
    axes: Axes,
    picture: Image.Image,
    path: Sequence[Box],
    attention: torch.Tensor | None = None,
    most: float = 1.0,
) -> AxesImage:
    """Shows a picture with the boxes of a path, and over it a map (h, w): a veil, clear where the share is `most`."""
    width, height = picture.size
    extent = (0, width, height, 0)
    shown = axes.imshow(picture, extent=extent)
    if attention is not None:
        percent = attention.numpy() * 100
        shown = axes.imshow(percent, extent=extent, cmap=VEIL, interpolation="bilinear", vmin=0, vmax=most * 100)
    for number, box in enumerate(path, 1):
        outline_box(axes, picture, box, str(number) if len(path) > 1 else "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return shown


def outline_box(axes: Axes, picture: Image.Image, box: Box, name: str = "", dashed: bool = False) -> None:
    """Outlines a box, corners as fractions of the picture's sides, with its name at the upper left corner."""
    width, height = picture.size
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    style = {"edgecolor": BOX_COLOUR, "linewidth": 1.8, "linestyle": "--" if dashed else "-"}
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
    if name:
        label = {"facecolor": BOX_COLOUR, "edgecolor": "none", "pad": 1}
        axes.text(x0, y0, name, fontsize=7.5, fontweight="bold", ha="left", va="top", bbox=label)


def colour_bar(figure: FigureBase, shown: AxesImage, axes: Axes) -> None:
    """A bar as high as the panel that it stands beside."""
    bar = figure.colorbar(shown, cax=axes.inset_axes([1.03, 0, 0.045, 1]))
    bar.set_label("% per patch", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_linewidth(0.5)


def _caption(source: str, maps: torch.Tensor) -> str:
    """What asks, and on which grid; for the language model also how much of its attention is on the picture."""
    height, width = maps.shape[1:]
    share = f", {maps.sum((1, 2)).mean():.0%} of all attention" if source == "llm" else ""
    return f"{QUERIES[source]},\n{height} × {width} patches{share}"
