"""Metrics of latents: the share of attention inside the box, and how much the latents of different samples differ.

Symbols in shapes: G segments, S latent steps, D hidden size, L merged patches.
"""

import torch


# At 0.05 the latents of two samples have, on average, a cosine of 0.9975.
COLLAPSE_THRESHOLD = 0.05


def attention_inside(attention: torch.Tensor, inside_box: torch.BoolTensor) -> torch.Tensor:
    """The share of attention (G, S, L) on the patches of each step's box (G, S, L), mean over the latent steps: (G,).

    `roi_align` reads between patches, so there the teacher's share may lie a little below one.
    """
    return (attention.detach().float() * inside_box).sum(2).mean(1)


class LatentSpread:
    r"""How much the latents of different segments differ at the same latent step, gathered batch by batch.

    With h_i the latent of segment i of n at one step,

    spread² = n / (n - 1) · (1 - |mean h_i|² / mean |h_i|²), averaged over the S steps,

    which is one minus the mean inner product of two different segments' latents over their mean square. It doesn't
    depend on their scale; 0: all equal, about 1: unrelated, and the factor in front makes that so for any n.

    Plain sums in float64, which add up over batches and ranks, are precise enough: n additions leave spread² uncertain by
    at most some n · 2⁻⁵³, so that for 10,000 segments only a spread below 1e-6 is lost in rounding. They live on the CPU.
    """

    def __init__(self, num_steps: int, hidden_size: int):
        self.shape = num_steps, hidden_size
        # Flat, to be summed over the ranks: the number of segments; |h|² by step, (S,); h by step, (S, D).
        self.sums = torch.zeros(1 + num_steps + num_steps * hidden_size, dtype=torch.float64)

    def add(self, latents: torch.Tensor) -> None:
        """Takes in the latents (G, S, D) of further segments; G may be one or zero. `ValueError` for another S or D."""
        if latents.shape[1:] != self.shape:
            raise ValueError(f"Latents must be (G, {', '.join(map(str, self.shape))}), got {latents.shape}.")
        latents = latents.detach().cpu().double()  # not every accelerator has float64
        count = torch.tensor([len(latents)])
        self.sums += torch.cat([count, latents.square().sum((0, 2)), latents.sum(0).flatten()])

    def value(self, sums: torch.Tensor | None = None) -> float | None:
        """The spread; that of all ranks, given the sum of their `sums`. `None` for fewer than two segments."""
        sums = self.sums if sums is None else sums
        count, squares, totals = sums.split([1, self.shape[0], self.shape[0] * self.shape[1]])
        if count < 2:
            return None
        mean_square = squares / count
        differing = mean_square - totals.view(self.shape).div(count).square().sum(1)
        shares = differing / mean_square.clamp(min=torch.finfo(torch.float64).tiny)  # all latents zero: 0
        return (count / (count - 1) * shares).mean().clamp(min=0).sqrt().item()


def collapse_message(spread: float | None, step: int) -> str | None:
    """The warning for collapsed latents; `None` if they didn't collapse, or for a spread of `None`."""
    if spread is None or spread >= COLLAPSE_THRESHOLD:
        return None
    return (
        f"Step {step}: the latents of different samples are nearly equal: their spread is {spread:.2g}, below "
        f"{COLLAPSE_THRESHOLD} (0 is all equal, unrelated latents have 1). Such latents say nothing about the picture. Check "
        "that the boxes of your data differ; lower `learning_rate`, and with L_BCM `lambda_bcm`; use "
        '`alignment="stochastic"` and `bcm_receives_ce=True`.'
    )
