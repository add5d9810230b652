"""What DAC asks of pictures, by their hash, within a fixed amount of memory; needs no vLLM."""

from collections import OrderedDict

import torch


class PicturePool:
    """Keys and values of pictures in the rows of one buffer, one a merged patch; the least recently used leave first.

    Args:
        patches (`int`): Rows of the buffer.
        width (`tuple[int, int]`): Shape of a row.
        dtype (`torch.dtype`), device (`torch.device`): The buffer's.
    """

    def __init__(self, patches: int, width: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.buffer = torch.empty(patches, *width, dtype=dtype, device=device)
        self.clear()

    def clear(self) -> None:
        self.free = torch.arange(len(self.buffer), device=self.buffer.device)
        self.rows: OrderedDict[str, torch.Tensor] = OrderedDict()  # which are a picture's, (L,)

    def touch(self, key: str) -> bool:
        """Whether a picture is here; then it is the one that leaves last."""
        if key in self.rows:
            self.rows.move_to_end(key)
        return key in self.rows

    def put(self, key: str, values: torch.Tensor) -> None:
        """Keeps the rows of a picture (L, *width). Raises a `ValueError` for more than the pool has."""
        if len(values) > len(self.buffer):
            raise ValueError(
                f"A picture of {len(values)} merged patches, and the pool has room for {len(self.buffer)}."
            )
        gone = [self.rows.pop(key)] if key in self.rows else []
        while len(self.free) + sum(map(len, gone)) < len(values):
            gone.append(self.rows.popitem(last=False)[1])
        free = torch.cat([self.free, *gone])
        rows, self.free = free[: len(values)].clone(), free[len(values) :]  # a view would keep all of `free` in memory
        self.buffer[rows] = values
        self.rows[key] = rows

    def gather(self, keys: list[str]) -> torch.Tensor:
        """The rows of several pictures (L, *width), one behind the other."""
        return self.buffer[torch.cat([self.rows[key] for key in keys])]
