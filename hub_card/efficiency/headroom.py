"""What two ideas could save, measured instead of built.

Computing logits for only those rows that need them saves part of the vocabulary's projection, in batches whose rows are in
different modes; half of the rows stand for it. Compiling the S latent steps as one graph saves what is done around each of them.
"""

import time

import torch
from torch import nn
from tqdm import tqdm
from transformers import StaticCache
from transformers.cache_utils import Cache

from modeling_vreflection.generation_vreflection import CACHE

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


def feed_back(
    language_model: nn.Module, state: torch.Tensor, positions: torch.LongTensor, cache: Cache, steps: int
) -> torch.Tensor:
    """Latent steps without `generate` around them.

    Args:
        language_model (`nn.Module`): Qwen2.5-VL's.
        state (`torch.Tensor` of shape `(B, 1, D)`): What is fed first.
        positions (`torch.LongTensor` of shape `(3, B, 1)`): Of the first step.
        cache (`Cache`): Grows by `steps`.
        steps (`int`): How many.

    Returns:
        `torch.Tensor`: The states of all steps (B, steps, D).
    """
    states = []
    for step in range(steps):
        outputs = language_model(inputs_embeds=state, position_ids=positions + step, **{CACHE: cache}, use_cache=True)
        state = outputs.last_hidden_state
        states.append(state)
    return torch.cat(states, 1)


@torch.no_grad()
def measure_one_graph(contender: Contender, prompt_length: int, repeats: int) -> dict:
    """Times S latent steps compiled as one graph against S compiled steps, both with a static cache.

    Args:
        contender (`Contender`): Our class, compiled.
        prompt_length (`int`): Tokens that the cache has room for beside the latents.
        repeats (`int`): Rounds.

    Returns:
        `dict`: Seconds a latent step of both, the ratio within the rounds, the seconds that the first calls took, and the
        largest difference between the states of both.
    """
    steps, model, clock = contender.latent_steps, contender.model, contender.clock
    language_model, config = model.model.language_model, model.config.get_text_config()
    compiled = torch.compile(feed_back, **contender.options["compile_config"].to_dict())
    cache = StaticCache(config=config, max_cache_len=prompt_length + steps)
    first = torch.randn(1, 1, config.hidden_size, dtype=model.dtype, device=model.device)
    positions = torch.zeros(3, 1, 1, dtype=torch.long, device=model.device)
    feed_back(language_model, first, positions, cache, 1)  # allocates

    def singly() -> torch.Tensor:
        states = [first]
        for step in range(steps):
            states.append(compiled(language_model, states[-1], positions + step, cache, 1).clone())
        return torch.cat(states[1:], 1)

    def as_one() -> torch.Tensor:
        return compiled(language_model, first, positions, cache, steps).clone()

    ways, states, compiling = {"singly": singly, "one_graph": as_one}, {}, {}
    seconds = {name: [] for name in ways}
    for name, way in tqdm(ways.items(), desc="Compiling"):
        cache.reset()
        began = time.perf_counter()
        states[name] = way()
        compiling[name] = time.perf_counter() - began
    for number in range(-3, repeats):  # the first three warm up
        for name in in_turns(ways, number):
            cache.reset()
            began = clock.now()
            ways[name]()
            if number >= 0:
                seconds[name].append((clock.now() - began) / steps)
    return {
        **{name: spread(values) for name, values in seconds.items()},
        "ratio": median_interval([one / single for one, single in zip(seconds["one_graph"], seconds["singly"])]),
        "first_call_seconds": compiling,
        "largest_difference": (states["one_graph"] - states["singly"]).abs().max().item(),
    }
