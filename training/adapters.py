"""LoRA and QLoRA through peft: what an adapter of V-Reflection trains and holds, and how it becomes a plain checkpoint."""

import copy
import re
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig, GenerationConfig
from trl import ModelConfig
from trl import get_quantization_config as get_stock_quantization_config

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.configuration_vreflection import ReflectionConfigMixin
from vreflection_hub_card.card import read_training_facts, write_training_facts
from vreflection_hub_card.errors import InputError

from .loading import is_stock, load_model_and_processor
from .sft_config import VReflectionSFTConfig


LANGUAGE_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")
# The fields that decide what BCM and DAC are and do: an adapter means the same only on a base that has them too.
REFLECTION_FIELDS = tuple(name for name in ReflectionConfigMixin.__annotations__ if not name.endswith("_token_id"))


def complete_peft_config(
    peft_config: LoraConfig, model: VReflectionForConditionalGeneration, args: VReflectionSFTConfig
) -> LoraConfig:
    """Adds to a LoRA configuration what V-Reflection trains besides the adapters.

    That is BCM and DAC as far as the stage trains them, in `modules_to_save`, and the rows of the three latent tokens,
    in `trainable_token_indices`: of the input embeddings, and of the output head where it isn't tied to them. On a
    stock backbone the module that the stage leaves alone is saved too, since it was drawn at random and another draw
    would come with the reload; [`prepare_adapter`] keeps it as it is.

    The adapters go where `target_modules` says, by default to the linear layers of the language model, and with
    `freeze_vision=False` of the vision encoder. They never go into BCM or DAC, which train whole, nor into a frozen
    vision encoder, though some of their layers have the same names. The experts of a mixture are no linear layers: of
    its language model the default reaches the attention alone.

    Returns a copy; what the user passed is not changed.

    Raises:
        TypeError: Another configuration than LoRA's.
        ValueError: A base that an adapter can't name, a quantized one without `bf16`, or a setting that contradicts the
            stage or `freeze_vision`.
    """
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"`peft_config` must be a `peft.LoraConfig`, got `{type(peft_config).__name__}`.")
    if peft_config.bias == "all":
        raise ValueError("`bias='all'` trains the biases of frozen modules as well: use 'lora_only' or 'none'.")
    if getattr(model, "is_quantized", False) and not args.bf16:
        raise ValueError("A quantized base needs `bf16=True`: trl trains the adapters on it in bfloat16.")
    config = copy.deepcopy(peft_config)
    config.task_type = config.task_type or "CAUSAL_LM"
    # The exact base: a branch of a Hub repository moves on. There is none for a folder.
    config.revision = config.revision or getattr(model.config, "_commit_hash", None)
    names = [name for name, _ in model.named_modules()]
    _complete_targets(config, names, args)
    _complete_modules(config, names, args, _redraws_modules(model))
    _complete_tokens(config, model)
    return config


def prepare_adapter(model: PeftModel, args: VReflectionSFTConfig):
    """Sets which of the parameters that a fresh adapter holds train, and their precision.

    peft trains all of `modules_to_save`: the module that the stage leaves alone is frozen. With mixed precision BCM, DAC
    and the token rows are float32, from the base's exact values, since bfloat16 swallows the small steps of an
    optimiser; trl rounds them to bfloat16 on a quantized base. DeepSpeed keeps float32 copies of its own.
    """
    upcast = (args.bf16 or args.fp16) and args.deepspeed_plugin is None
    for name in ("bcm", "dac"):
        held = getattr(model.get_base_model().model, name)
        if isinstance(held, ModulesToSaveWrapper):
            if upcast:
                exact = held.original_module.state_dict()
                held.modules_to_save[model.active_adapter].float().load_state_dict(exact)
            held.modules_to_save.requires_grad_(name in args.trains)
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and upcast:
            for adapter, rows in layer.trainable_tokens_delta.items():
                rows.data = layer.trainable_tokens_original[adapter].float().clone()


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """trl's `get_quantization_config`, without the vision encoder, and without the head, BCM and DAC, which train."""
    config = get_stock_quantization_config(model_args)
    if config is not None:
        # Full names: transformers matches them from the start, and "bcm" alone would match nothing.
        config.llm_int8_skip_modules = ["lm_head", "model.visual", "model.bcm", "model.dac"]
    return config


