import pytest
from accelerate import init_empty_weights
from transformers import Qwen2_5_VLForConditionalGeneration

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.efficiency.shapes import SHAPES, build_config, build_processor, stock_config


@pytest.mark.parametrize("name, count", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_have_the_published_numbers_of_parameters(name, count):
    config = stock_config(build_config(SHAPES[name], build_processor()))
    with init_empty_weights(include_buffers=False):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_small_shape_splits_its_parameters_as_the_7b_does():
    shares = {}
    for name in ("small", "7b"):
        with init_empty_weights(include_buffers=False):
            model = VReflectionForConditionalGeneration(build_config(SHAPES[name], build_processor()))
        language_model = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
        parts = {"bcm": model.model.bcm, "dac": model.model.dac, "visual": model.model.visual, "head": model.lm_head}
        shares[name] = {
            part: sum(parameter.numel() for parameter in module.parameters()) / language_model
            for part, module in parts.items()
        }
    assert shares["small"] == pytest.approx(shares["7b"], rel=0.15)


def test_pictures_of_whole_merged_patches_stay_as_they_are():
    from vreflection_hub_card.efficiency.questions import draw_conversations, make_inputs

    inputs = make_inputs(build_processor(), draw_conversations(0, 2, side=32), "cpu")
    assert inputs["image_grid_thw"].tolist() == [[1, 64, 64]] * 2
