"""Boxes and what lies in them: regions of an image's merged patch grid, their features, and attention projected back.

Symbols in shapes: G segments, S latent steps, D hidden size, N features of a box, L merged patches of an image (h x w, row
by row).
"""

import math
from collections.abc import Sequence

import torch


try:
    from torchvision.ops import roi_align
except ImportError:
    roi_align = None

# Boxes travel as integers in this unit of an image's side, because training engines cast floats to bfloat16.
BOX_UNIT = 65_536
ROI_BINS = 7
# The highest frequency of `add_positions`, in periods a side of the image: slow enough that patches of a 6 x 6 grid don't alias
# much, while neighbours of a 72 x 128 grid still differ.
POSITION_PERIODS = 4
ROI_SAMPLING_RATIO = 2


def quantise_box(box: Sequence[float] | None, where: str = "The box") -> list[int]:
    """Checks normalised corners x0, y0, x1, y1 and returns them in 1/65,536, rounded inwards.

    Raises:
        ValueError: Not four numbers, NaN, outside [0, 1], reversed or without area.
    """
    try:
        x0, y0, x1, y1 = box = [float(corner) for corner in box]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be [x0, y0, x1, y1], got {box}.") from None
    if not all(0 <= corner <= 1 for corner in box):  # also false for NaN
        raise ValueError(f"{where} must have corners in [0, 1], as fractions of the image's sides, got {box}.")
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{where} must have x0 < x1 and y0 < y1, got {box}.")
    low = [math.ceil(x0 * BOX_UNIT), math.ceil(y0 * BOX_UNIT)]
    return low + [max(low[0], math.floor(x1 * BOX_UNIT)), max(low[1], math.floor(y1 * BOX_UNIT))]


