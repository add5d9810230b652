"""V-Reflection's training through trl's SFTTrainer. The public names are imported when they are first used."""

import logging
from importlib import import_module


# trl imports bitsandbytes where it is installed, which warns on every machine without its kernels for the CPU.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)

PUBLIC = {
    "VReflectionDataCollator": "vreflection_training.collator",
    "VReflectionSFTConfig": "vreflection_training.sft_config",
    "VReflectionSFTTrainer": "vreflection_training.sft_trainer",
    "__version__": "modeling_vreflection",
}

__all__ = ["VReflectionDataCollator", "VReflectionSFTConfig", "VReflectionSFTTrainer"]


def __getattr__(name: str):
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
