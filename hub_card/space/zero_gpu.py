"""ZeroGPU: on such a Space a function gets a GPU for as long as it runs, and asks for it by a decorator."""

import os
from collections.abc import Callable


# Of a visitor's two answers, at most; a longer time waits longer in ZeroGPU's queue.
GPU_SECONDS = 120


def on_gpu(function: Callable) -> Callable:
    """Marks a generator function as needing the GPU, on a Space; anywhere else it stays as it is."""
    if "SPACE_ID" not in os.environ:
        return function
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=GPU_SECONDS)(function)
