"""The files of a checkpoint's folder: all that are needed are there, and each can be read by itself."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from ..errors import InputError, reading


# A folder may hold other JSON, such as results.
JSON_FILES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
TEXT_FILES = (CHAT_TEMPLATE_FILE, "merges.txt")
# Of each line one is needed.
NEEDED = (
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "vocab.json"),
    ("tokenizer_config.json",),
)


def refuse_adapter(folder: Path) -> None:
    """An `InputError` for an adapter, which has no weights of a whole model."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise InputError(
            f"{folder}: an adapter; merge it into its base first, vreflection merge {folder} OUTPUT, and take OUTPUT"
        )


def check_folder(folder: Path) -> None:
    """An `InputError` for a folder without config.json, which names the checkpoints in it where there are some."""
    if (folder / CONFIG_NAME).exists():
        return
    refuse_adapter(folder)
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f"; pass one of the folders in it: {', '.join(inside)}" if inside else ""
    raise InputError(f"{folder}: no checkpoint, it has no {CONFIG_NAME}{hint}")


def check_files(folder: Path) -> None:
    """Reads the small files of a checkpoint, each by itself.

    Raises:
        InputError: No checkpoint, see `check_folder`; a file that can't be read, by name.
    """
    check_folder(folder)
    for name in JSON_FILES:
        if _is_there(folder / name):
            read_json_object(folder / name)
    for name in TEXT_FILES:
        if _is_there(folder / name):
            with reading(folder / name):
                (folder / name).read_text(encoding="utf-8")


def check_whole(folder: Path) -> None:
    """Checks that a checkpoint has all its files, and reads the small ones and the headers of the weights.

    Raises:
        InputError: An adapter; a file that is missing or can't be read, by name; weights that are no floats.
    """
    refuse_adapter(folder)
    check_files(folder)
    for names in NEEDED:
        if not any((folder / name).exists() for name in names):
            raise InputError(f"{folder}: the checkpoint has no {' or '.join(names)}")
    quantized = read_json_object(folder / CONFIG_NAME).get("quantization_config")
    for path in find_shards(folder):
        with reading(path, "damaged or incomplete"), safe_open(path, framework="pt") as shard:
            for name in shard.keys():
                dtype = shard.get_slice(name).get_dtype()
                if not dtype.startswith(("F", "BF")) and not quantized:
                    raise InputError(f"{path}: the weight {name} is {dtype}, not a float")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object; an `InputError` that names it if it doesn't."""
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it must hold a JSON object, got {type(content).__name__}")
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair, which no text can hold
    return content


def find_shards(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights; an `InputError` where there are none, or not all that the index names."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():  # transformers looks for it first
        return [whole]
    if not index.exists():
        refuse_adapter(folder)
        raise InputError(
            f"{folder}: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}. Pickled weights (.bin, .pt) are never "
            "opened, for they can run any code: where you trust them, load them with transformers and `save_pretrained` "
            "the model, which writes safetensors"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise InputError(f"{index}: no index of weights, its `weight_map` must give each weight the name of a file")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index}: names a file outside the folder, {outside[0]!r}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"{folder}: {len(missing)} of {len(names)} files with weights aren't there: {', '.join(missing)}"
        )
    return [folder / name for name in names]


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link to nothing is to be named, too
