"""V-Reflection's training: the two stages through trl's SFTTrainer."""

from .collator import VReflectionDataCollator
from .configs import VReflectionSFTConfig
from .trainer import VReflectionSFTTrainer


__all__ = ["VReflectionDataCollator", "VReflectionSFTConfig", "VReflectionSFTTrainer"]
