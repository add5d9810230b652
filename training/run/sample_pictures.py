"""A sample of a training batch as a picture: what the model saw, and where teacher and student look (the paper's Fig. 3 and 5).

Symbols in shapes: G segments, S latent steps, L merged patches, h x w of them in an image.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vreflection.regions_vreflection import BOX_UNIT
from vreflection_hub_card.inference import drawing
from vreflection_hub_card.inference.drawing import STEPS_A_LINE, colour_bar, panel_shape, show

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
    """Draws the first reflection of a batch. `maps` are the attention (G, S, L) of `"teacher"`, `"student"`, or both."""
    image, *box = batch["boxes"][0].tolist()
    height, width = grids[image]
    maps = {name: seen[0, :, : height * width].unflatten(1, (height, width)) for name, seen in maps.items()}
    picture = picture_from_patches(batch["pixel_values"], batch["image_grid_thw"], image, image_processor)
    name = next(name for name, count in zip(batch["sample_ids"], batch["reflections"]) if count)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save_figure(draw_sample(picture, box, maps, f"{title}: {name}"), path)


def picture_from_patches(
    pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor, index: int, image_processor
) -> Image.Image:
    """Puts a picture of a batch together again from the patches that the image processor cut it into.

    `pixel_values` are patches of p x p pixels in T equal frames, (P, C * T * p * p); the size is the one the model saw.
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


def draw_sample(picture: Image.Image, box: list[int], maps: dict[str, torch.Tensor], title: str) -> Figure:
    """Draws a picture next to the attention (S, h, w) of `"teacher"`, `"student"`, or both: the means, and every step.

    `box`, x0, y0, x1, y1 in 1/65,536 of the picture's sides, is drawn as an outline.
    """
    maps = {name: attention.detach().float().cpu() for name, attention in maps.items()}
    outline = [corner / BOX_UNIT for corner in box]
    steps = len(next(iter(maps.values())))
    lines = [(name, range(steps)[at : at + STEPS_A_LINE]) for name in maps for at in range(0, steps, STEPS_A_LINE)]

    shape = panel_shape(picture)
    heights = [PANEL * shape + 0.6, (max(STEP_PANEL * shape, 0.7) + 0.3) * len(lines)]
    figure = drawing.new_figure((WIDTH, sum(heights) + 0.8), DPI)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    figure.suptitle(drawing.wrap(title, 100), fontsize=11, parse_math=False)

    panels = above.subplots(1, 1 + len(maps))
    show(panels[0], picture, outline)
    panels[0].set_title("picture", fontsize=10.5)
    for axes, (name, seen) in zip(panels[1:], maps.items()):
        inside = attention_inside(seen.flatten(1)[None], torch.tensor([[0, *box]]), [seen.shape[1:]]).item()
        mean = seen.mean(0)
        colour_bar(above, show(axes, picture, outline, mean, mean.max().item()), axes)
        axes.set_title(f"{name}'s attention", fontsize=10.5, fontweight="bold")
        axes.set_xlabel(f"{inside:.0%} on the box's patches, mean of the steps", fontsize=9, color=drawing.CAPTION)

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
