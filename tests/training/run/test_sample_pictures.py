"""Pictures put together from patches are the ones that went in; figures hold what they promise."""

import os

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from transformers import Qwen2VLImageProcessor

from modeling_vreflection.regions_vreflection import BOX_UNIT
from vreflection_hub_card.glyphsearch import make_scene
from vreflection_hub_card.inference.drawing import save_figure
from vreflection_training.run.sample_pictures import draw_sample, picture_from_patches
from vreflection_training.tiny import tiny_image_processor


BOX = [BOX_UNIT // 4, 0, BOX_UNIT // 2, BOX_UNIT // 2]


def noise(width, height):
    """A picture in which no two patches, rows or channels are alike; smooth, so that resizing it keeps its range."""
    torch.manual_seed(width)
    return Image.frombytes("RGB", (7, 5), bytes(torch.randint(30, 225, (105,)).tolist())).resize((width, height))


def maps(steps, height, width):
    return torch.rand(steps, height, width).flatten(1).softmax(1).unflatten(1, (height, width))


def shown(figure):
    return [axes for axes in all_axes(figure) if axes.images]


def all_axes(figure):
    return [*figure.axes, *(axes for part in figure.subfigs for axes in part.axes if axes not in figure.axes)]


def texts(figure):
    return [text for axes in all_axes(figure) for text in (axes.get_title(), axes.get_xlabel(), axes.get_ylabel())]


@pytest.mark.parametrize("image_processor", [tiny_image_processor(), Qwen2VLImageProcessor()], ids=["tiny", "stock"])
def test_pictures_come_back_as_the_model_saw_them(image_processor):
    pictures = [noise(168, 84), noise(201, 310), noise(333, 90), noise(90, 90)]
    batch = image_processor(pictures, return_tensors="pt")
    sizes = set()
    for index, picture in enumerate(pictures):
        back = picture_from_patches(batch["pixel_values"], batch["image_grid_thw"], index, image_processor)
        sizes.add(back.size)
        expected = resize(pil_to_tensor(picture), back.size[::-1], InterpolationMode.BICUBIC, antialias=True)
        assert (pil_to_tensor(back).int() - expected.int()).abs().max() <= 1
    assert len(sizes) == 4


@pytest.mark.parametrize("flags", [{"do_normalize": False}, {"do_normalize": False, "do_rescale": False}])
def test_steps_that_a_processor_leaves_out_are_not_undone(flags):
    image_processor = Qwen2VLImageProcessor(**flags)
    picture = noise(168, 84)
    batch = image_processor([picture], return_tensors="pt")
    back = picture_from_patches(batch["pixel_values"], batch["image_grid_thw"], 0, image_processor)
    assert (pil_to_tensor(back).int() - pil_to_tensor(picture).int()).abs().max() <= 1


@pytest.mark.parametrize("size, grid", [((168, 112), (4, 6)), ((2800, 56), (2, 100)), ((56, 840), (30, 2))])
@pytest.mark.parametrize("steps", [1, 8, 12])
def test_a_panel_for_the_picture_the_means_and_every_step(size, grid, steps, tmp_path):
    figure = draw_sample(
        Image.new("RGB", size), BOX, {"teacher": maps(steps, *grid), "student": maps(steps, *grid)}, "a"
    )
    panels = shown(figure)
    assert len(panels) == 3 + 2 * steps
    assert all(len(axes.patches) == 1 for axes in panels)  # the box, everywhere
    save_figure(figure, tmp_path / "sample.png")
    assert Image.open(tmp_path / "sample.png").width > 700


def test_the_figure_says_who_looks_where():
    teacher, student = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    teacher[:, 0, 1] = 1  # the box's only patch
    student[0, 0, 1], student[1, 1, 3] = 0.5, 1
    figure = draw_sample(
        Image.new("RGB", (112, 56)), BOX, {"teacher": teacher, "student": student}, "sample-7, step 40"
    )
    said = texts(figure)
    assert figure.get_suptitle() == "sample-7, step 40"
    assert said[said.index("teacher's attention") + 1].startswith("100%")
    assert said[said.index("student's attention") + 1].startswith("25%")
    means = [axes.images[1].get_array() for axes in shown(figure)[1:3]]
    assert torch.equal(torch.tensor(means[1]), student.mean(0) * 100)
    steps = [axes.images[1] for axes in shown(figure)[3:]]
    assert [torch.tensor(step.get_array()).sum().item() for step in steps] == [100, 100, 50, 100]
    assert [step.get_clim() for step in steps] == [(0, 100)] * 4


@pytest.mark.parametrize("given", ["teacher", "student"])
def test_one_of_the_two_is_enough(given):
    other = {"teacher": "student", "student": "teacher"}[given]
    figure = draw_sample(Image.new("RGB", (112, 56)), BOX, {given: maps(3, 2, 4)}, "a")
    assert len(shown(figure)) == 5
    assert f"{given}'s attention" in texts(figure) and f"{other}'s attention" not in texts(figure)


@pytest.mark.filterwarnings("error")
def test_files_are_small_and_any_name_can_be_drawn(tmp_path):
    torch.manual_seed(0)
    teacher, student = maps(8, 12, 12).bfloat16(), maps(8, 12, 12).requires_grad_()
    figure = draw_sample(make_scene(1).image, BOX, {"teacher": teacher, "student": student}, "$x_{1$ \x00\n" * 9)
    save_figure(figure, tmp_path / "sample.png")
    assert os.path.getsize(tmp_path / "sample.png") < 500_000
