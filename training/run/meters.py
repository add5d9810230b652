"""Exact means of what a run logs: over accumulation steps, logging steps and ranks."""

import torch
from accelerate import Accelerator


def sum_over_ranks(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum of all ranks' tensors, on the CPU; all of them have to call it."""
    if accelerator.num_processes == 1:  # its device may not have float64
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").cpu()


class Meters:
    """Sums and counts under fixed names, so that every rank brings the same ones in the same order."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._totals = {name: [0.0, 0.0] for name in names}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float):
        """Adds a sum over `count` things; a sum over none, as of a dummy row, is dropped."""
        if (count := float(count)) > 0:
            self._totals[name][0] += float(total)
            self._totals[name][1] += count

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means since the last call, of what was seen on any rank."""
        totals = sum_over_ranks(torch.tensor(list(self._totals.values()), dtype=torch.float64), accelerator)
        self._totals = {name: [0.0, 0.0] for name in self.names}
        return {name: (total / count).item() for name, (total, count) in zip(self.names, totals) if count > 0}
