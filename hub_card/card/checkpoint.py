"""What a checkpoint's folder says about itself, without loading a weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers import GenerationConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_vreflection import VReflectionConfig
from modeling_vreflection.decoding_vreflection import ReflectionOptions

from ..errors import InputError, reading
from ..inference.checkpoints import checkpoint_config


# As safetensors names them; tensors of 8 bits and less hold packed numbers, which can't be counted by their shape.
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a card describes it; an adapter has no `weights`, and neither has a run before it saves them."""

    config: VReflectionConfig
    decoding: ReflectionOptions
    weights: dict[str, Any] | None = None
    adapter: bool = False


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the configurations of a checkpoint, or of an adapter, and counts its parameters.

    Raises:
        InputError: No checkpoint, or one without weights in safetensors.
    """
    config = checkpoint_config(folder)
    with reading(folder, "no usable generation_config.json"):
        decoding = ReflectionOptions.resolve(config, GenerationConfig.from_pretrained(folder))
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return Checkpoint(config, decoding, adapter=True)
    weights = read_weights(folder)
    if weights is None:
        raise InputError(f"{folder}: no weights, the folder has no *.safetensors")
    return Checkpoint(config, decoding, weights)


def read_weights(folder: Path) -> dict[str, Any] | None:
    """Counts parameters by the headers of a folder's safetensors files; without such files returns `None`.

    The counts are `total`, `bcm` and `dac`, tied parameters once; `dtypes` are those that occur.

    Raises:
        InputError: A damaged or missing file; quantized weights, whose parameters can't be counted.
    """
    with reading(folder, "its weights are damaged or incomplete"):
        try:
            files = get_local_safetensors_metadata(folder).files_metadata
        except NotASafetensorsRepoError:
            return None
    tensors = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    if not tensors:
        raise InputError(f"{folder}: its files of weights hold none")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if packed := sorted(dtypes - set(DTYPE_NAMES)):
        raise InputError(f"{folder}: weights of type {', '.join(packed)} are packed and can't be counted")
    counts = {
        part: sum(tensor.parameter_count for name, tensor in tensors.items() if name.startswith(prefix))
        for part, prefix in (("total", ""), ("bcm", "model.bcm."), ("dac", "model.dac."))
    }
    return counts | {"dtypes": [DTYPE_NAMES[dtype] for dtype in sorted(dtypes)]}
