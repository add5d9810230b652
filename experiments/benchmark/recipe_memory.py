"""Memory of recipes on a GPU, estimated on the meta device: `python -m experiments.benchmark.recipe_memory`.

Counted are the weights: those that train in float32, with their gradients and AdamW's two averages, the others in bf16; then
what gradient checkpointing keeps of a full pack, and what the feed-forward part of a layer keeps while it is computed again.
Where DAC fills the slots, a step has two passes, and the layers' inputs of both are kept.
Not counted: attention's buffers, pictures while they are encoded, copies and buffers of the engine, fragmentation.
"""

from collections.abc import Collection

import torch
import yaml
from torch.autograd.graph import saved_tensors_hooks

from vreflection_training.adapters import LANGUAGE_LAYERS
from vreflection_training.recipe_files import RECIPES as FOLDER
from vreflection_training.stages import STAGES

from .backbones import BACKBONES, count, meta_model


# The recipe, its backbone, the GPUs that share weights and optimiser, the rank of its adapters.
RECIPES = {
    "path_3b": ("3b", 8, None),
    "path_7b": ("7b", 8, None),
    "path_7b_lora": ("7b", 1, 64),
    "qwen3_vl_4b_path": ("qwen3_vl_4b", 8, None),
    "qwen3_vl_8b_path": ("qwen3_vl_8b", 8, None),
    "qwen3_vl_8b_path_lora": ("qwen3_vl_8b", 1, 64),
    **{
        f"qwen3_vl_{size}_{stage}": (f"qwen3_vl_{size}", 8, None)
        for size in ("4b", "8b")
        for stage in ("stage1", "stage2")
    },
}
PACK = 16_384  # tokens
TRAINED_BYTES = 16  # float32: weight, gradient, two averages
FROZEN_BYTES = 2
ACTIVATION_BYTES = 2


def count_parameters(model, rank: int | None, trains: Collection[str] = ("bcm", "dac")) -> tuple[int, int]:
    """How many parameters train, and how many are only held; `trains` says which of BCM and DAC train."""
    held = count(model)
    if rank is None:
        frozen = count(
            model.model.visual, *(getattr(model.model, part) for part in ("bcm", "dac") if part not in trains)
        )
        return held - frozen, frozen
    adapters = sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.model.language_model.named_modules()
        if name.rpartition(".")[2] in LANGUAGE_LAYERS
    )
    whole = count(*(getattr(model.model, part) for part in trains))
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
    model = meta_model(BACKBONES[size])
    options = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    trained, frozen = count_parameters(model, rank, STAGES[str(options["stage"])].trains)
    checkpoints, within = kept_activations(model)
    checkpoints *= 2 if options["latent_inputs"] == "dac" else 1
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
