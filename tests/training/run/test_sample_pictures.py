"""Pictures put together from patches are the ones that went in; figures hold what they promise."""

import os

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from transformers import Qwen2VLImageProcessor

from modeling_vreflection.regions_vreflection import BOX_UNIT
from vreflection_hub_card.glyphsearch import make_scene
from vreflection_hub_card.inference.drawing import save_figure
from vreflection_training import VReflectionDataCollator
from vreflection_training.run.sample_pictures import draw_sample, first_reflection, picture_from_patches
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


# Qwen3-VL's, of the same class as Qwen2.5-VL's.
QWEN3 = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    "image_processor",
    [tiny_image_processor(), Qwen2VLImageProcessor(), Qwen2VLImageProcessor(**QWEN3)],
    ids=["tiny", "stock", "qwen3_vl"],
)
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


def draw(picture, of_names, title="a", **shares):
    """One picture, one box in all steps."""
    steps = len(next(iter(of_names.values())))
    maps = {name: {0: attention} for name, attention in of_names.items()}
    return draw_sample({0: picture}, [(0, BOX)] * steps, maps, {**dict.fromkeys(maps, 0.0), **shares}, [title])


@pytest.mark.parametrize("size, grid", [((168, 112), (4, 6)), ((2800, 56), (2, 100)), ((56, 840), (30, 2))])
@pytest.mark.parametrize("steps", [1, 8, 12])
def test_a_panel_for_the_picture_the_means_and_every_step(size, grid, steps, tmp_path):
    figure = draw(Image.new("RGB", size), {"teacher": maps(steps, *grid), "student": maps(steps, *grid)})
    panels = shown(figure)
    assert len(panels) == 3 + 2 * steps
    assert all(len(axes.patches) == 1 and not axes.texts for axes in panels)  # the box, everywhere
    save_figure(figure, tmp_path / "sample.png")
    assert Image.open(tmp_path / "sample.png").width > 700


def test_the_figure_says_who_looks_where():
    teacher, student = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    teacher[:, 0, 1] = 1  # the box's only patch
    student[0, 0, 1], student[1, 1, 3] = 0.5, 1
    figure = draw(
        Image.new("RGB", (112, 56)),
        {"teacher": teacher, "student": student},
        "sample-7, step 40",
        teacher=1.0,
        student=0.25,
    )
    said = texts(figure)
    assert figure.get_suptitle() == "sample-7, step 40"
    assert said[said.index("teacher's attention") + 1] == "100% on the box's patches, mean of the steps"
    assert said[said.index("student's attention") + 1].startswith("25%")
    means = [axes.images[1].get_array() for axes in shown(figure)[1:3]]
    assert torch.equal(torch.tensor(means[1]), student.mean(0) * 100)
    steps = [axes.images[1] for axes in shown(figure)[3:]]
    assert [torch.tensor(step.get_array()).sum().item() for step in steps] == [100, 100, 50, 100]
    assert [step.get_clim() for step in steps] == [(0, 100)] * 4


@pytest.mark.parametrize("given", ["teacher", "student"])
def test_one_of_the_two_is_enough(given):
    other = {"teacher": "student", "student": "teacher"}[given]
    figure = draw(Image.new("RGB", (112, 56)), {given: maps(3, 2, 4)})
    assert len(shown(figure)) == 5
    assert f"{given}'s attention" in texts(figure) and f"{other}'s attention" not in texts(figure)


# A path of three boxes in two pictures, the first and third of 168 x 112 pixels, 4 x 6 patches, the second of 56 x 84, 3 x 2.
UNIT = BOX_UNIT // 64
PATH = [
    (0, [2 * UNIT, 2 * UNIT, 20 * UNIT, 14 * UNIT]),
    (2, [2 * UNIT, 24 * UNIT, 30 * UNIT, 60 * UNIT]),
    (0, [34 * UNIT, 34 * UNIT, 50 * UNIT, 46 * UNIT]),
]
GRIDS = {0: (4, 6), 2: (3, 2)}
# The patches that these boxes overlap, counted through three pictures of 24, 9 and 6.
PATCHES = [[0, 1], [33 + 2, 33 + 4], [15, 16]]


def outlines(axes):
    """The boxes drawn, as fractions of the picture's sides, and what stands beside them."""
    width, height = axes.images[0].get_extent()[1:3]
    boxes = [
        (patch.get_x() / width, patch.get_y() / height, patch.get_width() / width, patch.get_height() / height)
        for patch in axes.patches
    ]
    return boxes, [text.get_text() for text in axes.texts]


def as_drawn(box):
    x0, y0, x1, y1 = (corner / BOX_UNIT for corner in box)
    return pytest.approx((x0, y0, x1 - x0, y1 - y0))


