"""What a result file states so that it can be reproduced: checkpoint, versions, machine."""

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from modeling_vreflection import VReflectionForConditionalGeneration


# Of `generate`, without a flag of the same name.
CHECKPOINT_OPTIONS = ("reflect", "latent_tolerance", "reflect_threshold", "max_reflections")
PACKAGES = ("vreflection", "torch", "transformers")


def describe_model(model: VReflectionForConditionalGeneration, folder: Path, name: str | None = None) -> dict:
    """The checkpoint's name, a Hub id or its folder's name without the path; its weights' hashes; how it computed."""
    is_hub_id = name is not None and not Path(name).exists()
    return {
        "name": name if is_hub_id else folder.resolve().name,
        "sha256": {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))},
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def describe_machine(device: torch.device) -> dict:
    """The processor, the number of its cores and torch's threads, and the GPU if it was used."""
    machine = {
        "system": platform.system(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def processor_name() -> str:
    """The processor's name; on Linux, where `platform` knows the architecture alone, from a file."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def option_flags(options: dict) -> list[str]:
    """Flags of `vreflection evaluate` that repeat options; those that only a generation config can set have none."""
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in options.items()
        if value is not None and name not in CHECKPOINT_OPTIONS
    ]
    return flags + {True: ["--reflect"], False: ["--no-reflect"]}.get(options.get("reflect"), [])


def sha256(path: Path) -> str:
    """The hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
