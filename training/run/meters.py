"""Exact means of what a run logs: over accumulation steps, logging steps and ranks."""

import torch
from accelerate import Accelerator


class Meters:
    """Sums and counts under fixed names, so that every rank brings the same ones in the same order.

    Args:
        names (`tuple[str, ...]`): All names that will ever be added.
    """

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
        totals = torch.tensor(list(self._totals.values()), dtype=torch.float64)
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
        self._totals = {name: [0.0, 0.0] for name in self.names}
        return {name: (total / count).item() for name, (total, count) in zip(self.names, totals) if count > 0}
