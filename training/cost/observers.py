"""What is read off a training step: time, memory, the largest tensor as wide as the vocabulary, sizes of batches."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    TrainerCallback,
)


class StepClock(TrainerCallback):
    """Notes how long each step takes.

    With a single thread on a CPU, what counts is the processor's time, which other programs on the machine don't lengthen
    by waiting; else the wall's.

    Args:
        device (`torch.device`): Waited for before the clock is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.name = "processor time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self._began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.name == "processor time" else time.perf_counter()


class PeakMemory:
    """Context that finds the peak of the bytes that torch's allocator gave out within it; `.bytes` after it.

    What was held before doesn't count. On a CPU it adds up the allocator's own record, which torch's profiler keeps: single
    tensors, kernels' buffers included.

    Args:
        device (`torch.device`): Whose memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [event for event in events if event.get("name") == "[memory]"]
        held = np.cumsum([0, *(change["args"]["Bytes"] for change in sorted(changes, key=lambda event: event["ts"]))])
        self.bytes = int(held.max())


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
