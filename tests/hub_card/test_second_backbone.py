"""The commands on a checkpoint of another backbone than the embedded one's."""

import json

import pytest
import torch
from tiny_models import make_random_model, save_strong_backbone
from transformers import AutoModelForImageTextToText

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.card.card_check import check_card
from vreflection_hub_card.glyphsearch import make_scene
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_training.cli import main


def texts(options):
    return [str(option) for option in options]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return save_strong_backbone(tmp_path_factory.mktemp("stock"), "qwen3_vl")


@pytest.fixture(scope="module")
def checkpoint(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_random_model(stock, "cpu", patch_positions="sincos")
    model.generation_config.latent_feedback = "dac"
    model.generation_config.reflect = True
    model.save_pretrained(folder)
    VReflectionForConditionalGeneration.from_backbone(stock)[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    make_scene(3).image.save(path)
    return path


@pytest.mark.parametrize("source", ["dac", "llm"])
def test_it_answers_and_shows_where_it_looked(checkpoint, scene, tmp_path, capsys, source):
    drawn = tmp_path / "map.png"
    options = ["--model", checkpoint, "--json", "--heatmap", drawn, "--source", source, "--max-new-tokens", "14"]
    assert main(["ask", str(scene), "Which glyph?", *texts(options)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["looks"] and drawn.stat().st_size > 1000


def test_it_is_evaluated_and_its_card_names_its_backbone(checkpoint, tmp_path, capsys):
    result = tmp_path / "result.json"
    options = [checkpoint, "--limit", "2", "--batch-size", "2", "--output", result]
    assert main(["evaluate", *texts(options)]) == 0
    known = ["--base-model", "Qwen/Qwen3-VL-4B-Instruct", "--license", "apache-2.0", "--datasets", "ann/rows"]
    assert main(["card", *texts([checkpoint, "--results", result, *known])]) == 0
    card = (checkpoint / "README.md").read_text()
    assert "A Qwen3-VL that looks again while it thinks" in card and "- qwen3_vl\n" in card and "Qwen2.5" not in card
    check_card(checkpoint)


def test_a_stock_folder_is_converted_weight_by_weight(stock, tmp_path):
    assert main(["convert", str(stock), str(tmp_path / "converted")]) == 0
    converted = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    expected, _ = VReflectionForConditionalGeneration.from_backbone(stock, has_bcm=False, has_dac=False)
    assert type(converted) is type(expected)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], weight, atol=1e-6, rtol=0)
    load_checkpoint(tmp_path / "converted")


def test_a_mixture_of_experts_is_not_converted_file_by_file(tmp_path, capsys):
    folder = save_strong_backbone(tmp_path / "stock", "qwen3_vl_moe")
    assert main(["convert", str(folder), str(tmp_path / "converted")]) == 2
    assert "`from_backbone`, and save it" in capsys.readouterr().err
