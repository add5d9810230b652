"""A sample of a training batch as a picture: what the model saw, and where teacher and student look (the paper's Fig. 3 and 5).

Symbols in shapes: G segments, S latent steps, L merged patches, h x w of them in an image.
"""

from pathlib import Path
from typing import Any

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
    save_figure,
    show,
    wrap,
)

from .latent_metrics import attention_inside


# Inches, and pixels an inch: small files, since a run writes many.
WIDTH, PANEL, STEP_PANEL, DPI = 10.2, 2.8, 1.09, 80


def save_sample(
    path: Path,
    batch: dict[str, Any],
    maps: dict[str, torch.Tensor],
    grids: list[tuple[int, int]],
    image_processor,
    title: str,
):
    """Draws the first reflection of a batch, see `draw_sample`.

    Args:
        path (`Path`): The file to write.
        batch (`dict`): What the collator made.
        maps (`dict[str, torch.FloatTensor]` of shape `(G, S, L)`): Attention of `"teacher"` and `"student"`, or of one.
        grids (`list[tuple[int, int]]`): h and w of each image's merged grid.
        image_processor (`Qwen2VLImageProcessor`): The one that cut the batch's images.
        title (`str`): What stands before the sample's name.
    """
    image, *box = batch["boxes"][0].tolist()
    height, width = grids[image]
    maps = {name: seen[0, :, : height * width].unflatten(1, (height, width)) for name, seen in maps.items()}
    picture = picture_from_patches(batch["pixel_values"], batch["image_grid_thw"], image, image_processor)
    name = next(name for name, count in zip(batch["sample_ids"], batch["reflections"]) if count)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw_sample(picture, box, maps.get("teacher"), maps.get("student"), f"{title}: {name}"), path)


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
    """Draws a picture next to the attention of teacher and student: means over the steps, and below them every step.

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
    maps = {
        name: seen.detach().float().cpu()
        for name, seen in (("teacher", teacher), ("student", student))
        if seen is not None
    }
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
