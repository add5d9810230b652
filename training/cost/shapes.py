"""The processor and the configuration of a backbone that is measured."""

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
)

from modeling_vreflection import VReflectionConfig, VReflectionProcessor
from modeling_vreflection.processing_vreflection import LATENT_TOKENS
from vreflection_hub_card.efficiency.shapes import Shape

from ..tiny import MERGE_SIZE, PATCH_SIZE, SPECIAL_TOKENS, tiny_tokenizer


# A merged patch, in pixels.
CELL = PATCH_SIZE * MERGE_SIZE
# The paper's limits (4.1), in tokens or merged patches.
PAPER = {"max_length": 16_384, "long_sample_length": 4096, "min_patches": 128, "max_patches": 5120}


def build_processor(folder: str) -> VReflectionProcessor:
    """The tiny model's tokenizer, and an image processor that leaves pictures as they are."""
    tiny_tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessor(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": CELL**2, "longest_edge": PAPER["max_patches"] * CELL**2},
    ).save_pretrained(folder)
    Qwen2_5_VLConfig().save_pretrained(folder)  # tells the tokenizer's class
    return VReflectionProcessor.from_backbone(folder)


def build_config(shape: Shape, processor: VReflectionProcessor) -> VReflectionConfig:
    """The model's config; ids are the processor's, whose tokens fill only the head of the vocabulary."""
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in (*SPECIAL_TOKENS, *LATENT_TOKENS)}
    start, slot, end = (ids[name] for name in LATENT_TOKENS)
    return VReflectionConfig(
        text_config={
            **shape.text,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE, **shape.vision},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.tied,
        latent_start_token_id=start,
        latent_token_id=slot,
        latent_end_token_id=end,
    )
