"""Parameters with nothing left of their initial symmetry."""

import torch


def randomise(module: torch.nn.Module, seed: int = 0):
    """Draws the parameters of BCM or DAC so that nothing cancels: biases, LayerNorm's too, and sharp, varied attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "norm.weight":
                parameter.copy_(1 + 0.3 * noise)
            elif name == "queries":
                parameter.copy_(noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(2 * noise / parameter.shape[1] ** 0.5)
