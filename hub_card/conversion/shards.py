"""Weights on disk: what a checkpoint's shards hold, and writing others of which one at a time is in memory."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..errors import InputError, reading
from ..inference.checkpoint_files import find_shards


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a weight lies: its file, its name there, its shape and dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def is_equal(self, other: "Stored") -> bool:
        """Whether another holds the same numbers; both files are mapped into memory for that."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        with safe_open(self.file, framework="pt") as mine, safe_open(other.file, framework="pt") as theirs:
            return torch.equal(mine.get_tensor(self.name), theirs.get_tensor(other.name))


def read_headers(folder: Path) -> dict[str, Stored]:
    """What the shards of a checkpoint hold, in the order in which it lies there; no weight is read.

    Damaged files, a name that comes twice, and weights that are no floats raise an `InputError`.
    """
    found = {}
    for path in find_shards(folder):
        with reading(path, "damaged or incomplete"), safe_open(path, framework="pt") as shard:
            for name in shard.offset_keys():
                header = shard.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise InputError(
                        f"{path}: {name} is {header.get_dtype()}, not a float; quantised weights can't be converted, "
                        "start from the checkpoint before quantisation"
                    )
                if name in found:
                    raise InputError(f"{folder}: {name} is in {found[name].file.name} and in {path.name}")
                found[name] = Stored(path, name, tuple(header.get_shape()), DTYPES[header.get_dtype()])
    return found


@dataclass(frozen=True)
class Weight:
    """A weight to be written: what it is made of, and its shape."""

    stored: Stored
    shape: tuple[int, ...]
    part: int | None = None  # which of several such weights, packed along the first dimension
    filled_from: int | None = None  # the three rows from here on start at the mean of the rows before them

    def read(self) -> torch.Tensor:
        """Reads it, mapped into memory where it stays as it is."""
        with safe_open(self.stored.file, framework="pt") as shard:
            tensor = shard.get_tensor(self.stored.name)
        if self.part is not None:
            return tensor.split(self.shape[0])[self.part]
        if self.filled_from is None:
            return tensor.reshape(self.shape)
        grown = tensor.new_zeros(self.shape)
        grown[: len(tensor)] = tensor
        grown[self.filled_from : self.filled_from + 3] = tensor[: self.filled_from].float().mean(0).to(tensor.dtype)
        return grown


def write_shards(
    folder: Path, weights: dict[str, Weight], max_shard_size: int | str, progress: Callable[[], object]
) -> list[str]:
    """Writes weights, one shard of them in memory at a time, and the index if there are several shards.

    A weight beyond the size of a shard gets one of its own. `progress` is called after every weight. Returns the files' names.
    """
    shapes = {
        name: torch.empty(weight.shape, dtype=weight.stored.dtype, device="meta") for name, weight in weights.items()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            tensors[name] = weights[name].read().contiguous()
            progress()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return list(split.filename_to_tensors)
