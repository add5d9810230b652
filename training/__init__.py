"""V-Reflection's training through trl's SFTTrainer and GRPOTrainer. The public names are imported when they are first used."""

import logging
from importlib import import_module


# trl imports bitsandbytes where it is installed, which warns on every machine without its kernels for the CPU.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)

PUBLIC = {
    "VReflectionDataCollator": "vreflection_training.collator",
    "VReflectionGRPOConfig": "vreflection_training.grpo_config",
    "VReflectionGRPOTrainer": "vreflection_training.grpo_trainer",
    "VReflectionSFTConfig": "vreflection_training.sft_config",
    "VReflectionSFTTrainer": "vreflection_training.sft_trainer",
    "__version__": "modeling_vreflection",
}

__all__ = [name for name in PUBLIC if not name.startswith("_")]


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