def test_each_step_of_a_path_is_drawn_over_its_picture_with_its_box():
    looks = [*PATH, *PATH[-1:] * 5]
    student = {index: torch.rand(8, *grid) for index, grid in GRIDS.items()}
    pictures = {0: Image.new("RGB", (168, 112)), 2: Image.new("RGB", (56, 84))}
    figure = draw_sample(pictures, looks, {"student": student}, {"student": 0.625}, ["a"])
    panels = shown(figure)
    assert len(panels) == 2 * 2 + 8
    for axes, (index, box) in zip(panels[4:], looks):
        assert outlines(axes) == ([as_drawn(box)], [])
        assert axes.images[0].get_extent()[1] == pictures[index].width
    for step, axes in enumerate(panels[4:]):
        assert torch.equal(torch.tensor(axes.images[1].get_array()), student[looks[step][0]][step] * 100)
        assert axes.get_title() == f"step {step + 1}, picture {looks[step][0] + 1}"
        assert axes.images[1].get_clim()[1] == max(seen.max().item() for seen in student.values()) * 100
    for axes, index in zip(panels[:4], (0, 0, 2, 2)):
        boxes, numbers = outlines(axes)
        mine = [(box, str(number)) for number, (image, box) in enumerate(PATH, 1) if image == index]
        assert boxes == [as_drawn(box) for box, _ in mine] and numbers == [number for _, number in mine]
    assert [axes.get_title() for axes in panels[:4:2]] == ["picture 1", "picture 3"]
    assert torch.equal(torch.tensor(panels[3].images[1].get_array()), student[2].mean(0) * 100)
    assert "62% on the step's own box, mean of the steps" in texts(figure)


def test_a_box_that_is_looked_at_again_has_both_numbers():
    looks = [(0, BOX), (0, BOX), PATH[0], (0, BOX), (0, BOX)]
    figure = draw_sample(
        {0: Image.new("RGB", (168, 112))}, looks, {"teacher": {0: maps(5, 4, 6)}}, {"teacher": 1}, ["a"]
    )
    assert outlines(shown(figure)[0])[1] == ["1, 3", "2"]


@pytest.fixture
def path_rows():
    """A row with a picture, and one with three pictures whose path leaves out the second."""
    boxes = [[corner / BOX_UNIT for corner in box] for _, box in PATH]
    path = {"type": "reflection", "boxes": boxes, "image_index": [index for index, _ in PATH]}
    images = [noise(168, 112), noise(84, 84), noise(56, 84)]
    return [
        {
            "id": name,
            "images": pictures,
            "messages": [
                {"role": "user", "content": [{"type": "image"} for _ in pictures]},
                {"role": "assistant", "content": [*reflections, {"type": "text", "text": "A"}]},
            ],
        }
        for name, pictures, reflections in (("plain", [noise(90, 90)], []), ("path", images, [path]))
    ]


def test_a_run_on_paths_meters_and_draws_them(make_trainer, path_rows, processor, model, tmp_path):
    batch = VReflectionDataCollator(processor, model.config)(path_rows)
    inputs = {key: value for key, value in batch.items() if torch.is_tensor(value)}
    with torch.no_grad():
        attention = model(**inputs, latent_inputs="dac").student_attention[0]
    looks = [*PATCHES, *PATCHES[-1:] * 5]
    expected = sum(attention[step, inside].sum().item() for step, inside in enumerate(looks)) / 8
    trainer = make_trainer(Dataset.from_list(path_rows), stage="2", max_steps=1, sample_every=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["student_inside_box"] == pytest.approx(expected, rel=1e-5)
    assert log["teacher_inside_box"] == pytest.approx(1)
    assert (tmp_path / "run" / "samples" / "step-1-row-1.png").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_the_first_reflection_of_a_batch_with_its_pictures_before_it(processor, model, path_rows, packed):
    images, rows = path_rows[1]["images"], path_rows
    batch = VReflectionDataCollator(processor, model.config)([rows] if packed else rows)
    attention = torch.rand(1, 8, 24 + 9 + 6 + 5)  # the last five: padding
    pictures, looks, found = first_reflection(batch, {"student": attention}, model.config, processor.image_processor)
    assert looks == [*PATH, *PATH[-1:] * 5]
    assert {index: picture.size for index, picture in pictures.items()} == {0: (168, 112), 2: (56, 84)}
    for index in pictures:
        difference = pil_to_tensor(pictures[index]).int() - pil_to_tensor(images[index]).int()
        assert difference.abs().max() <= 1
    assert torch.equal(found["student"][0], attention[0, :, :24].view(8, 4, 6))
    assert torch.equal(found["student"][2], attention[0, :, 33:39].view(8, 3, 2))
    assert found["student"].keys() == pictures.keys()


@pytest.mark.filterwarnings("error")
def test_files_are_small_and_any_name_can_be_drawn(tmp_path):
    torch.manual_seed(0)
    teacher, student = maps(8, 12, 12).bfloat16(), maps(8, 12, 12).requires_grad_()
    figure = draw(make_scene(1).image, {"teacher": teacher, "student": student}, "$x_{1$ \x00\n" * 9)
    save_figure(figure, tmp_path / "sample.png")
    assert os.path.getsize(tmp_path / "sample.png") < 500_000
