"""V-Reflection for transformers: what a Hub checkpoint carries."""

from .configuration_vreflection import VReflectionConfig
from .modeling_vreflection import VReflectionForConditionalGeneration
from .processing_vreflection import VReflectionProcessor


__all__ = ["VReflectionConfig", "VReflectionForConditionalGeneration", "VReflectionProcessor"]
