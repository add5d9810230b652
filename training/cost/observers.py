"""What is read off a training step: time, memory, the largest tensor as wide as the vocabulary, sizes of batches."""

from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from vreflection_hub_card.efficiency.observers import Clock, PeakMemory


class StepClock(TrainerCallback):
    """Notes how long each step takes.

    Args:
        device (`torch.device`): Waited for before the clock is read.
    """

    def __init__(self, device: torch.device):
        self.clock = Clock(device)
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = self.clock.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.clock.now() - self._began)


class VocabularyWatch(TorchDispatchMode):
    """Mode that finds the largest tensor as wide as the vocabulary, forward and backward; `.rows`, `.shape` after it.

    Args:
        vocab_size (`int`): The vocabulary.
        hidden_size (`int`): Of the model: (hidden_size, vocab_size) is the head's weight or its gradient, transposed, and
            doesn't count.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.rows = 0
        self.shape: list[int] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if not isinstance(tensor, torch.Tensor) or not tensor.ndim or tensor.shape[-1] != self.vocab_size:
                continue
            rows = tensor.numel() // self.vocab_size
            if tensor.shape != (self.hidden_size, self.vocab_size) and rows > self.rows:
                self.rows, self.shape = rows, list(tensor.shape)
        return outputs


class StepObserver(TrainerCallback):
    """Finds the peak memory and the largest vocabulary-wide tensor of the last step of a `train()`.

    Args:
        device (`torch.device`): Whose memory.
        config (`PreTrainedConfig`): The model's.
    """

    def __init__(self, device: torch.device, config):
        text = config.get_text_config()
        self.memory = PeakMemory(device)
        self.vocabulary = VocabularyWatch(text.vocab_size, text.hidden_size)
        self._contexts = ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps - 1:
            self._contexts.enter_context(self.memory)
            self._contexts.enter_context(self.vocabulary)

    def on_step_end(self, args, state, control, **kwargs):
        self._contexts.close()


class CountingCollator:
    """A collator that keeps the sizes of its batches: `tokens` without padding, `positions` with it, and `labels`.

    Args:
        collator (`Callable`): The arm's own.
    """

    def __init__(self, collator):
        self.collator = collator
        self.batches: list[dict] = []

    def __call__(self, examples):
        batch = self.collator(examples)
        mask = batch.get("attention_mask")
        self.batches.append(
            {
                "tokens": batch["num_tokens"] if mask is None else int(mask.sum()),
                "positions": batch["input_ids"].numel(),
                "labels": int((batch["labels"] != -100).sum()),
            }
        )
        return batch
