"""V-Reflection for transformers: what a Hub checkpoint carries."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .causal_lm_vreflection import MODEL_CLASSES
from .configuration_vreflection import VReflectionConfig, VReflectionQwen3VLConfig, VReflectionQwen3VLMoeConfig
from .modeling_qwen3_vl_moe_vreflection import VReflectionQwen3VLMoeForConditionalGeneration
from .modeling_qwen3_vl_vreflection import VReflectionQwen3VLForConditionalGeneration
from .modeling_vreflection import VReflectionForConditionalGeneration
from .processing_vreflection import VReflectionProcessor, VReflectionQwen3VLProcessor


__version__ = "0.2.0"

# Where the package is installed, the auto classes use it and need no `trust_remote_code`.
for model_class in MODEL_CLASSES.values():
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    AutoProcessor.register(model_class.config_class, model_class.processor_class)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(model_class.config_class, model_class)

__all__ = [
    "VReflectionConfig",
    "VReflectionForConditionalGeneration",
    "VReflectionProcessor",
    "VReflectionQwen3VLConfig",
    "VReflectionQwen3VLForConditionalGeneration",
    "VReflectionQwen3VLMoeConfig",
    "VReflectionQwen3VLMoeForConditionalGeneration",
    "VReflectionQwen3VLProcessor",
]
