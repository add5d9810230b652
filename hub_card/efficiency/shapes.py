"""Backbones to measure: a small one for a CPU, and the shapes of Qwen2.5-VL-3B and 7B."""

from dataclasses import dataclass

from transformers import Qwen2_5_VLConfig

from modeling_vreflection import VReflectionConfig


@dataclass(frozen=True)
class Shape:
    """The size of the backbone and of its pictures.

    Args:
        note (`str`): How it was chosen.
        text (`dict`): Fields of the language model's config.
        vision (`dict`): Fields of the vision encoder's config.
        tied (`bool`): Whether embedding and head share their weights.
        dtype (`str`): Dtype of the weights.
        side (`int`): Side of the arms' pictures in merged patches.
        mix_divisor (`int`): What areas and the limits of packing are divided by in the Visual CoT mix.
    """

    note: str
    text: dict
    vision: dict
    tied: bool
    dtype: str
    side: int
    mix_divisor: int


VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TEXT = {
    "max_position_embeddings": 128_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}
SHAPES = {
    "small": Shape(
        note=(
            "Qwen2.5-VL-7B with its depths and every width divided by 14, the vocabulary too, so that BCM, DAC and the "
            "vocabulary projection each have about the share of the work that they have in the 7B, random weights"
        ),
        text={
            **TEXT,
            "vocab_size": 10_864,
            "hidden_size": 256,
            "intermediate_size": 1353,
            "num_hidden_layers": 28,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]},
        },
        vision={**VISION, "hidden_size": 96, "intermediate_size": 244, "num_heads": 4, "out_hidden_size": 256},
        tied=False,
        dtype="float32",
        side=16,
        mix_divisor=4,
    ),
    "3b": Shape(
        note="Qwen2.5-VL-3B, random weights",
        text={
            **TEXT,
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        vision={**VISION, "out_hidden_size": 2048},
        tied=True,
        dtype="bfloat16",
        side=16,
        mix_divisor=1,
    ),
    "7b": Shape(
        note="Qwen2.5-VL-7B, random weights",
        text={
            **TEXT,
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision={**VISION, "out_hidden_size": 3584},
        tied=False,
        dtype="bfloat16",
        side=16,
        mix_divisor=1,
    ),
}


def stock_config(config: VReflectionConfig) -> Qwen2_5_VLConfig:
    """The stock class's config with the same backbone."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    return Qwen2_5_VLConfig(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        **{name: getattr(config, name) for name in names},
    )
