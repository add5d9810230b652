"""Finding and loading a checkpoint, with errors of one line."""

from pathlib import Path

import PIL.Image
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers.image_utils import SizeDict
from transformers.utils import CONFIG_NAME

from modeling_vreflection import VReflectionConfig, VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.causal_lm_vreflection import MODEL_CLASSES

from ..embedded import EMBEDDED, EMBEDDED_NAME, resolve_embedded
from ..errors import InputError, first_line, reading
from .checkpoint_files import check_files, check_whole, read_json_object
from .encoding import encode_prompts, user_turn


# By a checkpoint's model type; `MODEL_CLASSES` has them by their backbone's.
CHECKPOINT_CLASSES = {model_class.config_class.model_type: model_class for model_class in MODEL_CLASSES.values()}
# By name: a repository may hold gigabytes of data in other JSON files.
TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"]
MODEL_FILES = ["config.json", "*_config.json", "*.jinja", "*.safetensors", "*.safetensors.index.json"]
# What a checkpoint answers when it is loaded: values that nothing can work with are found then, not in the first answer.
TRIAL = user_turn([PIL.Image.new("RGB", (64, 64))], "?")


def checkpoint_folder(model: str | Path = EMBEDDED_NAME, revision: str | None = None) -> Path:
    """The folder of a checkpoint, which `from_pretrained` takes.

    Args:
        model (`str` or `Path`): A folder; a Hub id, which is downloaded first; or `"vreflection_tiny"`, the embedded
            checkpoint, unless there is a folder of this name.
        revision (`str`, *optional*): A branch, tag or commit of a Hub id.

    Raises:
        InputError: Neither a folder nor an id that the Hub knows; a revision of a folder.
    """
    folder = Path(resolve_embedded(model))
    if revision is not None and folder.exists():
        raise InputError(f"revision {revision!r}: only a model on the Hub has revisions")
    if folder.is_dir():
        return folder
    if folder == EMBEDDED:
        raise InputError(f"this installation holds no embedded checkpoint ({EMBEDDED}); name another model")
    if folder.exists():
        raise InputError(f"{model}: not a checkpoint's folder")
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=MODEL_FILES + TOKENIZER_FILES))
    except HFValidationError as error:
        raise InputError(f"{model}: no such folder, and no Hub id either") from error
    except OSError as error:
        raise InputError(f"{model}: no such folder, and not found on the Hub ({first_line(error)})") from error


def checkpoint_config(folder: Path) -> VReflectionConfig:
    """Reads a checkpoint's configuration alone; a folder that holds no V-Reflection checkpoint is an `InputError`."""
    check_files(folder)
    fields = read_json_object(folder / CONFIG_NAME)
    if (model_type := fields.get("model_type")) not in CHECKPOINT_CLASSES:
        raise InputError(f"{folder}: no V-Reflection checkpoint, its model type is {model_type!r}")
    with reading(folder / CONFIG_NAME, "the configuration is wrong"):
        return CHECKPOINT_CLASSES[model_type].config_class.from_dict(fields)


def load_checkpoint(
    folder: Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """Loads a checkpoint for inference with the classes installed here; code that it may carry never runs.

    Args:
        folder (`Path`): The checkpoint, see `checkpoint_folder`.
        device (`str` or `torch.device`, *optional*): Where to compute; without it a GPU if there is one.
        dtype (`str` or `torch.dtype`, *optional*): Defaults to float32 on a CPU, to the dtype of the weights elsewhere.
        attn_implementation (`str`, *optional*): Defaults to transformers' choice.

    Returns:
        `tuple`: The model, in evaluation mode, and its processor.

    Raises:
        InputError: No checkpoint, damaged or incomplete weights, weights that aren't finite, no such device, dtype or attention implementation.
    """
    model_class = CHECKPOINT_CLASSES[checkpoint_config(folder).model_type]
    check_whole(folder)
    device = find_device(device)
    with reading(folder, "can't be loaded"):
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
    with reading(folder, "its processor or tokenizer can't be loaded"):
        processor = model_class.processor_class.from_pretrained(folder, trust_remote_code=False)
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    if wrong := sorted(mismatched | set(report["missing_keys"])):
        raise InputError(f"{folder}: {len(wrong)} weights are missing or of another shape, {wrong[0]} first")
    check_processor(folder, processor, model.config)
    model = model.to(device).eval()
    check_model(folder, model, processor)
    return model, processor


def check_model(folder: str | Path, model: VReflectionForConditionalGeneration, processor: VReflectionProcessor):
    """Looks for weights that aren't finite, and lets the model answer a question about a small picture.

    Raises:
        InputError: Such a weight, by name; whatever keeps the model from answering.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise InputError(
                f"{folder}: the weight {name} holds NaN or infinity: the checkpoint is damaged, or its training was"
            )
    on_gpu = model.device.type == "cuda"
    with reading(folder, "its model can't answer a question"), torch.random.fork_rng(enabled=on_gpu):
        stored = model.generation_config
        # A call may say 0 steps where the checkpoint says to reflect; a checkpoint that says both is wrong.
        model.reflection_options(getattr(stored, "latent_steps", None), reflect=getattr(stored, "reflect", None))
        model.generate(**encode_prompts(processor, TRIAL, model.device), max_new_tokens=1, reflect=False)


def check_processor(folder: str | Path, processor: VReflectionProcessor, config: VReflectionConfig) -> None:
    """Checks that a processor goes with a model, and prepares a question about a small picture with it.

    Raises:
        InputError: Other tokens or sizes of patches than the model's; what the chat template or the image processor says.
    """
    start_id = processor.tokenizer.convert_tokens_to_ids(processor.latent_start_token)
    if start_id != config.latent_start_token_id:
        raise InputError(
            f"{folder}: the tokenizer doesn't fit the model, it has no token {processor.latent_start_token}"
        )
    vision = config.vision_config
    for name, expected in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if (found := getattr(processor.image_processor, name, None)) != expected:
            raise InputError(f"{folder}: the image processor's `{name}` is {found!r}, and the model's is {expected!r}")
    with reading(folder, "its chat template or image processor can't prepare a question"):
        inputs = encode_prompts(processor, TRIAL, "cpu")
        if config.image_token_id not in inputs["input_ids"]:
            raise ValueError("there is no place for the picture")


def find_device(device: str | torch.device | None = None) -> torch.device:
    """Checks that a device exists; without a name returns the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    # torch says "not compiled with CUDA" by an assertion.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} can't be used ({first_line(error)})") from error


def set_pixel_limits(image_processor, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
    """Sets how many pixels a picture is scaled to at least and at most; `None` leaves the checkpoint's.

    Raises:
        InputError: Limits that no picture can meet.
    """
    least = image_processor.size["shortest_edge"] if min_pixels is None else int(min_pixels)
    most = image_processor.size["longest_edge"] if max_pixels is None else int(max_pixels)
    if not (isinstance(least, int) and isinstance(most, int) and 0 < least <= most):
        raise InputError(
            f"`min_pixels` must be a number above 0 and not above `max_pixels`, got {least!r} and {most!r}."
        )
    image_processor.size = SizeDict(shortest_edge=least, longest_edge=most)
