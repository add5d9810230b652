"""Models of two classes on one set of weights, in memory once."""

import copy

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration


PARTS = {
    "language_model": "model.language_model.",
    "visual": "model.visual.",
    "bcm": "model.bcm.",
    "dac": "model.dac.",
}


def draw_weights(
    config: VReflectionConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> VReflectionForConditionalGeneration:
    """A model with random weights, drawn on the device."""
    set_seed(seed)
    with device:
        return VReflectionForConditionalGeneration._from_config(config, dtype=dtype)


def model_on(
    weights: dict[str, torch.Tensor],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    device: torch.device,
    attention: str | None = None,
) -> PreTrainedModel:
    """A model whose parameters are its own, over the storage of these weights; those that it doesn't have are left out.

    Args:
        weights (`dict[str, torch.Tensor]`): A state dict, on the device.
        model_class (`type`): The model's class.
        config (`PreTrainedConfig`): Its configuration.
        device (`torch.device`): Where the weights lie.
        attention (`str`, *optional*): The attention implementation; defaults to transformers' choice.
    """
    # transformers writes the attention into the configuration that it is given: a shared one would tell all models the last.
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=False):
        model = model_class._from_config(config, attn_implementation=attention)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    return model.to(device)


def count_parameters(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Parameters of the whole model, tied ones once, and of its parts."""
    distinct = {weight.data_ptr(): weight for weight in weights.values()}
    return {"all": sum(weight.numel() for weight in distinct.values())} | {
        part: sum(weight.numel() for name, weight in weights.items() if name.startswith(prefix))
        for part, prefix in PARTS.items()
    }


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())
