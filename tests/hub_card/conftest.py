"""A stand-in for a trained checkpoint: the tiny backbone with untrained modules. Its answers mean nothing."""

import pytest

from vreflection_hub_card.glyphsearch import make_scene, questions
from vreflection_hub_card.inference.checkpoints import load_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(make_model, processor, tmp_path_factory):
    return save(make_model(), processor, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def no_dac_folder(make_model, processor, tmp_path_factory):
    return save(make_model(has_bcm=False, has_dac=False), processor, tmp_path_factory.mktemp("no_dac"))


def save(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The stand-in's model, whose latents can be replaced, and its processor."""
    return load_checkpoint(tiny_folder, "cpu")


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    make_scene(1).image.save(path)
    return path


@pytest.fixture
def conversations():
    """Three conversations of different lengths; the second has two pictures, of different sizes."""
    result = []
    for seed in range(3):
        scene = make_scene(seed)
        content = [{"type": "image", "image": scene.image}]
        if seed == 1:
            content.append({"type": "image", "image": make_scene(7).image.resize((140, 84))})
        content.append({"type": "text", "text": questions(scene)[-seed].text})
        result.append([{"role": "user", "content": content}])
    return result
