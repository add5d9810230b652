"""Where a latent step looked, as a box: the smallest one that holds half of its attention.

Symbols in shapes: S latent steps, h x w merged patches of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the picture's sides

# Sums of float32 shares are off by less.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class LookBox:
    """Where one latent step looked, or successive ones that looked at one place.

    Args:
        steps (`tuple[int, ...]`): The latent steps, counted from 1.
        image_index (`int`): The picture in the conversation, counted from 0.
        box (`tuple[float, float, float, float]`): x0, y0, x1, y1 as fractions of the picture's sides.
        inside (`float`): The share of the attention on all pictures that falls into the box.
    """

    steps: tuple[int, ...]
    image_index: int
    box: Box
    inside: float

    @property
    def outside(self) -> float:
        """The share of the attention on all pictures that falls elsewhere."""
        return 1 - self.inside

    def to_dict(self) -> dict:
        """The look as JSON can hold it."""
        shares = {"inside": self.inside, "outside": self.outside}
        return {"steps": list(self.steps), "image_index": self.image_index, "box": list(self.box), **shares}


def look_boxes(maps: Sequence[torch.Tensor]) -> list[LookBox]:
    """The box of each latent step.

    It lies in the picture that gets most of the step's attention. Of all boxes of whole patches that hold at least half
    of what falls on that picture, it is the one of the fewest patches; among equals the one that holds most, then the
    first by its upper, lower and left edge.

    Args:
        maps (`Sequence[torch.Tensor]`): For each picture of the conversation a map (S, h, w) of attention, as
            [`Reflection`] holds them. Only its distribution counts, not its sum.

    Returns:
        `list[LookBox]`: One for each of the S steps.

    Raises:
        ValueError: No maps, another number of steps in each, or a step whose attention is negative, not finite or zero
            everywhere.
    """
    _check(maps)
    return [_box([attention[step] for attention in maps], (step + 1,)) for step in range(len(maps[0]))]


def merge_looks(maps: Sequence[torch.Tensor]) -> list[LookBox]:
    """The looks of a reflection: successive steps that look at one place are one look.

    A step belongs to the look before it if it shares at least half of its attention with that look's first step: the sum
    over patches of the smaller of both shares, which is one minus their total variation. The box of a look is that of
    its steps' mean attention.

    Args and errors are those of [`look_boxes`].

    Returns:
        `list[LookBox]`: The looks in their order, at most S.
    """
    _check(maps)
    shares = torch.cat([attention.double().flatten(1) for attention in maps], 1)  # (S, L)
    shares = shares / shares.sum(1, keepdim=True)
    looks: list[list[int]] = []
    for step, share in enumerate(shares):
        if looks and torch.minimum(share, shares[looks[-1][0]]).sum() >= 0.5 - TOLERANCE:
            looks[-1].append(step)
        else:
            looks.append([step])
    return [_box([attention[look].mean(0) for attention in maps], tuple(step + 1 for step in look)) for look in looks]


def _check(maps: Sequence[torch.Tensor]) -> None:
    if not len(maps):
        raise ValueError("No attention maps: a look needs at least one picture.")
    if len({len(attention) for attention in maps}) > 1:
        raise ValueError(f"Each map must have the same steps, got {[len(attention) for attention in maps]}.")
    masses = torch.stack([attention.double().sum((1, 2)) for attention in maps])
    wrong = ~masses.isfinite().all(0) | ~(masses.sum(0) > 0)
    wrong |= torch.stack([(attention < 0).any(2).any(1) for attention in maps]).any(0)
    if wrong.any():
        step = wrong.nonzero()[0].item() + 1
        raise ValueError(f"The attention of step {step} must be finite, not negative and above zero somewhere.")


def _box(maps: list[torch.Tensor], steps: tuple[int, ...]) -> LookBox:
    """The box of attention (h, w) on each picture."""
    masses = [attention.double().sum().item() for attention in maps]
    index = masses.index(max(masses))
    attention = maps[index].double().cpu() / masses[index]
    height, width = attention.shape
    (x0, y0, x1, y1), share = _smallest_box(attention)
    box = (x0 / width, y0 / height, x1 / width, y1 / height)
    return LookBox(steps, index, box, min(share * masses[index] / sum(masses), 1.0))


def _smallest_box(attention: torch.Tensor) -> tuple[tuple[int, int, int, int], float]:
    """The smallest box of patches (x0, y0, x1, y1) with half of shares (h, w) that sum to one, and what it holds.

    For each band of rows and each left edge, the nearest right edge by which the box holds enough; O(h² w log w).
    """
    height, width = attention.shape
    above = torch.cat([attention.new_zeros(1, width), attention.cumsum(0)])
    top, bottom = torch.triu_indices(height, height)  # the rows of each band, both included
    bands = above[bottom + 1] - above[top]
    sums = torch.cat([bands.new_zeros(len(bands), 1), bands.clamp(min=0).cumsum(1)], 1)  # (bands, w + 1)
    left = torch.arange(width).expand(len(bands), width)
    right = torch.searchsorted(sums, (sums[:, :-1] + 0.5 - TOLERANCE).contiguous())
    right = torch.maximum(right, left + 1)
    found = right <= width
    areas = ((bottom - top + 1)[:, None] * (right - left)).masked_fill(~found, height * width + 1)
    shares = sums.gather(1, right.clamp(max=width)) - sums[:, :-1]
    band, x0 = (areas == areas.min()).nonzero().T  # in the order of top, bottom, left
    best = shares[band, x0].div(TOLERANCE).round().argmax().item()
    band, x0 = band[best], x0[best]
    corners = (x0.item(), top[band].item(), right[band, x0].item(), bottom[band].item() + 1)
    return corners, shares[band, x0].item()
