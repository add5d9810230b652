"""What the recipes say about memory is what the meta device gives, and that is what can be counted by hand."""

import pytest

from experiments.benchmark.backbones import BACKBONES, meta_model
from experiments.benchmark.recipe_memory import PACK, RECIPES, comment, count_parameters, estimate
from vreflection_training.recipe_files import RECIPES as FOLDER


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_the_program_does(name):
    assert comment(name) in (FOLDER / f"{name}.yaml").read_text()


def test_against_a_count_by_hand():
    trained, frozen = count_parameters(meta_model(BACKBONES["7b"]), None)
    # Tab. 3(e) of the paper: BCM and DAC; Qwen2.5-VL-7B has 8.29 billion parameters, 0.68 of them for vision.
    assert trained - (8_292_166_656 - frozen) == pytest.approx(102.83e6, rel=1e-3)
    assert frozen == pytest.approx(0.68e9, rel=0.01)
    adapters, held = count_parameters(meta_model(BACKBONES["7b"]), 64)
    # Two matrices a layer of rank 64, for q, k, v, o, gate, up and down.
    by_hand = 28 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)) + 3 * 3584 * 2
    assert adapters == by_hand + trained + frozen - 8_292_166_656 and held == trained + frozen
    got = estimate("path_7b")
    assert got["states"] == pytest.approx((trained * 16 + frozen * 2) / 8e9)
    assert got["layers"] == pytest.approx(28 * PACK * 3584 * 2 / 1e9)
    # The input, the gate before and after its activation, the up projection, and their product.
    assert got["within"] == pytest.approx(PACK * 2 * (3584 + 4 * 18944) / 1e9)


def test_a_stage_holds_what_it_does_not_train_and_two_passes_keep_twice_as_much():
    model = meta_model(BACKBONES["qwen3_vl_4b"])
    dac = sum(parameter.numel() for parameter in model.model.dac.parameters())
    (trained, held), (first, rest) = count_parameters(model, None), count_parameters(model, None, ("bcm",))
    assert (first, rest) == (trained - dac, held + dac)
    one, two = estimate("qwen3_vl_4b_stage1"), estimate("qwen3_vl_4b_stage2")
    assert one["layers"] == 36 * PACK * 2560 * 2 / 1e9 and two["layers"] == 2 * one["layers"]
