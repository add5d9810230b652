"""V-Reflection for transformers: what a Hub checkpoint carries."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_vreflection import VReflectionConfig
from .modeling_vreflection import VReflectionForConditionalGeneration
from .processing_vreflection import VReflectionProcessor


__version__ = "0.2.0"

# Where the package is installed, the auto classes use it and need no `trust_remote_code`.
AutoConfig.register(VReflectionConfig.model_type, VReflectionConfig)
AutoProcessor.register(VReflectionConfig, VReflectionProcessor)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(VReflectionConfig, VReflectionForConditionalGeneration)

__all__ = ["VReflectionConfig", "VReflectionForConditionalGeneration", "VReflectionProcessor"]
