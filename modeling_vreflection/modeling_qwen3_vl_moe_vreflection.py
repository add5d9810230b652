"""V-Reflection on the sizes of Qwen3-VL that are mixtures of experts."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeModel

from .causal_lm_vreflection import ReflectionCausalLMMixin
from .configuration_vreflection import VReflectionQwen3VLMoeConfig
from .generation_vreflection import ReflectionGenerationMixin
from .processing_vreflection import VReflectionQwen3VLProcessor
from .reflection_vreflection import ReflectionModelMixin


class VReflectionQwen3VLMoeModel(ReflectionModelMixin, Qwen3VLMoeModel):
    """The Qwen3-VL (mixture of experts) backbone with BCM and DAC."""

    config: VReflectionQwen3VLMoeConfig


class VReflectionQwen3VLMoeForConditionalGeneration(
    ReflectionGenerationMixin, ReflectionCausalLMMixin, Qwen3VLMoeForConditionalGeneration
):
    """Qwen3-VL (mixture of experts) that looks again while it thinks; used as [`VReflectionForConditionalGeneration`] is."""

    config: VReflectionQwen3VLMoeConfig
    processor_class = VReflectionQwen3VLProcessor
    model_class = VReflectionQwen3VLMoeModel


VReflectionQwen3VLMoeForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# transformers stores the experts' weights transposed, and knows it by the model type.
register_checkpoint_conversion_mapping(
    VReflectionQwen3VLMoeConfig.model_type,
    get_checkpoint_conversion_mapping(VReflectionQwen3VLMoeConfig.backbone_type),
    overwrite=True,
)
