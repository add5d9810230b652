"""A sample of a training batch as a picture: what the model saw, and where teacher and student look (the paper's Fig. 3 and 5).

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vreflection.regions_vreflection import BOX_UNIT
from vreflection_hub_card.inference.drawing import (
    CAPTION,
    STEPS_A_LINE,
    colour_bar,
    new_figure,
    panel_shape,
    show,
    wrap,
)

from .latent_metrics import attention_inside


NAMES = ("teacher", "student")
# Inches, and pixels an inch: small files, since a run writes many.
WIDTH, PANEL, STEP_PANEL, DPI = 10.2, 2.8, 1.09, 80


def picture_from_patches(
    pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor, index: int, image_processor
) -> Image.Image:
    """Puts a picture together again from the patches that the image processor cut it into.

    Args:
        pixel_values (`torch.Tensor` of shape `(P, C * T * p * p)`): The batch's patches of p x p pixels, each in T equal
            frames, normalised.
        image_grid_thw (`torch.LongTensor` of shape `(images, 3)`): Frames, and patches down and across, of each image.
        index (`int`): Which of the batch's images.
        image_processor (`Qwen2VLImageProcessor`): The one that cut it.

    Returns:
        `PIL.Image.Image`: RGB, in the size that the model saw.
    """
    patches = pixel_values.split(image_grid_thw.prod(1).tolist())[index].float().cpu()
    _, down, across = image_grid_thw[index].tolist()
    merge, side = image_processor.merge_size, image_processor.patch_size
    # Patches come in groups of merge x merge, which the model merges into one.
    groups = (down // merge, across // merge, merge, merge)
    patches = patches.view(*groups, 3, image_processor.temporal_patch_size, side, side)[..., 0, :, :]
    pixels = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(down * side, across * side, 3)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    return Image.fromarray(pixels.round().clamp(0, 255).byte().numpy())


def draw_sample(
    picture: Image.Image,
    box: list[int],
    teacher: torch.Tensor | None,
    student: torch.Tensor | None,
    title: str,
) -> Figure:
    """Draws a picture beside the attention of teacher and student: means over the steps, and below them every step.

    Args:
        picture (`PIL.Image.Image`): What the model saw.
        box (`list[int]`): x0, y0, x1, y1 in 1/65,536 of its sides; drawn as an outline.
        teacher (`torch.FloatTensor` of shape `(S, h, w)`, *optional*): Â_T; left out if `None`.
        student (`torch.FloatTensor` of shape `(S, h, w)`, *optional*): A_S; left out if `None`.
        title (`str`): Which sample, and which step of the run.

    Returns:
        `Figure`: To be written by `save_figure`.

    Raises:
        ValueError: Neither map given.
    """
    if teacher is None and student is None:
        raise ValueError("Nothing to draw: pass the attention of the teacher, of the student, or of both.")
    maps = {name: seen.detach().float().cpu() for name, seen in zip(NAMES, (teacher, student)) if seen is not None}
    outline = [corner / BOX_UNIT for corner in box]
    steps = len(next(iter(maps.values())))
    lines = [(name, range(steps)[at : at + STEPS_A_LINE]) for name in maps for at in range(0, steps, STEPS_A_LINE)]

    shape = panel_shape(picture)
    heights = [PANEL * shape + 0.6, (max(STEP_PANEL * shape, 0.7) + 0.3) * len(lines)]
    figure = new_figure((WIDTH, sum(heights) + 0.8), DPI)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    figure.suptitle(wrap(title, 100), fontsize=11, parse_math=False)

    panels = above.subplots(1, 1 + len(maps))
    show(panels[0], picture, outline)
    panels[0].set_title("picture", fontsize=10.5)
    for axes, (name, seen) in zip(panels[1:], maps.items()):
        inside = attention_inside(seen.flatten(1)[None], torch.tensor([[0, *box]]), [seen.shape[1:]]).item()
        mean = seen.mean(0)
        colour_bar(above, show(axes, picture, outline, mean, mean.max().item()), axes)
        axes.set_title(f"{name}'s attention", fontsize=10.5, fontweight="bold")
        axes.set_xlabel(f"{inside:.0%} on the box's patches, mean of the steps", fontsize=9, color=CAPTION)

    panels = below.subplots(len(lines), min(steps, STEPS_A_LINE), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()  # the last line may be shorter
    for row, (name, shown_steps) in zip(panels, lines):
        most = maps[name].max().item()
        for axes, step in zip(row, shown_steps):
            axes.set_axis_on()
            shown = show(axes, picture, outline, maps[name][step], most)
            axes.set_title(f"step {step + 1}", fontsize=8.5)
        row[0].set_ylabel(name, fontsize=10.5, fontweight="bold")
        colour_bar(below, shown, row[-1])
    return figure
