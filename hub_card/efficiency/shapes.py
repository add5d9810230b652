"""Backbones to measure: a tiny and a small one for a CPU, and the shapes of Qwen2.5-VL-3B and 7B."""

from dataclasses import dataclass

from transformers import Qwen2_5_VLConfig

from modeling_vreflection import VReflectionConfig, VReflectionProcessor
from modeling_vreflection.processing_vreflection import LATENT_TOKENS

from ..inference.checkpoints import EMBEDDED


PATCH_SIZE, MERGE_SIZE = 14, 2
# A merged patch, in pixels.
CELL = PATCH_SIZE * MERGE_SIZE
# The paper's limit (4.1), in merged patches.
MAX_PATCHES = 5120


@dataclass(frozen=True)
class Shape:
    """The size of the backbone and of its pictures.

    Args:
        note (`str`): How it was chosen.
        text (`dict`): Fields of the language model's config.
        vision (`dict`): Fields of the vision encoder's config.
        tied (`bool`): Whether embedding and head share their weights.
        dtype (`str`): Dtype of the weights.
        side (`int`): Side of the pictures in merged patches.
        mix_divisor (`int`, *optional*, defaults to 1): In training, what areas and the limits of packing are divided by in
            the Visual CoT mix.
    """

    note: str
    text: dict
    vision: dict
    tied: bool
    dtype: str
    side: int
    mix_divisor: int = 1


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
    "tiny": Shape(
        note="4 layers, 256 wide, and the whole vocabulary of Qwen2.5-VL-3B, whose projection so weighs more than in any real model",
        text={
            **TEXT,
            "vocab_size": 151_936,
            "hidden_size": 256,
            "intermediate_size": 1376,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]},
        },
        vision={
            **VISION,
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "fullatt_block_indexes": [3],
            "out_hidden_size": 256,
        },
        tied=True,
        dtype="float32",
        side=16,
    ),
    "small": Shape(
        note=(
            "Qwen2.5-VL-7B with its depths and every width divided by 14, the vocabulary too, so that BCM, DAC and the "
            "vocabulary projection each have about the share of the work that they have in the 7B"
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
        note="Qwen2.5-VL-3B",
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
    ),
    "7b": Shape(
        note="Qwen2.5-VL-7B",
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
    ),
}


def build_processor() -> VReflectionProcessor:
    """The embedded checkpoint's processor, which leaves pictures of whole merged patches as they are."""
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    processor.image_processor.size = {"shortest_edge": CELL**2, "longest_edge": MAX_PATCHES * CELL**2}
    return processor


def build_config(shape: Shape, processor: VReflectionProcessor) -> VReflectionConfig:
    """The model's config; ids are the processor's, whose tokens fill only the head of the vocabulary."""
    tokenizer = processor.tokenizer
    start, slot, end, vision_start, vision_end = tokenizer.convert_tokens_to_ids(
        [*LATENT_TOKENS, "<|vision_start|>", "<|vision_end|>"]
    )
    return VReflectionConfig(
        text_config={
            **shape.text,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, **shape.vision},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
        tie_word_embeddings=shape.tied,
        latent_start_token_id=start,
        latent_token_id=slot,
        latent_end_token_id=end,
    )


def stock_config(config: VReflectionConfig) -> Qwen2_5_VLConfig:
    """The stock class's config with the same backbone."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    return Qwen2_5_VLConfig(
        text_config=config.text_config.to_dict(),
        vision_config=config.vision_config.to_dict(),
        **{name: getattr(config, name) for name in names},
    )
