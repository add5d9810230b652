"""Gets what a run starts from: model and processor."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.causal_lm_vreflection import MODEL_CLASSES
from vreflection_hub_card.embedded import resolve_embedded
from vreflection_hub_card.errors import InputError, reading
from vreflection_hub_card.inference.checkpoint_files import check_whole
from vreflection_hub_card.inference.checkpoints import check_model, check_processor

from .tiny import save_tiny_backbone


def is_stock(model_name_or_path: str, revision: str = "main") -> bool:
    """Whether a checkpoint is a stock one of a backbone rather than a V-Reflection one; an `InputError` for what is neither."""
    return _model_type(model_name_or_path, revision) in MODEL_CLASSES


def _model_type(model_name_or_path: str, revision: str) -> str:
    """A checkpoint's model type, of ours or of a backbone; the files of a folder are checked."""
    if os.path.isdir(model_name_or_path):
        check_whole(Path(model_name_or_path))
    with reading(model_name_or_path, "its configuration can't be read"):
        fields, _ = PreTrainedConfig.get_config_dict(model_name_or_path, revision=revision)
    known = (*MODEL_CLASSES, *(model.config_class.model_type for model in MODEL_CLASSES.values()))
    if (model_type := fields.get("model_type")) not in known:
        raise InputError(f"{model_name_or_path}: its model type is {model_type!r}, not one of {', '.join(known)}")
    return model_type


def load_model_and_processor(
    model_name_or_path: str, **kwargs
) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """Loads a V-Reflection checkpoint (`"vreflection_tiny"`: the embedded one), or makes one from a backbone's stock one.

    Raises:
        InputError: No such checkpoint; a file of it that can't be read, by name; a processor that doesn't fit the model;
            weights that aren't finite, or that can't answer a question.
    """
    model_name_or_path = resolve_embedded(model_name_or_path)
    revision = kwargs.get("revision", "main")
    stock = is_stock(model_name_or_path, revision)
    with reading(model_name_or_path, "can't be loaded"):
        if stock:
            model, processor = VReflectionForConditionalGeneration.from_backbone(model_name_or_path, **kwargs)
        else:
            model = AutoModelForImageTextToText.from_pretrained(
                model_name_or_path, **{"trust_remote_code": False, **kwargs}
            )
            processor = AutoProcessor.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
    check_processor(model_name_or_path, processor, model.config)
    # Each of several processes may hold a part of the weights, and a quantized model may answer on a GPU alone.
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not getattr(model, "is_quantized", False):
        check_model(model_name_or_path, model, processor)
    if stock and is_deepspeed_zero3_enabled():
        write_sharded_token_rows(model)
    if not stock and "num_latent_tokens" in kwargs:
        set_num_slots(processor, model.config, kwargs["num_latent_tokens"])
        model.generation_config.latent_steps = model.config.num_latent_tokens
    return model, processor


def set_num_slots(processor: VReflectionProcessor, config: PreTrainedConfig, num_latent_tokens: int) -> None:
    """Renders reflections with another S than the checkpoint's, which one without BCM can take."""
    start, slot, end = processor.tokenizer.convert_ids_to_tokens(list(config.latent_token_ids))
    was, new = (start + slot * steps + end for steps in (processor.num_latent_tokens, num_latent_tokens))
    processor.chat_template = processor.chat_template.replace(was, new)
    processor.num_latent_tokens = num_latent_tokens


def write_sharded_token_rows(model: VReflectionForConditionalGeneration):
    """Under ZeRO-3 weights are empty outside of a gathering: what `add_latent_tokens` wrote has to be written again."""
    import deepspeed

    first = model.config.latent_start_token_id
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = list({id(module.weight): module.weight for module in modules}.values())  # the same order on every rank
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0), torch.no_grad():
        for weight in weights:
            weight[first : first + 3] = weight[:first].float().mean(0).to(weight.dtype)


def load_processor(model_name_or_path: str, revision: str = "main", **config) -> VReflectionProcessor:
    """Loads the processor alone, or makes one; `config` are fields of the model's config. Raises as the model's loading."""
    model_name_or_path = resolve_embedded(model_name_or_path)
    model_type = _model_type(model_name_or_path, revision)
    with reading(model_name_or_path, "its processor can't be loaded"):
        if model_type in MODEL_CLASSES:
            steps = {name: value for name, value in config.items() if name == "num_latent_tokens"}
            processor_class = MODEL_CLASSES[model_type].processor_class
            return processor_class.from_backbone(model_name_or_path, revision=revision, **steps)
        own = AutoConfig.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(model_name_or_path, revision=revision, trust_remote_code=False)
    check_processor(model_name_or_path, processor, own)
    if config.get("num_latent_tokens", processor.num_latent_tokens) != processor.num_latent_tokens:
        set_num_slots(processor, own, config["num_latent_tokens"])
    return processor


def build_tiny(
    seed: int, model_type: str = "qwen2_5_vl", **kwargs
) -> tuple[VReflectionForConditionalGeneration, VReflectionProcessor]:
    """Makes the untrained tiny model of a backbone, which depends on the seed alone."""
    with tempfile.TemporaryDirectory() as folder:
        backbone = save_tiny_backbone(folder, seed, model_type)
        return VReflectionForConditionalGeneration.from_backbone(backbone, **kwargs)
