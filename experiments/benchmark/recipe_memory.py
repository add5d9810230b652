"""Memory of the recipes for stage `path` on a GPU, estimated on the meta device: `python -m experiments.benchmark.recipe_memory`.

Counted are the weights: those that train in float32, with their gradients and AdamW's two averages, the others in bf16; then
what gradient checkpointing keeps of a full pack, and what the feed-forward part of a layer keeps while it is computed again.
Not counted: attention's buffers, pictures while they are encoded, copies and buffers of the engine, fragmentation.
"""

import torch
from torch.autograd.graph import saved_tensors_hooks

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration
from vreflection_training.adapters import LANGUAGE_LAYERS

from .backbones import BACKBONES


# The recipe, its backbone, the GPUs that share weights and optimiser, the rank of its adapters.
RECIPES = {"path_3b": ("3b", 8, None), "path_7b": ("7b", 8, None), "path_7b_lora": ("7b", 1, 64)}
PACK = 16_384  # tokens
TRAINED_BYTES = 16  # float32: weight, gradient, two averages
FROZEN_BYTES = 2
ACTIVATION_BYTES = 2


def meta_model(size: str) -> VReflectionForConditionalGeneration:
    """A model of a backbone's size without memory."""
    backbone = BACKBONES[size]
    config = VReflectionConfig(
        text_config=backbone.text, vision_config=backbone.vision, tie_word_embeddings=backbone.tied
    )
    with torch.device("meta"):
        return VReflectionForConditionalGeneration(config)


def count_parameters(model, rank: int | None) -> tuple[int, int]:
    """How many parameters train, and how many are only held."""
    held = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    if rank is None:
        return held - vision, vision
    adapters = sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.model.language_model.named_modules()
        if name.rpartition(".")[2] in LANGUAGE_LAYERS
    )
    whole = sum(parameter.numel() for part in (model.model.bcm, model.model.dac) for parameter in part.parameters())
    rows = 3 * model.config.text_config.hidden_size * (1 if model.config.tie_word_embeddings else 2)
    return adapters + whole + rows, held


def kept_activations(model) -> tuple[int, int]:
    """Bytes that a pack keeps: the inputs of all layers; in one layer's feed-forward part."""
    text = model.config.text_config
    mlp = model.model.language_model.layers[0].mlp.bfloat16()
    states = torch.empty(PACK, text.hidden_size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = mlp(states)  # held, for its graph holds what is kept
    for weight in mlp.parameters():
        kept.pop(id(weight.untyped_storage()), None)
    del output
    within = sum(storage.nbytes() for storage in kept.values())
    return text.num_hidden_layers * PACK * text.hidden_size * ACTIVATION_BYTES, within


def estimate(recipe: str) -> dict[str, float]:
    """GB a GPU: what is held and trained, and the two parts of [`kept_activations`]."""
    size, gpus, rank = RECIPES[recipe]
    model = meta_model(size)
    trained, frozen = count_parameters(model, rank)
    checkpoints, within = kept_activations(model)
    shared = (trained * TRAINED_BYTES + frozen * FROZEN_BYTES) / gpus
    return {"states": shared / 1e9, "layers": checkpoints / 1e9, "within": within / 1e9}


def comment(recipe: str) -> str:
    """What a recipe says about its memory."""
    gb = estimate(recipe)
    return (
        f"# Memory a GPU, calculated from shapes (experiments/benchmark/recipe_memory.py), not measured: {gb['states']:.1f} GB of\n"
        f"# weights, gradients and optimiser; {gb['layers']:.1f} GB for the layers' inputs of a full pack, and "
        f"{gb['within']:.1f} GB within a layer\n"
        "# while it is computed again. More: attention, encoding the pictures, the engine's buffers.\n"
    )


if __name__ == "__main__":
    for name in RECIPES:
        print(name, comment(name), sep="\n")