def save_base_configs(model: PeftModel, save_directory: str | Path):
    """Writes the base's config.json and generation_config.json next to an adapter, for [`load_adapter`]."""
    base = model.get_base_model()
    base.config.save_pretrained(save_directory)
    base.generation_config.save_pretrained(save_directory)


def load_adapter(adapter: str | Path, **kwargs) -> tuple[PeftModel, VReflectionProcessor]:
    """Loads an adapter, a folder or Hub id, that [`VReflectionSFTTrainer`] saved, on a fresh copy of the base that it names.

    Further arguments go to [`~PreTrainedModel.from_pretrained`] for the base: `dtype`, to which BCM, DAC and the token rows
    are rounded too; the same `quantization_config`, for a base that was quantized in training.

    Raises:
        ValueError: A base whose latent tokens have other ids than the adapter's.
    """
    adapter = str(adapter)
    config = AutoConfig.from_pretrained(adapter, trust_remote_code=False)
    fields = {name: getattr(config, name) for name in REFLECTION_FIELDS}
    peft_config = PeftConfig.from_pretrained(adapter)
    base_name = peft_config.base_model_name_or_path
    if Path(base_name).is_absolute() and not Path(base_name).is_dir():
        raise InputError(
            f"{adapter}: its base {base_name} is gone: put it back, or name its new place in adapter_config.json"
        )
    if peft_config.revision is not None:
        fields["revision"] = peft_config.revision
    base, _ = load_model_and_processor(base_name, **{**fields, **kwargs})
    if base.config.latent_token_ids != config.latent_token_ids:
        raise ValueError(
            f"The adapter {adapter!r} trained latent tokens with the ids {config.latent_token_ids}, and its base "
            f"{base_name!r} has them at {base.config.latent_token_ids}: this is another base than it was trained on."
        )
    base.generation_config = GenerationConfig.from_pretrained(adapter)
    return PeftModel.from_pretrained(base, adapter), AutoProcessor.from_pretrained(adapter, trust_remote_code=False)


def merge_adapter(adapter: str | Path, output_dir: str | Path, **kwargs):
    """Merges an adapter into its base and saves a plain V-Reflection checkpoint, which loads without peft.

    A base that was quantized in training is loaded unquantized here: the checkpoint is the exact sum, whose outputs
    differ from the quantized model's by the error of the quantization. The arguments are [`load_adapter`]'s.

    Raises:
        ValueError: An `output_dir` that is the adapter's or the base's; a base whose own checkpoint is quantized.
    """
    base_name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    for source in (adapter, base_name):
        if Path(source).resolve() == Path(output_dir).resolve():
            raise ValueError(f"The merged checkpoint would be written over what it is made of: {source}.")
    model, processor = load_adapter(adapter, **kwargs)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"The base {base_name!r} is quantized: an adapter merges exactly into full weights only.")
    model.merge_and_unload(safe_merge=True).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    if (facts := read_training_facts(Path(adapter))) is not None:
        write_training_facts(Path(output_dir), facts)


def _redraws_modules(model: VReflectionForConditionalGeneration) -> bool:
    """Whether a reload of the base draws new weights for BCM and DAC."""
    base = model.name_or_path
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(
            f"An adapter holds no base weights, only the base's name, and there is nothing at {base!r}: save the base "
            "with `save_pretrained`, and start from that folder."
        )
    return is_stock(base)


