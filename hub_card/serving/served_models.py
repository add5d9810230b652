"""The models as vLLM runs them: its own of the backbones, with DAC, and pictures alone."""

from functools import cached_property

import torch
from transformers.processing_utils import ProcessorMixin
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseProcessingInfo

from modeling_vreflection.compression_vreflection import DynamicAutoregressiveCompression

from .reflection_state import ReflectionModelState
from .served_options import check_slots
from .server_settings import served_options


class PicturesInfo:
    """What vLLM asks about a processor, of ours; comes before the backbone's class."""

    def get_hf_processor(self, **kwargs):
        # Ours may be of the package or of the checkpoint's code.
        return self.ctx.get_hf_processor(ProcessorMixin, **kwargs)

    def get_supported_mm_limits(self):
        return {"image": None}

    def get_supported_mm_processor_kwargs(self):
        return BaseProcessingInfo.get_supported_mm_processor_kwargs(self)  # Qwen3-VL's adds to those of videos

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        return {"image": self.get_max_image_tokens()}


class PicturesDummyInputs:
    """Pictures to measure memory with."""

    def get_dummy_text(self, mm_counts):
        return "<|vision_start|><|image_pad|><|vision_end|>" * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        width, height = self.info.get_image_size_with_most_features()
        count = mm_counts.get("image", 0)
        overrides = mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)}


class PicturesProcessor:
    """The processor of pictures; refuses prompts before their pictures enter vLLM's caches."""

    def apply(self, inputs, timing_ctx):
        check_slots(self.info.get_hf_config(), inputs.prompt)
        return super().apply(inputs, timing_ctx)

    @cached_property
    def uses_dac(self) -> bool:
        return served_options(self.info.ctx.model_config).uses_dac

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if self.uses_dac:
            # Of pictures in a cached prefix vLLM sends the model only what stays in main memory, and DAC may need them again.
            sizes = hf_inputs.get("image_grid_thw", torch.empty(0, 3)).prod(-1)
            fields["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", sizes, keep_on_cpu=True)
        return fields


class ReflectionServingMixin:
    """A backbone of vLLM with DAC; comes before the backbone's class.

    Attributes:
        dac (`DynamicAutoregressiveCompression`): `None` where latents are states.
        states (`torch.Tensor` of shape `(rows, D)`): Those that the last logits were made of.
        loads (`int`): How often weights were loaded.
    """

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        self.dac, self.states, self.loads = None, None, 0
        if served_options(vllm_config.model_config).uses_dac:
            self.dac = DynamicAutoregressiveCompression(
                config.text_config.hidden_size, config.compression_num_heads, config.num_latent_tokens
            )

    @staticmethod
    def get_model_state_cls():
        return ReflectionModelState

    def compute_logits(self, hidden_states):
        self.states = hidden_states
        return super().compute_logits(hidden_states)

    def load_weights(self, weights):
        self.loads += 1
        loaded = set()
        own = {} if self.dac is None else dict(self.dac.named_parameters(prefix="model.dac"))

        def backbone_weights():
            for name, weight in weights:
                if name in own:
                    own[name].data.copy_(weight)
                    loaded.add(name.removeprefix("model."))
                elif not name.startswith(("model.bcm.", "model.dac.")):
                    yield name, weight

        return super().load_weights(backbone_weights()) | loaded


def served(processor, info, dummy_inputs):
    """Registers a model with the processor of its backbone, for pictures alone."""
    return MULTIMODAL_REGISTRY.register_processor(
        type(processor.__name__, (PicturesProcessor, processor), {}),
        info=type(info.__name__, (PicturesInfo, info), {}),
        dummy_inputs=type(dummy_inputs.__name__, (PicturesDummyInputs, dummy_inputs), {}),
    )


@served(
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class VReflectionForConditionalGeneration(ReflectionServingMixin, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """V-Reflection on Qwen2.5-VL."""


@served(
    qwen3_vl.Qwen3VLMultiModalProcessor,
    qwen3_vl.Qwen3VLProcessingInfo,
    qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class VReflectionQwen3VLForConditionalGeneration(ReflectionServingMixin, qwen3_vl.Qwen3VLForConditionalGeneration):
    """V-Reflection on Qwen3-VL."""
