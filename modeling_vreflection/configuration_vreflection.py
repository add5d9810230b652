"""Architecture of a V-Reflection model: a backbone, three token ids and the two cross-attention modules."""

from dataclasses import dataclass

from transformers import Qwen2_5_VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


CHOICES = {
    "region_pooling": ("patch", "roi_align"),
    "patch_positions": ("none", "sincos"),
    "dac_queries": ("states", "static", "random"),
    "query_position": ("before", "at"),
}


@dataclass(kw_only=True, repr=False)
class ReflectionConfigMixin:
    r"""
    What a reflection adds to a backbone's config; comes before the backbone's class.

    Args:
        num_latent_tokens (`int`, *optional*, defaults to 8):
            Latent steps S of a reflection: the number of `<|lvr|>` slots in a training segment and of BCM's queries.
        latent_start_token_id (`int`, *optional*):
            Id of the token that opens a reflection, `<|sovt|>` in the paper. `None` for all three ids: a stock
            checkpoint whose tokens have not been added yet.
        latent_token_id (`int`, *optional*):
            Id of the slot token, `<|lvr|>`.
        latent_end_token_id (`int`, *optional*):
            Id of the token that closes a reflection, `<|eovt|>`.
        compression_num_heads (`int`, *optional*, defaults to 8):
            Attention heads of BCM and of DAC (App. A.1).
        region_pooling (`str`, *optional*, defaults to `"patch"`):
            What BCM sees of a box: `"patch"`, the merged patches that it overlaps (App. A.1), or `"roi_align"`, 7 x 7
            bins (Sec. 3.2).
        patch_positions (`str`, *optional*, defaults to `"none"`):
            How a look knows where it is: `"none"`, by the features alone (the paper), or `"sincos"`, by a fixed sinusoid of
            each patch's centre that is added to what DAC's keys read, and to both modules' latents under the attention.
        dac_queries (`str`, *optional*, defaults to `"states"`):
            DAC's queries: the model's own `"states"` (Eq. 3), or `"static"` learned ones, or `"random"` Gaussian ones
            (the ablation, Tab. 3 d).
        query_position (`str`, *optional*, defaults to `"before"`):
            Which states query DAC: those that predict the slots (`"before"`), or those at the slots (`"at"`, the
            authors' released code).
        has_bcm (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint carries BCM, the teacher. Inference doesn't need it.
        has_dac (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint carries DAC, the student. Inference needs it for `latent_feedback="dac"` only.
        think_end_token_id (`int`, *optional*):
            Id of `</think>`, of a backbone that thinks in words before it answers: `reflect=True` opens the reflection
            where the answer begins, behind this token and the blank line after it.
    """

    num_latent_tokens: int = 8
    latent_start_token_id: int | None = None
    latent_token_id: int | None = None
    latent_end_token_id: int | None = None
    compression_num_heads: int = 8
    region_pooling: str = "patch"
    patch_positions: str = "none"
    dac_queries: str = "states"
    query_position: str = "before"
    has_bcm: bool = True
    has_dac: bool = True
    think_end_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_reflection()

    def check_reflection(self):
        """Raises a ValueError for a field of the reflection's with a value that isn't allowed."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("num_latent_tokens", "compression_num_heads"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        vocab_size = self.text_config.vocab_size
        for name in ("latent_start_token_id", "latent_token_id", "latent_end_token_id", "think_end_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < vocab_size):
                raise ValueError(f"`{name}` must be one of the {vocab_size} tokens' ids, got {value!r}.")
        hidden_size = self.text_config.hidden_size
        if hidden_size % (heads := self.compression_num_heads):
            raise ValueError(f"`compression_num_heads` ({heads}) must divide the hidden size ({hidden_size}).")
        if self.patch_positions == "sincos" and hidden_size % 4:
            raise ValueError(f"`patch_positions='sincos'` needs a hidden size that 4 divides, got {hidden_size}.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Reads a config; a stock one of the backbone counts as ours without tokens and modules of its own.

        Raises:
            ValueError: A config of another model type.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (model_type := config.get("model_type", cls.model_type)) not in (cls.model_type, cls.backbone_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} has the model type {model_type!r}; {cls.__name__} is of "
                f"{cls.model_type!r}, or a stock {cls.backbone_type!r}."
            )
        return {**config, "model_type": cls.model_type}, kwargs

    @property
    def latent_token_ids(self) -> tuple[int | None, int | None, int | None]:
        """Ids of the start, slot and end token."""
        return self.latent_start_token_id, self.latent_token_id, self.latent_end_token_id


class VReflectionConfig(ReflectionConfigMixin, Qwen2_5_VLConfig):
    """All of [`Qwen2_5_VLConfig`]'s arguments and those of [`ReflectionConfigMixin`]."""

    model_type = "vreflection"
    backbone_type = Qwen2_5_VLConfig.model_type


class VReflectionQwen3VLConfig(ReflectionConfigMixin, Qwen3VLConfig):
    """All of [`Qwen3VLConfig`]'s arguments and those of [`ReflectionConfigMixin`]."""

    model_type = "vreflection_qwen3_vl"
    backbone_type = Qwen3VLConfig.model_type


class VReflectionQwen3VLMoeConfig(ReflectionConfigMixin, Qwen3VLMoeConfig):
    """All of [`Qwen3VLMoeConfig`]'s arguments and those of [`ReflectionConfigMixin`]."""

    model_type = "vreflection_qwen3_vl_moe"
    backbone_type = Qwen3VLMoeConfig.model_type


for config_class in (VReflectionConfig, VReflectionQwen3VLConfig, VReflectionQwen3VLMoeConfig):
    config_class.register_for_auto_class()
    # `transformers serve` offers a model for pictures only if its type is listed here.
    for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        names.setdefault(config_class.model_type, config_class.__name__.replace("Config", "ForConditionalGeneration"))
