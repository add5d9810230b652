"""What a checkpoint is, and the configurations and the processor that it gets as one of ours."""

import inspect
from collections.abc import Collection
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import NamedTuple

from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from modeling_vreflection import VReflectionConfig, VReflectionProcessor
from modeling_vreflection.causal_lm_vreflection import MODEL_CLASSES
from modeling_vreflection.decoding_vreflection import ReflectionOptions
from modeling_vreflection.processing_vreflection import LATENT_TOKENS

from ..errors import InputError, reading
from ..inference.checkpoint_files import read_json_object
from ..inference.checkpoints import CHECKPOINT_CLASSES, checkpoint_config
from .layouts import MODULES, holds_module


# Where the authors' config.json keeps the ids of their tokens: start, slot, end, and one that their model never emits.
LVR_TOKENS = {
    "lvr_start_id": "<|lvr_start|>",
    "lvr_id": "<|lvr|>",
    "lvr_end_id": "<|lvr_end|>",
    "lvr_latent_end_id": "<|lvr_latent_end|>",
}
IMAGE_TOKEN = "<|image_pad|>"
# What generation_config.json says about reflections.
REFLECTION_ENTRIES = tuple(field.name for field in dataclass_fields(ReflectionOptions))
# The authors' modules have a head for every 64 dimensions, and no more than 8.
MOST_HEADS, HEAD_SIZE = 8, 64


class Target(NamedTuple):
    """What a checkpoint becomes, but for its weights."""

    config: VReflectionConfig
    processor: VReflectionProcessor
    generation_config: GenerationConfig
    first_new_id: int | None  # of three tokens that the checkpoint doesn't know yet
    stored_vocabulary: int  # the rows of its embeddings, before they grow for such tokens


def describe(folder: Path, names: Collection[str], inference_only: bool) -> Target:
    """Finds out what a checkpoint with weights of these names is, and what it becomes.

    Raises:
        InputError: Neither a backbone nor made from one; one of ours, but for `inference_only`; a mixture of experts, whose
            weights transformers stores in another form; files that can't be read, or that contradict one another.
    """
    with reading(folder):
        fields = read_json_object(folder / CONFIG_NAME)
        model_type = fields.get("model_type")
        if model_type in CHECKPOINT_CLASSES:
            if not inference_only:
                raise InputError(
                    f"{folder}: a V-Reflection checkpoint already; what can be done is to drop what decoding doesn't need, "
                    "with --inference-only"
                )
            config = checkpoint_config(folder)
            processor_class = CHECKPOINT_CLASSES[model_type].processor_class
            processor = processor_class.from_pretrained(folder, trust_remote_code=False)  # no code of its own runs
            first_new_id, stored_vocabulary = None, config.text_config.vocab_size
        elif model_type in MODEL_CLASSES and not get_checkpoint_conversion_mapping(model_type):
            config, processor, first_new_id, stored_vocabulary = from_stock_layout(folder, fields, names)
        else:
            raise InputError(
                f"{folder}: its model type is {model_type!r}, which can't be converted file by file"
                + (": load it with `from_backbone`, and save it" if model_type in MODEL_CLASSES else "")
            )
        decoding = converted_generation_config(folder, config)
        if inference_only:
            config.has_bcm, config.has_dac = False, config.has_dac and decoding.latent_feedback == "dac"
    return Target(config, processor, decoding, first_new_id, stored_vocabulary)


