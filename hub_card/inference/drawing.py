"""Where the model looked, as figures: numbered looks on the picture, or a map of each latent step.

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from PIL import Image

from ..whole_files import replacing
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
# Points.
HEADING = 11
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
    frames: Sequence[str] = (),
) -> Figure:
    """Draws where the model looked: its looks on each picture, numbered and joined, or one panel a latent step.

    Looks are those of [`Reflection`], and the colours under them are the largest share that any look has on a patch. A map
    is stretched over its picture with bilinear interpolation between the centres of the patches. Colours run from zero to
    the largest share in the figure, or with `per_step` in its row.

    Args:
        pictures (`list[Image.Image]`): The conversation's pictures, RGB.
        reflections (`list[Reflection]`): The answer's reflections, at least one, with maps of one or both sources.
        question (`str`): The question; the figure grows by its lines.
        answer (`str`): The model's answer.
        path (`Sequence[tuple[float, float, float, float]]`, *optional*): Where to look in the first picture, in this
            order: boxes, corners as fractions of its sides. Drawn as outlines; over the map of one step its own box alone,
            of K boxes the k-th at step k and the last one at all later steps.
        per_step (`bool`, *optional*, defaults to `False`): One panel for each latent step and source.
        frames (`Sequence[str]`, *optional*): What the pictures are called if they are a clip's frames. Of these only the ones
            that hold a look are drawn.

    Returns:
        `Figure`: Not registered with pyplot; `save_figure` writes it.

    Raises:
        ValueError: A map that is negative or not finite, or a step whose maps are zero everywhere.
    """
    pictures = [shrink(picture) for picture in pictures]
    names = {index: "" if len(pictures) == 1 else f"picture {index + 1}" for index in range(len(pictures))}
    if frames:
        looked_at = {look.image_index for reflection in reflections for look in reflection.looks}
        names = {index: frames[index] for index in sorted(looked_at)}
    figure = (_draw_steps if per_step else _draw_looks)(pictures, names, reflections, path)
    size = 16 if per_step else 12  # figures of single steps are wider, and shown smaller
    add_title(figure, [question, f"→ {answer or '(an empty answer)'}"], size)
    return figure


def add_title(figure: Figure, paragraphs: Sequence[str], size: float) -> None:
    """Writes whole paragraphs above a figure of `new_figure`, which grows by as much; `size` in points."""
    width, height = figure.get_size_inches()
    lines = [line for text in paragraphs for line in wrap(text, width - 0.3, size)]
    figure.suptitle("\n".join(lines), fontsize=size, parse_math=False, linespacing=1.35)
    figure.set_size_inches(width, height + 1.35 * size / 72 * len(lines) + 0.15)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format that the path's suffix names, one of `FIGURE_FORMATS`."""
    with replacing(path) as draft:
        figure.savefig(draft, facecolor="white")


def shrink(picture: Image.Image) -> Image.Image:
    """A copy no larger than a panel can show."""
    picture = picture.copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    return picture


def wrap(text: str, width: float, size: float) -> list[str]:
    """Breaks text of a size in points into lines at most `width` inches wide, words only where one is wider than a line.

    Characters that no font can draw become spaces.
    """
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    lines, room = [""], 0.96 * width * 72 / size  # letters are drawn on whole pixels, some of them wider
    for word in text.split():
        if not lines[-1] or _width(f"{lines[-1]} {word}") > room:
            lines += [""] if lines[-1] else []
            for letter in word:
                if lines[-1] and _width(lines[-1] + letter) > room:
                    lines.append("")
                lines[-1] += letter
        else:
            lines[-1] += f" {word}"
    return lines


def _width(text: str) -> float:
    """By the font's size; without kerning, which is little."""
    return sum(map(_letter_width, text))


@cache
def _letter_width(letter: str) -> float:
    return text_to_path.get_text_width_height_descent(letter, FontProperties(size=1), False)[0]


