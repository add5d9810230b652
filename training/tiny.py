"""Untrained backbones of a few million parameters, with a tokenizer and an image processor that fit them.

They have the stock classes and the stock file names, so that one can replace a stock folder everywhere; two CPU cores train
them on GlyphSearch.
"""

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from vreflection_hub_card.glyphsearch import COLOURS, DESCRIBE, GLYPHS, RELATIONS, SHAPES


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words of GlyphSearch's chains that no other text of it has. They came later: their tokens lie behind all others, whose ids stay.
CHAIN_WORDS = (" same", " colour", " form", " as")
# As with the real backbones, the embedding has more rows than the tokenizer has tokens: room for reflection's three.
VOCAB_SIZE = 512
# Of all three, though Qwen3-VL's own is 16: a cell of GlyphSearch's grid is four merged patches of 28 x 28 pixels.
PATCH_SIZE = 14
MERGE_SIZE = 2
WIDTH = 192


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Trains a byte-level BPE tokenizer on GlyphSearch's own texts, so that each of their words is one token."""
    names = [f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    corpus = [f"Which glyph is on the {name}?" for name in names]
    corpus += [f"Which glyph is on the shape {side} the {name}?" for side, name in product(RELATIONS, names)]
    corpus += [f"the {name}\n{glyph}\n" for glyph, name in product(GLYPHS, names)]
    corpus += [DESCRIBE, "system\nYou are a helpful assistant.", "user\n", "assistant\n"]

    # Qwen2Tokenizer builds its own normalizer and pre-tokenizer when it is loaded: train behind those and no others.
    stock = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 32, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
    )
    add_words(tokenizer, CHAIN_WORDS)
    return tokenizer


def add_words(tokenizer: Qwen2Tokenizer, words: Sequence[str]) -> None:
    """Gives each word a token, behind all tokens that the tokenizer has; their ids stay.

    A word's pieces are merged from left to right, after all merges that there were. Other texts are encoded as before, unless
    the first pieces of one of the words stand in them side by side.

    Args:
        tokenizer (`Qwen2Tokenizer`): A byte-level BPE tokenizer, changed in place.
        words (`Sequence[str]`): The words, each with the space before it.
    """
    for word in words:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # With the special tokens, which the BPE's own vocabulary lacks: else their ids would be given away.
        vocab = state["model"]["vocab"] = tokenizer.get_vocab()
        left, *rest = tokenizer.tokenize(word)
        for right in rest:
            state["model"]["merges"].append([left, right])
            left += right
            vocab.setdefault(left, len(vocab))
        tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model


def tiny_image_processor() -> Qwen2VLImageProcessor:
    """The stock image processor, from one merged patch up (a crop isn't enlarged) to 576 of them."""
    side = PATCH_SIZE * MERGE_SIZE
    return Qwen2VLImageProcessor(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": side * side, "longest_edge": 576 * side * side},
    )


def _shared_fields(tokenizer: Qwen2Tokenizer) -> tuple[dict, dict, dict]:
    """Fields that the tiny configurations have in common: of the vision encoder, of the language model, and outside."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    vision = {
        "depth": 5,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        # Nearer to 1 / sqrt(width) than the stock 0.02, which is meant for networks thirty times as wide.
        "initializer_range": 0.06,
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    outside = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    return vision, text, outside


def tiny_qwen2_5_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """A scaled-down Qwen2.5-VL; see the comments for what differs, and why."""
    vision, text, outside = _shared_fields(tokenizer)
    # A window is a cell of GlyphSearch's grid, and only the last layer looks past it, so that a glyph learned on a crop can be
    # read in a whole scene by the same layers.
    vision |= {"window_size": 56, "fullatt_block_indexes": [4]}
    # The stock base, and the stock sections scaled to a head of 32.
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]}}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, **outside)


def tiny_qwen3_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    """A scaled-down Qwen3-VL, with two levels of DeepStack."""
    vision, text, outside = _shared_fields(tokenizer)
    vision |= {"deepstack_visual_indexes": [1, 3], "num_position_embeddings": 576}
    sections = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text |= {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, **sections}}
    return Qwen3VLConfig(vision_config=vision, text_config=text, **outside)


def tiny_qwen3_vl_moe_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLMoeConfig:
    """As `tiny_qwen3_vl_config`, with two of four experts a token."""
    dense = tiny_qwen3_vl_config(tokenizer).to_dict()
    text = dense["text_config"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    outside = {name: dense[name] for name in _shared_fields(tokenizer)[2]}
    nested = {"vision_config": dense["vision_config"], "text_config": text}
    for fields in nested.values():
        del fields["model_type"]
    return Qwen3VLMoeConfig(**nested, **outside)


BACKBONES: dict[str, tuple[type[PreTrainedModel], Callable[[Qwen2Tokenizer], PreTrainedConfig]]] = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, tiny_qwen2_5_vl_config),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, tiny_qwen3_vl_config),
    "qwen3_vl_moe": (Qwen3VLMoeForConditionalGeneration, tiny_qwen3_vl_moe_config),
}


def tiny_backbone(
    seed: int = 0, model_type: str = "qwen2_5_vl"
) -> tuple[PreTrainedModel, Qwen2Tokenizer, Qwen2VLImageProcessor]:
    """Builds an untrained model, whose float32 weights depend on `seed` alone, and its tokenizer and image processor.

    Args:
        seed (`int`, *optional*): Of the weights.
        model_type (`str`, *optional*): Whose scaled-down form it is, one of `BACKBONES`.
    """
    tokenizer = tiny_tokenizer()
    model_class, config = BACKBONES[model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, tiny_image_processor()


def save_tiny_backbone(folder: str | Path, seed: int = 0, model_type: str = "qwen2_5_vl") -> Path:
    """Writes the model of `tiny_backbone` as a stock folder, and returns the folder."""
    folder = Path(folder)
    model, *parts = tiny_backbone(seed, model_type)
    for part in (model.config, model.generation_config, *parts):
        part.save_pretrained(folder)
    # Not by `save_pretrained`, which writes on the first rank alone: each of several processes has a folder of its own.
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
