"""The untrained tiny backbone: a stock folder that stock classes load, small enough, and the same for the same seed."""

import hashlib
import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from modeling_vreflection.processing_vreflection import LATENT_TOKENS
from vreflection_hub_card.glyphsearch import COLOURS, DESCRIBE, GLYPHS, KINSHIP, RELATIONS, SHAPES
from vreflection_training.tiny import (
    CHAIN_WORDS,
    SPECIAL_TOKENS,
    add_words,
    save_tiny_backbone,
    tiny_backbone,
    tiny_tokenizer,
)


EMBEDDED = Path(__file__).parents[2] / "hub_card" / "vreflection_tiny"
# Of the embedded tokenizer, before it had the words of chains.
OLD_TOKENS, OLD_SHA256 = 389, "ddfb50c9cd8dfa6476f27095b2fea34d616e6cacd22434ef767ed65a37452439"
# What it was trained on, and is asked.
NAMES = [f"the {colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
OLD_TEXTS = [
    *(f"Which glyph is on {name}?" for name in NAMES),
    *(f"Which glyph is on the shape {side} {name}?" for side, name in product(RELATIONS, NAMES)),
    *(f"{name}\n{glyph}\n" for name, glyph in product(NAMES, GLYPHS)),
    DESCRIBE,
]
CHAIN = "Which glyph is on the shape of the same form as the shape of the same colour as the red circle?"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>Which glyph is on the shape left of the yellow diamond?<|im_end|>\n"
    "<|im_start|>assistant\nX<|im_end|>\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny"), seed=3)


def test_it_loads_as_a_stock_checkpoint(folder):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    expected, _, _ = tiny_backbone(seed=3)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_the_seed_decides_the_weights_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    weights = [tiny_backbone(seed)[0].lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_with_both_reflection_modules_it_stays_under_ten_megabytes():
    model, tokenizer, _ = tiny_backbone()
    width = model.config.text_config.hidden_size
    reflection = 2 * 4 * (width * width + width)
    assert 2 * (sum(parameter.numel() for parameter in model.parameters()) + reflection) < 9.5e6
    assert width % 8 == 0
    assert len(tokenizer) + 3 <= model.config.text_config.vocab_size


def test_the_tokenizer_reloads_identically_and_spells_anything(folder):
    tokenizer, reloaded = tiny_backbone()[1], AutoTokenizer.from_pretrained(folder)
    assert isinstance(reloaded, Qwen2Tokenizer)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert (reloaded.eos_token, reloaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for text in (CHAT, "Größe 漢字 😀\t\r\n  <html>", "".join(map(chr, range(256)))):
        ids = reloaded(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert reloaded.decode(ids) == text


def test_a_chat_is_short(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.tokenize(CHAT)
    assert len(tokens) == 37
    assert all(tokenizer.convert_tokens_to_ids(token) is not None and token in tokens for token in SPECIAL_TOKENS[1:6])


def test_the_image_processor_leaves_crops_and_scenes_as_they_are(folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    for side in (56, 168, 224):
        grid = processor(images=Image.new("RGB", (side, side)), return_tensors="pt")["image_grid_thw"]
        assert grid.tolist() == [[1, side // 14, side // 14]]


def tokens_by_id(tokenizer):
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    assert [vocab[token] for token in tokens] == list(range(len(tokens)))
    return tokens


@pytest.fixture
def embedded():
    return Qwen2Tokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def old(tmp_path):
    """The embedded tokenizer as it was: its last merges, and the tokens that came with them, removed."""
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(EMBEDDED / "tokenizer_config.json", folder)
    state = json.loads((EMBEDDED / "tokenizer.json").read_text())
    special = {token["content"] for token in state["added_tokens"]}
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    del merges[len(merges) - (len(vocab) - OLD_TOKENS) :]
    state["model"]["vocab"] = {token: id for token, id in vocab.items() if id < OLD_TOKENS and token not in special}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return Qwen2Tokenizer.from_pretrained(folder)


def test_the_embedded_tokenizer_keeps_the_ids_that_it_had(embedded, old):
    tokens = tokens_by_id(embedded)[:OLD_TOKENS]
    assert hashlib.sha256(json.dumps(tokens).encode()).hexdigest() == OLD_SHA256
    assert tokens_by_id(old) == tokens
    for text in (
        *OLD_TEXTS,
        CHAT,
        "<|sovt|><|lvr|><|eovt|>Z<|im_end|>",
        "Größe 漢字 😀\t",
        "".join(map(chr, range(256))),
    ):
        assert embedded(text).input_ids == old(text).input_ids


def test_adding_the_words_of_chains_to_the_old_tokenizer_gives_the_embedded_one(old, tmp_path):
    add_words(old, CHAIN_WORDS)
    old.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == (EMBEDDED / "tokenizer.json").read_text()


def test_a_new_backbone_has_the_tokens_of_the_embedded_one(embedded):
    tokens = tokens_by_id(embedded)
    assert tokens[OLD_TOKENS - 3 : OLD_TOKENS] == list(LATENT_TOKENS)  # which `from_backbone` adds
    assert tokens_by_id(tiny_tokenizer()) == tokens[: OLD_TOKENS - 3] + tokens[OLD_TOKENS:]


def test_each_word_of_a_chain_is_a_token(embedded, tmp_path):
    embedded.save_pretrained(tmp_path)
    for tokenizer in (embedded, tiny_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.decode(tokenizer(CHAIN).input_ids) == CHAIN
        assert [token.strip("Ġ") for token in tokenizer.tokenize(CHAIN)] == [*CHAIN[:-1].split(), "?"]
        for word in (*CHAIN_WORDS, *(f" {word}" for words in KINSHIP for word in words.split())):
            assert len(tokenizer(word).input_ids) == 1


def test_words_with_the_same_beginning_are_both_tokens():
    tokenizer = tiny_tokenizer()
    before = tokens_by_id(tokenizer)
    add_words(tokenizer, [" sample", " samples", " red"])
    assert [len(tokenizer(word).input_ids) for word in (" sample", " samples", " red", " same")] == [1, 1, 1, 1]
    assert tokens_by_id(tokenizer)[: len(before)] == before
