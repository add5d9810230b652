"""What a resumed run must have in common with the run that wrote its checkpoint."""

import hashlib
import json
import re
from dataclasses import fields
from typing import Any

from accelerate.utils import is_peft_model


# Of the configuration's own fields, those that change no weight.
NO_WEIGHT = (
    "sample_every", "predict_with_generate", "latent_feedback", "report_to", "logging_nan_inf_filter",
    "on_bad_row",  # a run that stopped at a bad row may go on without it
)  # fmt: skip
# Of transformers', those that do, besides the ones that only move work between processes or steps of accumulation.
TRAINING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "data_seed", "train_sampling_strategy",
    "bf16", "fp16", "neftune_noise_alpha",
)  # fmt: skip
# Of trl's, those of its configuration for answers, and of that for rewards.
OF_TRL = (
    "max_length", "eos_token", "chat_template_path",
    "num_generations", "max_completion_length", "steps_per_generation", "shuffle_dataset", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "beta", "num_iterations", "epsilon",
    "epsilon_high", "delta", "importance_sampling_level", "reward_weights", "multi_objective_aggregation", "scale_rewards",
    "loss_type", "mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "disable_dropout",
)  # fmt: skip
# Of the model's, those that no weight tells.
MODEL = ("region_pooling", "patch_positions", "dac_queries", "query_position")
# Of an adapter's, likewise.
LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
LOOKED_AT = 16


def run_settings(trainer) -> dict[str, Any]:
    """The settings and data of a run, ready for JSON."""
    args = trainer.args
    of_trl = next(kind for kind in type(args).__mro__ if kind.__module__.startswith("trl."))
    inherited = {field.name for field in fields(of_trl)}
    own = [field.name for field in fields(args) if field.name not in inherited]
    names = [*own, *TRAINING, *(name for name in OF_TRL if name in inherited)]
    names = [name for name in names if name not in NO_WEIGHT]
    settings = {name: getattr(args, name) for name in names}
    settings["samples a step"] = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings["use_seedable_sampler"] = args.accelerator_config.use_seedable_sampler
    settings["dtype"] = str(trainer.model.dtype)
    settings |= {name: getattr(trainer.model.config, name) for name in MODEL}
    pixels = trainer.processing_class.image_processor.size
    settings |= {"min_pixels": pixels["shortest_edge"], "max_pixels": pixels["longest_edge"]}
    settings["adapter"] = is_peft_model(trainer.model)
    if settings["adapter"]:
        lora = trainer.model.active_peft_config
        settings |= {name: getattr(lora, name, None) for name in LORA}
        targets = getattr(lora, "target_modules", None)
        settings["target_modules"] = sorted(targets) if isinstance(targets, (set, list)) else targets
    settings["rewards"] = getattr(trainer, "reward_func_names", None)
    settings["training rows"] = describe_rows(trainer.train_dataset)
    return json.loads(json.dumps(settings, default=str))


def describe_rows(rows) -> str | None:
    """How many rows there are, and a hash of the texts and boxes of a few; `None` for a stream, which isn't read twice."""
    if not hasattr(rows, "__len__") or not len(rows):
        return None
    chosen = sorted({len(rows) * number // LOOKED_AT for number in range(LOOKED_AT)})
    content = json.dumps([_without_pictures(rows[index]) for index in chosen])
    return f"{len(rows)} rows, {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _without_pictures(value: Any) -> Any:
    """What JSON can hold of a row: pictures may lie elsewhere when a run goes on."""
    if isinstance(value, dict):
        # A row's number, where it has no `id`, is no content.
        own = {key: one for key, one in value.items() if key != "id" or not re.fullmatch(r"row \d+", str(one))}
        return {key: _without_pictures(one) for key, one in own.items() if key not in ("image", "images")}
    if isinstance(value, (list, tuple)):
        return [_without_pictures(one) for one in value]
    return value if isinstance(value, (str, int, float)) else None
