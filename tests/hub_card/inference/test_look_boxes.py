"""The box of a look: against every box there is, and where the answer is known."""

import pytest
import torch

from vreflection_hub_card.inference.look_boxes import LookBox, look_boxes, merge_looks


def spot(*patches, steps=1, grid=(6, 6)):
    """Maps (steps, h, w) with all attention on some patches (row, column), alike."""
    attention = torch.zeros(steps, *grid)
    for row, column in patches:
        attention[:, row, column] = 1 / len(patches)
    return attention


def every_box(attention):
    """Every box of patches with its mass, by plain loops: area, -mass, top, bottom, left, right."""
    height, width = attention.shape
    for top in range(height):
        for bottom in range(top + 1, height + 1):
            for left in range(width):
                for right in range(left + 1, width + 1):
                    mass = attention[top:bottom, left:right].sum().item()
                    yield (bottom - top) * (right - left), -mass, (left, top, right, bottom)


@pytest.mark.parametrize("sharpness", [0.3, 1.5, 4])
@pytest.mark.parametrize("grid", [(5, 6), (1, 9), (7, 1), (1, 1)])
def test_no_smaller_box_holds_half(grid, sharpness):
    torch.manual_seed(0)
    height, width = grid
    maps = torch.randn(4, height * width, dtype=torch.float64).mul(sharpness).softmax(1).view(4, *grid)
    for attention, look in zip(maps, look_boxes([maps])):
        enough = [each for each in every_box(attention) if -each[1] >= 0.5]
        _, mass, (x0, y0, x1, y1) = min(enough)
        assert look.box == (x0 / width, y0 / height, x1 / width, y1 / height)
        assert look.inside == pytest.approx(-mass) and look.inside + look.outside == 1


@pytest.mark.parametrize(
    "attention, box, inside",
    [
        (spot((2, 4)), (4 / 6, 2 / 6, 5 / 6, 3 / 6), 1),
        (torch.full((1, 4, 6), 1 / 24), (0, 0, 1, 0.5), 0.5),  # 3 x 4 patches hold as much, and end lower
        (torch.full((1, 3, 3), 1 / 9), (0, 0, 1, 2 / 3), 6 / 9),  # five patches are no box
        (spot((0, 0), (5, 5), (5, 4)), (4 / 6, 5 / 6, 1, 1), 2 / 3),  # the larger of two places
    ],
)
def test_known_maps(attention, box, inside):
    (look,) = look_boxes([attention])
    assert look.box == pytest.approx(box) and look.inside == pytest.approx(inside)
    (scaled,) = look_boxes([attention * 0.03])  # of the language model's attention most is on text
    assert scaled == LookBox(look.steps, 0, look.box, pytest.approx(look.inside))


def test_the_box_lies_in_the_picture_with_most_and_the_rest_is_elsewhere():
    first, second = spot((0, 0), (5, 5)) * 0.4, spot((1, 2), grid=(2, 4)) * 0.6
    (look,) = look_boxes([first, second])
    assert (look.image_index, look.box) == (1, (0.5, 0.5, 0.75, 1))
    assert look.inside == pytest.approx(0.6) and look.outside == pytest.approx(0.4)
    assert look.to_dict()["image_index"] == 1 and look.to_dict()["steps"] == [1]


def test_successive_steps_at_one_place_are_one_look():
    corner, beside = spot((0, 0), (0, 1)), spot((0, 1), (0, 2))
    maps = torch.cat([corner, beside, spot((4, 4)), spot((4, 4)), corner])
    looks = merge_looks([maps, torch.zeros(5, 2, 3)])
    assert [look.steps for look in looks] == [(1, 2), (3, 4), (5,)]
    assert looks[0].box == look_boxes([maps[:2].mean(0, keepdim=True)])[0].box
    # Step by step away from where the look began: a place doesn't wander.
    wandering = torch.cat([spot((0, column), (0, column + 1)) for column in range(4)])
    assert [look.steps for look in merge_looks([wandering])] == [(1, 2), (3, 4)]
    # The same patch of another picture is another place, and what isn't on pictures doesn't count.
    maps, turn = spot((4, 4), steps=2) * 0.02, torch.tensor([1.0, 0.0])[:, None, None]
    assert [look.image_index for look in merge_looks([maps * turn, maps * (1 - turn)])] == [0, 1]


@pytest.mark.parametrize("maps", [[], [spot((0, 0), steps=1), spot((0, 0), steps=2)], [torch.zeros(1, 2, 2)], [torch.full((1, 2, 2), float("nan"))], [torch.tensor([[[2.0, -1.0]]])]])  # fmt: skip
def test_what_is_no_attention_is_refused(maps):
    with pytest.raises(ValueError):
        look_boxes(maps)
