"""The untrained tiny backbone: a stock folder that stock classes load, small enough, and the same for the same seed."""

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from vreflection_training.tiny import SPECIAL_TOKENS, save_tiny_backbone, tiny_backbone


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
