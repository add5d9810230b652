"""What two ideas could save at most, measured instead of built.

Computing logits for only those rows that need them saves part of the vocabulary's projection, in batches whose rows are in
different modes. Running the S latent steps as one graph saves what `generate` does between their forward passes.
"""

import torch
from torch import nn

from ..evaluation.statistics import median_interval, spread
from .contenders import Contender
from .observers import Clock
from .rounds import in_turns


def measure_projection(lm_head: nn.Linear, batch_size: int, clock: Clock, repeats: int) -> dict:
    """Times the projection of half of a batch's rows, gathered and put back, against that of all rows.

    Args:
        lm_head (`nn.Linear`): The projection onto the vocabulary.
        batch_size (`int`): Rows, at least 2.
        clock (`Clock`): The clock.
        repeats (`int`): Rounds.

    Returns:
        `dict`: The time of half of the rows, that of all rows being 1: median and interval.
    """
    weight = lm_head.weight
    states = torch.randn(batch_size, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    rows = torch.arange(0, batch_size, 2, device=weight.device)

    def project_all() -> torch.Tensor:
        return lm_head(states)

    def project_half() -> torch.Tensor:
        return states.new_zeros(batch_size, 1, weight.shape[0]).index_copy(0, rows, lm_head(states[rows]))

    ways = {"all": project_all, "half": project_half}
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()
        for number in range(repeats):
            for name in in_turns(ways, number):
                began = clock.now()
                ways[name]()
                seconds[name].append(clock.now() - began)
    return median_interval([half / whole for half, whole in zip(seconds["half"], seconds["all"])])


def measure_forward_share(contender: Contender, inputs: dict, text_steps: int, repeats: int) -> dict[str, dict]:
    """The share of a step that is its forward pass, from the beginning of one to the beginning of the next.

    On a GPU, where reading the clock waits for the device, nothing overlaps.

    Args:
        contender (`Contender`): Our class.
        inputs (`dict`): A prompt.
        text_steps (`int`): Text steps of an answer.
        repeats (`int`): Answers.

    Returns:
        `dict`: For a text step and a latent step, the share's median over all such steps, and quartiles.
    """
    clock, moments = contender.clock, []
    hooks = [
        contender.model.register_forward_pre_hook(lambda *_: moments.append(clock.now())),
        contender.model.register_forward_hook(lambda *_: moments.append(clock.now())),
    ]
    shares = {"text_step": [], "latent_step": []}
    try:
        contender.answer(inputs, text_steps + 1)
        for _ in range(repeats):
            moments.clear()
            contender.answer(inputs, text_steps + 1)
            begins, ends = moments[::2], moments[1::2]
            # Passes read the prompt, the start token, S slots, the end token, text; nothing begins after the last one.
            for step in range(2, len(begins) - 1):
                kind = "latent_step" if step < contender.latent_steps + 2 else "text_step"
                shares[kind].append((ends[step] - begins[step]) / (begins[step + 1] - begins[step]))
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: spread(values) for kind, values in shares.items()}
