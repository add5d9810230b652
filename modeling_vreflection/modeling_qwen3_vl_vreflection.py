"""V-Reflection on Qwen3-VL, whose layers get DeepStack's features of the images in every pass."""

from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLModel

from .causal_lm_vreflection import ReflectionCausalLMMixin
from .configuration_vreflection import VReflectionQwen3VLConfig
from .generation_vreflection import ReflectionGenerationMixin
from .processing_vreflection import VReflectionQwen3VLProcessor
from .reflection_vreflection import ReflectionModelMixin


class VReflectionQwen3VLModel(ReflectionModelMixin, Qwen3VLModel):
    """The Qwen3-VL backbone with BCM and DAC."""

    config: VReflectionQwen3VLConfig


class VReflectionQwen3VLForConditionalGeneration(
    ReflectionGenerationMixin, ReflectionCausalLMMixin, Qwen3VLForConditionalGeneration
):
    """Qwen3-VL that looks again while it thinks; used as [`VReflectionForConditionalGeneration`] is."""

    config: VReflectionQwen3VLConfig
    processor_class = VReflectionQwen3VLProcessor
    model_class = VReflectionQwen3VLModel


VReflectionQwen3VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