def from_stock_layout(folder: Path, fields: dict, names: Collection[str]) -> tuple:
    """What a checkpoint becomes whose model type is a backbone's: a `Target` without its generation config."""
    # No code of the checkpoint's runs.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model_class = MODEL_CLASSES[fields["model_type"]]
    backbone = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    known = tokenizer.get_vocab()
    if known.get(IMAGE_TOKEN) != backbone.image_token_id:
        raise InputError(
            f"{folder}: {IMAGE_TOKEN} is {backbone.image_token_id} in config.json (image_token_id) and "
            f"{known.get(IMAGE_TOKEN)} in the tokenizer, whose files must lie beside the weights"
        )
    own = architecture(backbone)
    vocabulary = backbone.text_config.vocab_size
    if "<|lvr_start|>" in known or any(fields.get(name) is not None for name in LVR_TOKENS):
        tokens, first_new_id = tuple(LVR_TOKENS.values())[:3], None
        ids = lvr_ids(folder, fields, known)
        own |= their_modules(fields, names, backbone.text_config.hidden_size)
    else:
        tokens, first_new_id = LATENT_TOKENS, len(tokenizer)
        ids = tuple(range(first_new_id, first_new_id + 3))
        own |= {"has_bcm": False, "has_dac": False}  # nothing has trained them
        own["patch_positions"] = "sincos"  # as `from_backbone` has it
        own["text_config"]["vocab_size"] = max(vocabulary, ids[-1] + 1)
    own |= dict(zip(("latent_start_token_id", "latent_token_id", "latent_end_token_id"), ids))
    if max(ids) >= own["text_config"]["vocab_size"]:
        raise InputError(
            f"{folder}: the tokenizer gives {tokens[ids.index(max(ids))]} the id {max(ids)}, and the embedding has only "
            f"{vocabulary} rows"
        )
    config = model_class.config_class(**own)
    processor = model_class.processor_class.from_backbone(
        folder, tokens, config.num_latent_tokens, trust_remote_code=False
    )
    config.think_end_token_id = processor.think_end_token_id
    found = tuple(processor.tokenizer.convert_tokens_to_ids(list(tokens)))
    if found != ids:
        raise InputError(f"{folder}: the tokenizer gives {', '.join(tokens)} the ids {found}, not {ids}")
    return config, processor, first_new_id, vocabulary


def architecture(backbone: PreTrainedConfig) -> dict:
    """A backbone's own fields alone: config.json may hold the authors' loss weights, and what a run had set for itself."""
    own = {name: getattr(backbone, name) for name in inspect.get_annotations(type(backbone))}
    for part in ("text_config", "vision_config"):
        section = own[part]
        own[part] = {name: getattr(section, name) for name in inspect.get_annotations(type(section))}
    # Training turns it off, and a checkpoint from its midst says so.
    del own["text_config"]["use_cache"]
    return own


def lvr_ids(folder: Path, fields: dict, known: dict[str, int]) -> tuple[int, ...]:
    """The ids of the start, slot and end token, about which config.json and the tokenizer must agree."""
    for name, token in LVR_TOKENS.items():
        if token not in known and name != "lvr_latent_end_id":
            raise InputError(f"{folder}: the tokenizer has no token {token}, which config.json speaks of")
        if token in known and fields.get(name) not in (None, known[token]):
            raise InputError(
                f"{folder}: {token} is {fields[name]} in config.json ({name}) and {known[token]} in the tokenizer"
            )
    return tuple(known[token] for token in list(LVR_TOKENS.values())[:3])


def their_modules(fields: dict, names: Collection[str], hidden_size: int) -> dict:
    """Which of the two modules a checkpoint of the authors' layout has or should have, and the fields that describe them."""
    present = {
        ours: bool(fields.get(flag)) or any(holds_module(name, ours) for name in names)
        for ours, (_, flag) in MODULES.items()
    }
    own = {f"has_{ours}": has for ours, has in present.items()}
    own["num_latent_tokens"] = fields.get("num_latent_tokens", 8)
    if any(present.values()):
        heads = max(1, min(MOST_HEADS, hidden_size // HEAD_SIZE))
        own |= {"query_position": "at", "compression_num_heads": heads}
    return own


def converted_generation_config(folder: Path, config: VReflectionConfig) -> GenerationConfig:
    """A checkpoint's generation config with how it reflects, by its own states where it carries no DAC."""
    entries = {}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        with reading(folder / GENERATION_CONFIG_NAME):
            entries = GenerationConfig.from_pretrained(folder).to_diff_dict()
    known = vars(GenerationConfig())
    decoding = GenerationConfig(**{name: value for name, value in entries.items() if name in known})
    decoding.use_cache = True
    decoding._from_model_config = False  # else it wouldn't keep the entries below, which transformers doesn't know
    entries = {"latent_steps": config.num_latent_tokens, "latent_feedback": "hidden", **entries}
    for name in REFLECTION_ENTRIES:
        if name in entries:
            setattr(decoding, name, entries[name])
    if not config.has_dac:
        decoding.latent_feedback, decoding.latent_tolerance = "hidden", None
    with reading(folder / GENERATION_CONFIG_NAME, "can't be used"):
        decoding.validate(strict=True)  # else it can be loaded, and not saved
        ReflectionOptions.resolve(config, decoding)
        return decoding
