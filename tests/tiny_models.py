"""Tiny models of any backbone, from a stock folder on."""

import torch
from randomise import randomise
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.tokenization_utils_base import AddedToken

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_training.tiny import save_tiny_backbone


def save_strong_backbone(folder, model_type: str):
    """Writes a stock folder, with layers so strong that what is said depends on what is fed, latents included."""
    save_tiny_backbone(folder, model_type=model_type)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():  # as they come, the tied embeddings make the model repeat its last token
        for parameter in model.model.language_model.layers.parameters():
            if parameter.ndim >= 2:
                parameter *= 1.4
    model.save_pretrained(folder)
    return folder


def save_thinking_backbone(folder):
    """Writes a stock folder whose prompts open thoughts in words, as those of a backbone that thinks do."""
    save_strong_backbone(folder, "qwen3_vl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.chat_template = "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    tokenizer.save_pretrained(folder)
    return folder


def make_random_model(backbone, device, **config) -> VReflectionForConditionalGeneration:
    """Makes a model, with config fields as arguments, whose BCM and DAC are far from their initial symmetry.

    Unless it is asked for, they don't know where patches lie.
    """
    torch.manual_seed(0)
    config = {"patch_positions": "none", **config}
    model, _ = VReflectionForConditionalGeneration.from_backbone(backbone, dtype=torch.float32, **config)
    for seed, module in enumerate((model.model.bcm, model.model.dac)):
        if module is not None:
            randomise(module, seed)
    return model.to(device)


def make_stock(backbone, model):
    """The stock class with the weights of `model`."""
    stock = AutoModelForImageTextToText.from_pretrained(backbone, dtype=torch.float32).to(model.device)
    with torch.no_grad():  # the three tokens are the only rows that differ
        stock.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
    return stock
