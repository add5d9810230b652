"""Sizes of backbones: with random weights, without memory, and models of both classes on one set of weights, in memory once."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, set_seed

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.causal_lm_vreflection import MODEL_CLASSES
from modeling_vreflection.processing_vreflection import LATENT_TOKENS
from vreflection_hub_card.inference.checkpoints import EMBEDDED


PATCH_SIZE, MERGE_SIZE = 14, 2
CELL = PATCH_SIZE * MERGE_SIZE  # side of a merged patch, in pixels
MAX_PATCHES = 5120  # the paper's limit (4.1), in merged patches


@dataclass(frozen=True)
class Backbone:
    """A size of a backbone and of its pictures; `backbones.yaml` explains the fields."""

    note: str
    text: dict
    vision: dict
    tied: bool
    dtype: str
    side: int = 16
    mix_divisor: int = 1
    model_type: str = Qwen2_5_VLConfig.model_type
    source: str | None = None


BACKBONES = {
    name: Backbone(**fields)
    for name, fields in yaml.safe_load(Path(__file__).with_name("backbones.yaml").read_text()).items()
    if not name.startswith("_")
}
# Those that the benchmarks can run: of the embedded checkpoint's kind, whose tokens and processor they take.
RUNNABLE = [name for name, backbone in BACKBONES.items() if backbone.model_type == Qwen2_5_VLConfig.model_type]
PUBLISHED = [name for name, backbone in BACKBONES.items() if backbone.source is not None]


def meta_model(backbone: Backbone) -> PreTrainedModel:
    """Our model of a size, without memory."""
    model_class = MODEL_CLASSES[backbone.model_type]
    config = model_class.config_class(
        text_config=backbone.text, vision_config=backbone.vision, tie_word_embeddings=backbone.tied
    )
    with torch.device("meta"):
        return model_class(config)


def random_model(
    backbone: Backbone, device: torch.device, seed: int
) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """A model with random weights, drawn on the device, and a processor that leaves pictures of whole merged patches as they are.

    The tokens are the embedded checkpoint's, and fill only the head of the vocabulary.
    """
    processor = VReflectionProcessor.from_pretrained(EMBEDDED)
    processor.image_processor.size = {"shortest_edge": CELL**2, "longest_edge": MAX_PATCHES * CELL**2}
    tokenizer = processor.tokenizer
    special = {"bos": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    names = ("latent_start", "latent", "latent_end", "vision_start", "vision_end")
    ids = tokenizer.convert_tokens_to_ids([*LATENT_TOKENS, "<|vision_start|>", "<|vision_end|>"])
    config = VReflectionConfig(
        text_config=backbone.text | {f"{name}_token_id": token for name, token in special.items()},
        vision_config=backbone.vision | {"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE},
        tie_word_embeddings=backbone.tied,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        **{f"{name}_token_id": token for name, token in zip(names, ids)},
    )
    set_seed(seed)
    with device:
        model = VReflectionForConditionalGeneration._from_config(config, dtype=getattr(torch, backbone.dtype))
    return model, processor


def model_on(
    weights: dict[str, torch.Tensor], config: VReflectionConfig, stock: bool, attention: str | None = None
) -> PreTrainedModel:
    """A model whose parameters are its own, over the storage of these weights; those that it doesn't have are left out.

    Args:
        weights (`dict[str, torch.Tensor]`): Our model's state dict.
        config (`VReflectionConfig`): Our model's configuration.
        stock (`bool`): Whether the model is of the stock class, with the same backbone.
        attention (`str`, *optional*): The attention implementation; defaults to transformers' choice.
    """
    model_class = Qwen2_5_VLForConditionalGeneration if stock else VReflectionForConditionalGeneration
    config = copy.deepcopy(config)  # transformers writes the attention into it
    if stock:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = Qwen2_5_VLConfig(
            text_config=config.text_config.to_dict(),
            vision_config=config.vision_config.to_dict(),
            **{name: getattr(config, name) for name in (*names, "tie_word_embeddings")},
        )
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, attn_implementation=attention)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    return model.to(weights["lm_head.weight"].device)


def count(*modules) -> int:
    """How many parameters modules have, tied ones once."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def count_parameters(weights: dict[str, torch.Tensor]) -> dict:
    """Parameters of the whole model, tied ones once, of its parts, and what BCM and DAC add to the stock model's."""
    distinct = {weight.data_ptr(): weight for weight in weights.values()}
    counts = {"all": sum(weight.numel() for weight in distinct.values())}
    for part in ("language_model", "visual", "bcm", "dac"):
        counts[part] = sum(weight.numel() for name, weight in weights.items() if name.startswith(f"model.{part}."))
    overhead = counts["bcm"] + counts["dac"]
    stock = counts["all"] - overhead
    return counts | {"stock": stock, "overhead": overhead, "overhead_share": overhead / stock}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())
