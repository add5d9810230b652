"""What a configuration accepts, refuses and keeps."""

import pytest
from transformers import Qwen2_5_VLConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from modeling_vreflection import VReflectionConfig


def test_defaults_are_the_papers():
    config = VReflectionConfig()
    assert config.model_type == "vreflection"
    assert (config.num_latent_tokens, config.compression_num_heads) == (8, 8)
    assert (config.region_pooling, config.dac_queries, config.query_position) == ("patch", "states", "before")
    assert config.has_bcm and config.has_dac
    assert config.latent_token_ids == (None, None, None)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("region_pooling", ("patch", "roi_align")),
        ("dac_queries", ("states", "static", "random")),
        ("query_position", ("before", "at")),
    ],
)
def test_unknown_choices_are_refused(field, choices):
    for choice in choices:
        assert getattr(VReflectionConfig(**{field: choice}), field) == choice
    with pytest.raises(ValueError, match=f"{field}.*{', '.join(choices)}.*'other'"):
        VReflectionConfig(**{field: "other"})


def test_numbers_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_latent_tokens.*at least 1.*0"):
        VReflectionConfig(num_latent_tokens=0)
    with pytest.raises(ValueError, match=r"compression_num_heads.*\(7\).*\(96\)"):
        VReflectionConfig(compression_num_heads=7, text_config={"hidden_size": 96})


def test_it_survives_being_saved(tmp_path):
    config = VReflectionConfig(
        text_config={"hidden_size": 96, "num_hidden_layers": 3},
        num_latent_tokens=5,
        latent_start_token_id=7,
        latent_token_id=8,
        latent_end_token_id=9,
        compression_num_heads=4,
        region_pooling="roi_align",
        dac_queries="static",
        query_position="at",
        has_bcm=False,
    )
    config.save_pretrained(tmp_path)
    loaded = VReflectionConfig.from_pretrained(tmp_path)
    assert loaded.latent_token_ids == (7, 8, 9) and not loaded.has_bcm and loaded.has_dac
    assert loaded.text_config.hidden_size == 96
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_a_stock_config_is_read_without_tokens(backbone):
    config = VReflectionConfig.from_pretrained(backbone)
    assert config.model_type == "vreflection"
    assert config.latent_token_ids == (None, None, None)
    assert config.vision_config.depth == Qwen2_5_VLConfig.from_pretrained(backbone).vision_config.depth


def test_transformers_serve_knows_the_type():
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        assert names["vreflection"] == "VReflectionForConditionalGeneration"
