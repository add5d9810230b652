"""V-Reflection on Qwen2.5-VL: a model that looks again while it thinks, between `<|sovt|>` and `<|eovt|>`."""

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from .causal_lm_vreflection import ReflectionCausalLMMixin
from .configuration_vreflection import VReflectionConfig
from .generation_vreflection import ReflectionGenerationMixin
from .processing_vreflection import VReflectionProcessor
from .reflection_vreflection import ReflectionModelMixin


class VReflectionModel(ReflectionModelMixin, Qwen2_5_VLModel):
    """The Qwen2.5-VL backbone with BCM and DAC."""

    config: VReflectionConfig


class VReflectionForConditionalGeneration(
    ReflectionGenerationMixin, ReflectionCausalLMMixin, Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL that looks again while it thinks.

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor

    >>> model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    >>> content = [{"type": "image", "image": "scene.png"}, {"type": "text", "text": "Which glyph is on the red cross?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ... )
    >>> sequences = model.generate(**inputs, max_new_tokens=32)
    >>> processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ['K']
    ```
    """

    config: VReflectionConfig
    processor_class = VReflectionProcessor
    # transformers renames the keys of older Qwen2.5-VL checkpoints for its own class only, and would take our modules for
    # layers of the language model.
    stock_key_mapping = {
        r"^visual": "model.visual",
        r"^model(?!\.(language_model|visual|bcm|dac))": "model.language_model",
    }
    model_class = VReflectionModel


# Which class the checkpoint's code is copied for doesn't matter: `save_pretrained` overwrites `auto_map`.
VReflectionForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