def merged_grids(image_grid_thw: torch.LongTensor | None, merge_size: int) -> list[tuple[int, int]]:
    """Height and width of each image's merged grid, from `image_grid_thw` (images, 3), which counts unmerged patches."""
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    return [(height // merge_size, width // merge_size) for _, height, width in grids]


def add_positions(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Features (L, D) of an image, and beside them where each patch lies: (L, 3D).

    They are the features; the features plus a fixed sinusoid of the patch's centre, scaled to the RMS of the image's features,
    which keys read; and the sinusoid with an RMS of 1, which latents carry.

    A quarter of the D channels each are sines and cosines of x and sines and cosines of y, in fractions of the image's sides,
    with D / 4 equally spaced frequencies up to 4 periods a side.
    """
    count = features.shape[1] // 4
    waves = torch.arange(1, count + 1, device=features.device) * (2 * math.pi * POSITION_PERIODS / count)
    y, x = (((torch.arange(size, device=features.device) + 0.5) / size)[:, None] * waves for size in grid)
    across = torch.cat([x.sin(), x.cos()], 1)[None].expand(len(y), -1, -1)
    down = torch.cat([y.sin(), y.cos()], 1)[:, None].expand(-1, len(x), -1)
    places = math.sqrt(2) * torch.cat([across, down], 2).flatten(0, 1)  # (L, D)
    rms = features.detach().float().square().mean().sqrt()
    return torch.cat([features, features + (rms * places).to(features.dtype), places.to(features.dtype)], 1)


def boxes_by_step(boxes: torch.LongTensor, num_latent_tokens: int) -> torch.LongTensor:
    """Boxes by segment and step, (G, S, 5): x0, y0, x1, y1 in 1/65,536 of the image's sides, image. Raises a `ValueError`.

    `boxes` are these, or (G, 5), one a segment, with the image in front, as processors made them before there were paths.
    """
    if boxes.is_floating_point():
        raise ValueError(
            f"`boxes` must be integers, corners in 1/{BOX_UNIT:,} of the image's sides, got {boxes.dtype}; the processor makes "
            "them."
        )
    if boxes.ndim == 2 and boxes.shape[1] == 5:
        return boxes.roll(-1, 1)[:, None].expand(-1, num_latent_tokens, -1)
    if boxes.ndim != 3 or boxes.shape[1:] != (num_latent_tokens, 5):
        raise ValueError(
            f"`boxes` must be (segments, {num_latent_tokens}, 5), or (segments, 5), got {tuple(boxes.shape)}."
        )
    return boxes


def check_boxes(paths: list[list[list[int]]], images_before: list[range]):
    """Checks each segment's boxes, see [`boxes_by_step`]: every one must lie in an image of its sample before the segment.

    Raises:
        ValueError: Another number of paths than segments; an image that isn't there; corners that are no box.
    """
    if len(paths) != len(images_before):
        raise ValueError(f"{len(paths)} boxes for {len(images_before)} reflection segments; there must be one each.")
    for number, (path, images) in enumerate(zip(paths, images_before)):
        for x0, y0, x1, y1, image in path:
            if image not in images:
                there = f"{images.start} to {images.stop - 1}" if images else "none"
                raise ValueError(
                    f"Box {number} lies in image {image} of the batch, which its sample doesn't show before the segment: "
                    f"there it has {there}."
                )
            if not (0 <= x0 <= x1 <= BOX_UNIT and 0 <= y0 <= y1 <= BOX_UNIT):
                raise ValueError(
                    f"Box {number} must be x0 <= x1, y0 <= y1 within 0 to {BOX_UNIT}, got {[x0, y0, x1, y1]}."
                )


def box_patches(box: list[int], grid: tuple[int, int]) -> torch.Tensor:
    """Indices of the merged patches that a box overlaps, at least one.

    Args:
        box (`list[int]`): x0, y0, x1, y1 in 1/65,536 of the image's sides.
        grid (`tuple[int, int]`): h and w of the merged grid.

    Returns:
        `torch.LongTensor` of shape (N,): Indices into the L = h * w patches, row by row.
    """
    height, width = grid
    x0, y0, x1, y1 = box

    def cells(low: int, high: int, size: int) -> torch.Tensor:
        first = min(low * size // BOX_UNIT, size - 1)
        return torch.arange(first, max(-(-high * size // BOX_UNIT), first + 1))

    return (cells(y0, y1, height)[:, None] * width + cells(x0, x1, width)).flatten()


def pool_region(features: torch.Tensor, box: list[int], grid: tuple[int, int], pooling: str) -> torch.Tensor:
    """Features of a box: F_local (N, D) from F_global (L, D), N = 49 for `"roi_align"`. See `box_patches`."""
    if pooling == "patch":
        return features[box_patches(box, grid).to(features.device)]
    maps = features.float().T.unflatten(1, grid)  # (D, h, w)
    return _roi_bins(maps, box).flatten(1).T.to(features.dtype)


def project_attention(attention: torch.Tensor, box: list[int], grid: tuple[int, int], pooling: str) -> torch.Tensor:
    """Projects the attention over a box's features, A_T (S, N), onto the whole grid: Â_T (S, L) of Eq. 4.

    Every row still sums to one: with `"patch"` it is a scatter, with `"roi_align"` the adjoint of its bilinear sampling,
    whose weights sum to one for each bin. Â_T is a target; no gradient flows through it.
    """
    attention = attention.detach()
    if pooling == "patch":
        projected = attention.new_zeros(len(attention), grid[0] * grid[1])
        projected[:, box_patches(box, grid).to(attention.device)] = attention
        return projected
    with torch.enable_grad():
        maps = attention.new_zeros(len(attention), *grid, requires_grad=True)
        bins = _roi_bins(maps, box)
        return torch.autograd.grad(bins, maps, attention.view_as(bins))[0].flatten(1)


def _roi_bins(maps: torch.Tensor, box: list[int]) -> torch.Tensor:
    """RoI-Align of maps (C, h, w), float32, over one box: (C, 7, 7)."""
    if roi_align is None:
        raise ImportError('`region_pooling="roi_align"` needs torchvision: `pip install torchvision`.')
    height, width = maps.shape[1:]
    corners = maps.new_tensor(box) * maps.new_tensor([width, height, width, height]) / BOX_UNIT
    return roi_align(
        maps[None], [corners[None]], output_size=ROI_BINS, sampling_ratio=ROI_SAMPLING_RATIO, aligned=True
    )[0]
