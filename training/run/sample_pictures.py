"""A sample of a training batch as a picture: what the model saw, and where teacher and student look (the paper's Fig. 3 and 5).

Symbols in shapes: G segments, S latent steps, L merged patches, h x w of them in an image.
"""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from modeling_vreflection.regions_vreflection import BOX_UNIT, merged_grids
from modeling_vreflection.segments_vreflection import find_segments, images_before
from vreflection_hub_card.inference import drawing
from vreflection_hub_card.inference.drawing import STEPS_A_LINE, colour_bar, outline_box, panel_shape, show


# Inches, and pixels an inch: small files, since a run writes many.
WIDTH, PANEL, STEP_PANEL, DPI = 10.2, 2.8, 1.09, 80


def save_sample(
    path: Path,
    batch: dict[str, Any],
    maps: dict[str, torch.Tensor],
    shares: dict[str, float],
    config,
    image_processor,
    said: list[str],
):
    """Draws the first reflection of a batch.

    Args:
        path (`Path`): The file to write.
        batch (`dict`): What the collator made.
        maps (`dict[str, torch.Tensor]`): The attention (G, S, L) of `"teacher"`, `"student"`, or both, over all pictures of
            the sample before the reflection.
        shares (`dict[str, float]`): How much of each lies inside the boxes of the steps.
        config (`PreTrainedConfig`): The model's.
        image_processor (`Qwen2VLImageProcessor`): What cut the pictures into patches.
        said (`list[str]`): Paragraphs, whole above the pictures.
    """
    pictures, looks, maps = first_reflection(batch, maps, config, image_processor)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save_figure(draw_sample(pictures, looks, maps, shares, said), path)


def first_reflection(
    batch: dict[str, Any], maps: dict[str, torch.Tensor], config, image_processor
) -> tuple[dict[int, Image.Image], list[tuple[int, list[int]]], dict[str, dict[int, torch.Tensor]]]:
    """The pictures, looks and maps of a batch's first reflection as `draw_sample` takes them; see `save_sample`."""
    grids = merged_grids(batch["image_grid_thw"], config.vision_config.spatial_merge_size)
    sizes = [height * width for height, width in grids]
    segments = find_segments(batch["input_ids"], config)
    seen = images_before(batch["input_ids"], batch.get("position_ids"), segments, sizes, config.image_token_id)[0]
    looks = [(image - seen.start, box) for *box, image in batch["boxes"][0].tolist()]
    pictures = {
        index: picture_from_patches(batch["pixel_values"], batch["image_grid_thw"], seen[index], image_processor)
        for index in sorted({index for index, _ in looks})
    }
    sizes = [sizes[image] for image in seen]
    of_pictures = {}
    for name, attention in maps.items():
        parts = attention[0, :, : sum(sizes)].split(sizes, dim=1)
        of_pictures[name] = {index: parts[index].unflatten(1, grids[seen[index]]) for index in pictures}
    return pictures, looks, of_pictures


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


def draw_sample(
    pictures: dict[int, Image.Image],
    looks: list[tuple[int, list[int]]],
    maps: dict[str, dict[int, torch.Tensor]],
    shares: dict[str, float],
    said: list[str],
) -> Figure:
    """Draws pictures next to the attention of `"teacher"`, `"student"`, or both: the means, and every step.

    Args:
        pictures (`dict[int, Image.Image]`): The pictures that were looked at, by their place in the conversation.
        looks (`list[tuple[int, list[int]]]`): For each of the S steps its picture, and its box: x0, y0, x1, y1 in 1/65,536
            of the picture's sides. A step is drawn over its own picture with its own box outlined. Beside the means stand
            all boxes, numbered in the order of looking where there are several.
        maps (`dict[str, dict[int, torch.Tensor]]`): For each name and picture a map of each step, (S, h, w).
        shares (`dict[str, float]`): For each name the share of attention inside the steps' boxes, mean over the steps.
        said (`list[str]`): Paragraphs, whole above the pictures.
    """
    maps = {
        name: {index: attention.detach().float().cpu() for index, attention in of_pictures.items()}
        for name, of_pictures in maps.items()
    }
    looks = [(index, [corner / BOX_UNIT for corner in box]) for index, box in looks]
    path = [look for look, before in zip(looks, [None, *looks]) if look != before]
    steps = len(looks)
    lines = [(name, range(steps)[at : at + STEPS_A_LINE]) for name in maps for at in range(0, steps, STEPS_A_LINE)]

    shapes = [panel_shape(picture) for picture in pictures.values()]
    heights = [PANEL * shape + 0.6 for shape in shapes]
    step_height = max(STEP_PANEL * max(shapes), 0.7) + 0.3
    parts = [sum(heights), step_height * len(lines)]
    figure = drawing.new_figure((WIDTH, sum(parts) + 0.2), DPI)
    above, below = figure.subfigures(2, 1, height_ratios=parts)
    drawing.add_title(figure, said, 11)

    rows = above.subplots(len(pictures), 1 + len(maps), squeeze=False, height_ratios=heights)
    for panels, (index, picture) in zip(rows, pictures.items()):
        show(panels[0], picture, ())
        panels[0].set_title("picture" if len(pictures) == 1 else f"picture {index + 1}", fontsize=10.5)
        for axes, of_pictures in zip(panels[1:], maps.values()):
            most = max(seen.mean(0).max().item() for seen in of_pictures.values())
            colour_bar(above, show(axes, picture, (), of_pictures[index].mean(0), most), axes, picture)
        for axes in panels:
            _outline_path(axes, picture, index, path)
    where = "the box's patches" if len(path) == 1 else "the step's own box"
    for first, last, name in zip(rows[0, 1:], rows[-1, 1:], maps):
        first.set_title(f"{name}'s attention", fontsize=10.5, fontweight="bold")
        caption = f"{shares[name]:.0%} on {where}, mean of the steps"
        last.set_xlabel(caption, fontsize=9, color=drawing.CAPTION)

    panels = below.subplots(len(lines), min(steps, STEPS_A_LINE), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()  # the last line may be shorter
    for row, (name, shown_steps) in zip(panels, lines):
        most = max(seen.max().item() for seen in maps[name].values())
        for axes, step in zip(row, shown_steps):
            index, box = looks[step]
            axes.set_axis_on()
            shown = show(axes, pictures[index], [box], maps[name][index][step], most)
            name_of_picture = "" if len(pictures) == 1 else f", picture {index + 1}"
            axes.set_title(f"step {step + 1}{name_of_picture}", fontsize=8.5)
        row[0].set_ylabel(name, fontsize=10.5, fontweight="bold")
        colour_bar(below, shown, axes, pictures[index])
    return figure


def _outline_path(axes, picture: Image.Image, index: int, path: list[tuple[int, list[float]]]) -> None:
    """Outlines the boxes of a path that lie in the picture `index`, each once, with their numbers in the path."""
    boxes = {}
    for number, (image, box) in enumerate(path, 1):
        if image == index:
            boxes.setdefault(tuple(box), []).append(str(number))
    for box, numbers in boxes.items():
        outline_box(axes, picture, box, ", ".join(numbers) if len(path) > 1 else "")
