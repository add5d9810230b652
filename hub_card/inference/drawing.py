"""Attention maps as figures: the picture, and beside it where each source of attention looks.

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from .attention_maps import Reflection


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the picture's sides

TITLES = {"dac": "DAC's attention", "llm": "LLM's own attention"}
QUERIES = {"dac": "queries: the model's states", "llm": "from latent positions to image tokens"}
COLOUR_MAP = "inferno"
OPACITY = 0.68
CAPTION = "0.35"
BOX_COLOUR = "#35e0a1"
# Of the finished picture, in inches and pixels an inch.
PANEL, STEP_PANEL, DPI = 3.1, 1.75, 160
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
    """Draws each picture beside its attention maps, averaged over the latent steps or one panel a step.

    A map is stretched over its picture with bilinear interpolation between the centres of the patches; the grid's true
    size stands in the title. Colours run from zero to the largest share in the figure's row.

    Args:
        pictures (`list[Image.Image]`): The conversation's pictures, RGB.
        reflections (`list[Reflection]`): The answer's reflections, at least one, with maps of one or both sources.
        question (`str`): The question, wrapped and shortened to a few lines.
        answer (`str`): The model's answer.
        path (`Sequence[tuple[float, float, float, float]]`, *optional*): Where to look in the first picture, in this
            order: boxes, corners as fractions of its sides. Drawn as outlines, with numbers if there are several; over
            the map of one step its own box alone, of K boxes the k-th at step k and the last one at all later steps.
        per_step (`bool`, *optional*, defaults to `False`): One panel for each latent step.

    Returns:
        `Figure`: Not registered with pyplot; `save_figure` writes it.
    """
    pictures = [shrink(picture) for picture in pictures]
    rows = []  # name, picture, outlines, and for each source a map of each step (S, h, w)
    for number, reflection in enumerate(reflections, 1):
        for index, picture in enumerate(pictures):
            name = "picture" if len(pictures) == 1 else f"picture {index + 1}"
            if len(reflections) > 1:
                name += f", reflection {number}"
            maps = {source: of_pictures[index] for source, of_pictures in reflection.maps.items()}
            rows.append((name, picture, path if index == 0 else (), maps))
    figure = _draw_steps(rows) if per_step else _draw_means(rows)
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


def _draw_means(rows: list[tuple]) -> Figure:
    """A line for each picture: the picture, and one map of each source, averaged over the steps."""
    sources = len(rows[0][3])
    heights = [PANEL * panel_shape(picture) + 0.65 for _, picture, *_ in rows]
    figure = new_figure((PANEL * (1 + sources) + 0.6 * sources, sum(heights) + 0.55))
    panels = figure.subplots(len(rows), 1 + sources, squeeze=False, height_ratios=heights)
    for (first, *others), (name, picture, path, maps) in zip(panels, rows):
        show(first, picture, path)
        first.set_title(name, fontsize=10.5)
        for axes, (source, steps) in zip(others, maps.items()):
            mean = steps.mean(0)
            shown = show(axes, picture, path, mean, mean.max().item())
            axes.set_title(TITLES[source], fontsize=10.5, fontweight="bold")
            axes.set_xlabel(f"{_caption(source, steps)}\nmean of {len(steps)} latent steps", fontsize=8, color=CAPTION)
            colour_bar(figure, shown, axes)
    return figure


def _draw_steps(rows: list[tuple]) -> Figure:
    """Lines for each picture and source: the picture, and one map for each step."""
    lines = [
        (name, picture, path, source, steps, range(len(steps))[start : start + STEPS_A_LINE])
        for name, picture, path, maps in rows
        for source, steps in maps.items()
        for start in range(0, len(steps), STEPS_A_LINE)
    ]
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
    """Shows a picture, or its grey shadow under a map (h, w) coloured from zero to `most`, with the boxes of a path."""
    width, height = picture.size
    extent = (0, width, height, 0)
    shown = axes.imshow(
        picture if attention is None else picture.convert("L"), extent=extent, cmap="gray", vmin=0, vmax=255
    )
    if attention is not None:
        percent = attention.numpy() * 100
        shown = axes.imshow(
            percent, extent=extent, cmap=COLOUR_MAP, alpha=OPACITY, interpolation="bilinear", vmin=0, vmax=most * 100
        )
    for number, box in enumerate(path, 1):
        outline_box(axes, picture, box, str(number) if len(path) > 1 else "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return shown


def outline_box(axes: Axes, picture: Image.Image, box: Box, name: str = "") -> None:
    """Outlines a box, corners as fractions of the picture's sides, with its name at the upper left corner."""
    width, height = picture.size
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BOX_COLOUR, linewidth=1.8))
    if name:
        label = {"facecolor": BOX_COLOUR, "edgecolor": "none", "pad": 1}
        axes.text(x0, y0, name, fontsize=7.5, fontweight="bold", ha="left", va="top", bbox=label)


def colour_bar(figure: FigureBase, shown: AxesImage, axes: Axes) -> None:
    """A bar as high as the panel that it stands beside."""
    bar = figure.colorbar(shown, cax=axes.inset_axes([1.03, 0, 0.045, 1]))
    bar.set_label("% per patch", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    bar.solids.set_alpha(1)


def _caption(source: str, maps: torch.Tensor) -> str:
    """What asks, and on which grid; for the language model also how much of its attention is on the picture."""
    height, width = maps.shape[1:]
    share = f", {maps.sum((1, 2)).mean():.0%} of all attention" if source == "llm" else ""
    return f"{QUERIES[source]},\n{height} × {width} patches{share}"