def _complete_targets(config: LoraConfig, names: list[str], args: VReflectionSFTConfig):
    """Sets `target_modules` and `exclude_modules`."""
    closed = r"model\.(bcm|dac|visual)\..+" if args.freeze_vision else r"model\.(bcm|dac)\..+"
    if config.target_modules is None:
        config.target_modules = set(LANGUAGE_LAYERS) if args.freeze_vision else "all-linear"
    elif config.target_modules != "all-linear":
        _check_targets(config, names, args, closed)
    theirs = config.exclude_modules
    if theirs and not isinstance(theirs, str):
        theirs = rf"(.+\.)?({'|'.join(map(re.escape, sorted(theirs)))})"
    config.exclude_modules = f"({theirs})|({closed})" if theirs else closed


def _check_targets(config: LoraConfig, names: list[str], args: VReflectionSFTConfig, closed: str):
    """Raises where the user's `target_modules` and what is closed to adapters contradict each other."""
    if isinstance(config.target_modules, str):
        reached = {config.target_modules: [name for name in names if re.fullmatch(config.target_modules, name)]}
    else:
        reached = {target: _called(target, names) for target in sorted(config.target_modules)}
    for target, found in reached.items():
        if found and all(re.fullmatch(closed, name) for name in found):
            raise ValueError(
                f"`target_modules`: {target!r} means {found[0]} and the like, and no adapter goes into BCM, DAC or a "
                "frozen vision encoder. Leave it out; for the vision encoder set `freeze_vision=False`."
            )
        for name in found:
            if name.rpartition(".")[2] in VOCABULARY:
                raise ValueError(
                    f"`target_modules`: {target!r} means {name}, which takes no adapter, because rows of it train by "
                    "themselves. List more tokens in `trainable_token_indices` instead."
                )
    in_vision = any(name.startswith("model.visual.") for found in reached.values() for name in found)
    if not args.freeze_vision and not in_vision and "visual" not in (config.modules_to_save or ()):
        raise ValueError(
            "`freeze_vision=False`, but nothing in `target_modules` is in the vision encoder, which would stay as it "
            "is: add names of its layers, set 'all-linear', or leave `freeze_vision` out."
        )


def _complete_modules(config: LoraConfig, names: list[str], args: VReflectionSFTConfig, is_stock: bool):
    """Sets `modules_to_save`."""
    ours = [name for name in ("bcm", "dac") if f"model.{name}" in names]
    trained = args.trains
    # Parts of BCM and DAC never train by themselves, and those of the other stage not at all.
    closed = [f"model.{name}." if name in trained else f"model.{name}" for name in ours]
    closed += ["model.visual"] if args.freeze_vision else []
    for asked in config.modules_to_save or ():
        for name in _called(asked, names):
            if name.startswith(tuple(closed)):
                raise ValueError(
                    f"`modules_to_save`: {asked!r} means {name}, which stage {args.stage!r} with "
                    f"`freeze_vision={args.freeze_vision}` doesn't train by itself. Leave it out, or write the full name "
                    "of the one that you mean."
                )
    held = [name for name in ours if name in trained or is_stock]
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *held])) or None


def _complete_tokens(config: LoraConfig, model: VReflectionForConditionalGeneration):
    """Sets `trainable_token_indices`."""
    tied = model.config.tie_word_embeddings
    indices = config.trainable_token_indices or {}
    indices = dict(indices) if isinstance(indices, dict) else {"embed_tokens": indices}
    whole = {name for name in VOCABULARY if any(_called(asked, [name]) for asked in config.modules_to_save or ())}
    if tied and (whole or "lm_head" in indices):
        raise ValueError(
            "The output head is tied to the input embeddings, and both train as one: list tokens under `embed_tokens` in "
            "`trainable_token_indices`, and leave `embed_tokens` and `lm_head` out of `modules_to_save`."
        )
    for name in VOCABULARY[:1] if tied else VOCABULARY:
        if name not in whole:
            indices[name] = sorted({*indices.get(name, ()), *model.config.latent_token_ids})
    config.trainable_token_indices = indices or None


def _called(asked: str, names: list[str]) -> list[str]:
    """The modules that a name in a list of peft's means: those whose path ends with it."""
    return [name for name in names if name == asked or name.endswith(f".{asked}")]
