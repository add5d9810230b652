"""What a checkpoint's folder says about itself, without loading a weight."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from transformers import GenerationConfig

from modeling_vreflection import VReflectionConfig
from modeling_vreflection.generation_vreflection import ReflectionOptions

from ..errors import InputError
from ..inference.checkpoints import checkpoint_config, first_line


ADAPTER_CONFIG = "adapter_config.json"
BF16_BYTES = 2
# As safetensors names them; tensors of 8 bits and less hold packed numbers, which can't be counted by their shape.
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, from the headers of the safetensors files.

    Args:
        total (`int`): All parameters that are stored; tied ones once.
        bcm (`int`): Those of BCM.
        dac (`int`): Those of DAC.
        dtypes (`tuple[str]`): The dtypes that occur.
    """

    total: int
    bcm: int
    dac: int
    dtypes: tuple[str, ...]

    @property
    def modules(self) -> int:
        """BCM's and DAC's parameters together."""
        return self.bcm + self.dac

    @property
    def share(self) -> float:
        """BCM's and DAC's share of all parameters."""
        return self.modules / self.total

    @property
    def megabytes(self) -> float:
        """What BCM and DAC take in bfloat16, in millions of bytes."""
        return self.modules * BF16_BYTES / 1e6


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as a card describes it.

    Args:
        config (`VReflectionConfig`): The architecture.
        latent_steps (`int`): Steps of a reflection, if `generate` isn't told otherwise.
        latent_feedback (`str`): What a latent step feeds back, likewise.
        weights (`Weights`, *optional*): Left out for an adapter, and where no weights are written yet.
        adapter (`bool`): Whether this is an adapter, which needs its base model.
    """

    config: VReflectionConfig
    latent_steps: int
    latent_feedback: str
    weights: Weights | None = None
    adapter: bool = False

    @classmethod
    def from_configs(cls, config: VReflectionConfig, generation_config: GenerationConfig, **more) -> "Checkpoint":
        """Describes a model by its two configurations, with `generate`'s defaults for what they leave open."""
        options = ReflectionOptions.resolve(config, generation_config)
        return cls(config, options.latent_steps, options.latent_feedback, **more)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads the configurations of a checkpoint, or of an adapter, and counts its parameters.

    Raises:
        InputError: No checkpoint, or one without weights in safetensors.
    """
    config = checkpoint_config(folder)
    try:
        generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no usable generation_config.json ({first_line(error)})") from error
    if (folder / ADAPTER_CONFIG).is_file():
        return Checkpoint.from_configs(config, generation_config, adapter=True)
    weights = read_weights(folder)
    if weights is None:
        raise InputError(f"{folder}: no weights, the folder has no *.safetensors")
    return Checkpoint.from_configs(config, generation_config, weights=weights)


def read_weights(folder: Path) -> Weights | None:
    """Counts parameters by the headers of a folder's safetensors files; without such files returns `None`.

    Raises:
        InputError: A damaged or missing file; quantized weights, whose parameters can't be counted.
    """
    try:
        files = get_local_safetensors_metadata(folder).files_metadata
    except NotASafetensorsRepoError:
        return None
    except (SafetensorsParsingError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its weights are damaged or incomplete ({first_line(error)})") from error
    tensors = {name: tensor for file in files.values() for name, tensor in file.tensors.items()}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if packed := sorted(dtypes - set(DTYPE_NAMES)):
        raise InputError(f"{folder}: weights of type {', '.join(packed)} are packed and can't be counted")
    total, bcm, dac = (
        sum(tensor.parameter_count for name, tensor in tensors.items() if name.startswith(prefix))
        for prefix in ("", "model.bcm.", "model.dac.")
    )
    return Weights(total, bcm, dac, tuple(DTYPE_NAMES[dtype] for dtype in sorted(dtypes)))
