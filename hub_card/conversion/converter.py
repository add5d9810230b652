"""One checkpoint into another, tensor by tensor."""

from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import CONFIG_NAME

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration

from ..errors import InputError, first_line, reading
from ..inference.checkpoint_files import check_files
from ..inference.checkpoints import CHECKPOINT_CLASSES
from .folders import atomic_directory, check_free
from .layouts import MODULES, holds_module, our_names, stored_shape
from .shards import Stored, Weight, read_headers, write_shards
from .target import Target, describe


EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SHARD_SIZE = "5GB"
GIB = 2**30


class LayoutError(InputError):
    """Weights that don't fit; `problems` lists every one of them."""

    def __init__(self, message: str, problems: list[str]):
        super().__init__(message)
        self.problems = problems


class Conversion(NamedTuple):
    """What was written: the configuration, the number of weights, their bytes, the number of files that hold them."""

    config: VReflectionConfig
    weights: int
    size: int
    files: int


def convert(
    source: Path, out: Path, inference_only: bool = False, max_shard_size: int | str = SHARD_SIZE
) -> Conversion:
    """Converts a checkpoint of the authors' layout, or a stock one of a backbone, into a V-Reflection checkpoint.

    Every weight is found or missed before anything is written, and `out` appears in the end, whole.

    Args:
        source (`Path`): Its folder.
        out (`Path`): A folder that doesn't exist or is empty.
        inference_only (`bool`, *optional*, defaults to `False`): Leave BCM out, and DAC unless the checkpoint decodes by it
            (`latent_feedback`).
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): The size of a file with weights, and what of
            them is in memory at a time.

    Returns:
        `Conversion`: The configuration, and the numbers of weights, of their bytes, and of the files that hold them.

    Raises:
        LayoutError: Weights that have no place here, that are missing, or of another shape.
        InputError: No checkpoint that can be converted, see `describe` and `read_headers`; an `out` that can't be written.
    """
    check_free(out)
    check_files(source)
    stored = read_headers(source)
    target = describe(source, stored, inference_only)
    with reading(source / CONFIG_NAME, "the configuration is wrong"):
        model = empty_model(target, stored)
    weights, problems = assign(stored, target, model, inference_only)
    if problems:
        raise LayoutError(f"{source}: {len(problems)} weights don't fit, nothing was written", problems)
    size = sum(torch.Size(weight.shape).numel() * weight.stored.dtype.itemsize for weight in weights.values())
    try:
        with atomic_directory(out) as folder:
            if size > (free := disk_usage(folder).free):
                raise InputError(
                    f"{out}: {size / GIB:.1f} GiB of weights, and only {free / GIB:.1f} GiB are free there"
                )
            # Without weights: the configurations and the code that loads the checkpoint.
            model.save_pretrained(folder, state_dict={})
            target.processor.save_pretrained(folder)
            with tqdm(total=len(weights), desc="Converting", unit="weight", disable=None) as progress:
                files = write_shards(folder, weights, max_shard_size, progress.update)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: can't be written, and is not there ({first_line(error)})") from error
    return Conversion(target.config, len(weights), size, len(files))


def empty_model(target: Target, stored: dict[str, Stored]) -> VReflectionForConditionalGeneration:
    """The model that the weights are for, without any memory of its own; in the dtype of the embedding."""
    with torch.device("meta"):
        model = CHECKPOINT_CLASSES[target.config.model_type](target.config)
    model.generation_config = target.generation_config
    dtypes = [weight.dtype for name, weight in stored.items() if EMBEDDING in our_names(name)]
    return model.to(dtypes[0]) if dtypes else model


def assign(
    stored: dict[str, Stored], target: Target, model: VReflectionForConditionalGeneration, inference_only: bool
) -> tuple[dict[str, Weight], list[str]]:
    """The model's weights by name, in the order in which they are stored, and what is wrong, a line each.

    Wrong are weights without a place, of another shape, missing, or there twice.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = target.config.tie_word_embeddings and shapes.pop(HEAD)
    left_out = [module for module in MODULES if not getattr(target.config, f"has_{module}")]
    weights, problems = {}, []
    for name, weight in stored.items():
        if inference_only and any(holds_module(name, module) for module in left_out):
            continue
        if tied and name == HEAD:
            if not any(EMBEDDING in our_names(other) and stored[other].is_equal(weight) for other in stored):
                problems.append(f"{name}: config.json ties it to the embedding, from which it differs")
            continue
        ours = our_names(name)
        if not ours or not shapes.keys() >= set(ours):
            problems.append(f"{name}: unknown, there is no place for it")
            continue
        if ours[0] in weights:
            problems.append(f"{name}: the same as {weights[ours[0]].stored.name}")
            continue
        in_vocabulary = ours[0] in (EMBEDDING, HEAD)
        shape = shapes[ours[0]]
        needed = (target.stored_vocabulary, *shape[1:]) if in_vocabulary else stored_shape(name, shape)
        if weight.shape != needed:
            problems.append(f"{name}: of shape {list(weight.shape)}, and {list(needed)} is needed")
        filled_from = target.first_new_id if in_vocabulary else None
        for part, new in enumerate(ours):
            weights[new] = Weight(weight, shape, part if len(ours) > 1 else None, filled_from)
    problems += [f"{name}: missing" for name in shapes if name not in weights]
    return weights, problems