def _draw_looks(
    pictures: list[Image.Image], names: dict[int, str], reflections: list[Reflection], path: Sequence[Box]
) -> Figure:
    """A panel for each picture that has a name, with the looks of all reflections."""
    looks = [reflection.looks for reflection in reflections]
    seen = [reflection.maps[reflection.source] for reflection in reflections]
    maps = {index: look_map(looks, [of_pictures[index] for of_pictures in seen]) for index in names}
    most = max(attention.max().item() for attention in maps.values())
    heights = [PANEL * panel_shape(pictures[index]) for index in names]
    figure = new_figure((PANEL + 1.2, sum(heights) + 0.4 * len(heights) + 0.4))
    panels = figure.subplots(len(names), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (index, name) in zip(panels, names.items()):
        picture = pictures[index]
        shown = show(axes, picture, (), maps[index], most)
        for box in path if index == 0 else ():
            outline_box(axes, picture, box, dashed=True)
        draw_looks(axes, picture, index, looks)
        if name:
            axes.set_title(name, fontsize=10.5)
        colour_bar(figure, shown, axes, picture)
    steps = sum(reflection.steps for reflection in reflections)
    caption = f"{TITLES[reflections[0].source]}, {steps} latent steps. A box holds half of a look's attention on its picture."
    if path:
        caption += " Dashed: where to look."
    panels[-1].set_xlabel("\n".join(wrap(caption, PANEL, 8)), fontsize=8, color=CAPTION)
    return figure


def _draw_steps(
    pictures: list[Image.Image], names: dict[int, str], reflections: list[Reflection], path: Sequence[Box]
) -> Figure:
    """Lines for each picture that has a name and each source: the picture, and one map for each step."""
    lines = []  # heading, picture, boxes, maps (S, h, w), and the steps of the line
    for number, reflection in enumerate(reflections, 1):
        for index, name in names.items():
            name = [f"reflection {number}"] * (len(reflections) > 1) + [name] * (name != "")
            name = f"{', '.join(name)}: " if name else ""
            for source, maps in reflection.maps.items():
                for start in range(0, reflection.steps, STEPS_A_LINE):
                    numbers = range(reflection.steps)[start : start + STEPS_A_LINE]
                    heading = f"{name}{TITLES[source]}, {_caption(source, maps[index])}"
                    lines.append((heading, pictures[index], path if index == 0 else (), maps[index], numbers))
    columns = 1 + max(len(numbers) for *_, numbers in lines)
    width = STEP_PANEL * columns + 1.3
    headings = [wrap(heading, width - 0.3, HEADING) for heading, *_ in lines]
    heights = [
        STEP_PANEL * panel_shape(picture) + 0.55 + HEADING / 60 * len(heading)
        for heading, (_, picture, *_) in zip(headings, lines)
    ]
    figure = new_figure((width, sum(heights)))
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, heading, (_, picture, path, steps, numbers) in zip(parts, headings, lines):
        part.suptitle("\n".join(heading), x=0.15 / width, ha="left", fontsize=HEADING)
        panels = part.subplots(1, columns)
        show(panels[0], picture, path)
        panels[0].set_title("picture", fontsize=13)
        for axes in panels[1 + len(numbers) :]:
            axes.set_axis_off()  # a shorter line
        for axes, number in zip(panels[1:], numbers):
            own = path[min(number, len(path) - 1) :][:1]
            shown = show(axes, picture, own, steps[number], steps.max().item())
            axes.set_title(f"step {number + 1}", fontsize=13)
        colour_bar(part, shown, panels[len(numbers)], picture)
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
        if not (attention.isfinite() & (attention >= 0)).all():
            raise ValueError("A map of attention must be finite and not negative.")
        percent = attention.numpy() * 100
        shown = axes.imshow(
            percent, extent=extent, cmap=VEIL, interpolation="bilinear", vmin=0, vmax=(most or 1) * 100
        )
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


def colour_bar(figure: FigureBase, shown: AxesImage, axes: Axes, picture: Image.Image) -> None:
    """A bar beside a panel, as high as the place that it has in the figure, of the veil over the picture's own colours."""
    place = figure.add_subplot(axes.get_subplotspec())  # a long picture's axes are small
    place.set_axis_off()
    bar = figure.colorbar(shown, cax=place.inset_axes([1.03, 0, 0.045, 1]))
    most = shown.norm.vmax
    bar.ax.imshow([own_colours(picture)], extent=(*bar.ax.get_xlim(), 0, most), aspect="auto", zorder=-1)
    bar.set_ticks([0, most / 2, most], labels=[f"{share:.3g}" for share in (0, most / 2, most)])
    bar.set_label("% per patch", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_linewidth(0.5)


def own_colours(picture: Image.Image) -> list[tuple[int, int, int]]:
    """Up to four colours of an RGB picture, the most frequent one first: what a colour bar shows under its veil."""
    few = picture.resize((64, 64), Image.Resampling.NEAREST).quantize(4)
    colours = few.getpalette()
    return [tuple(colours[3 * index : 3 * index + 3]) for _, index in sorted(few.getcolors(), reverse=True)]


def _caption(source: str, maps: torch.Tensor) -> str:
    """What asks, and on which grid; for the language model also how much of its attention is on the picture."""
    height, width = maps.shape[1:]
    share = f", {maps.sum((1, 2)).mean():.0%} of all attention" if source == "llm" else ""
    return f"{QUERIES[source]}, {height} × {width} patches{share}"
