"""What a run notes about itself next to its weights, and the model card made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import trl
from huggingface_hub import ModelCard

from modeling_vreflection.decoding_vreflection import ReflectionOptions
from vreflection_hub_card.card import read_training_facts, render_card
from vreflection_hub_card.card.card_check import is_hub_id
from vreflection_hub_card.card.checkpoint import Checkpoint, read_weights
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions

from ..data.sources import GLYPHSEARCH
from ..losses import loss_weights
from ..stages import STAGES


# The options of a source that the facts name: they hold no path.
SOURCE_OPTIONS = (
    "name",
    "revision",
    "split",
    "paths",
    "balanced",
    "answers",
    "num_latent_tokens",
    "weight",
    "difficulty",
    "start",
    "count",
    "crops",
    "lists",
    "scenes",
)
OPTIMISER_OPTIONS = (
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
)


# Of rows that a trainer got from Python, nobody knows from where.
IN_PYTHON = {"format": "messages", "local": "rows given in Python"}


class RunOrigin:
    """What a run started from, noted at its start: its output may land in the folder that it was loaded from.

    `started_from` is a Hub id or a folder; `sources` are the training data's, see `load_rows`. Raises an `InputError` where
    the folder has damaged training facts.
    """

    def __init__(self, started_from: str | None, sources: list[dict] | None = None, from_scratch: bool = False):
        started_from = None if from_scratch else started_from or None
        self.started_from = started_from and public_name(started_from)
        self.data = [public_source(source) for source in sources] if sources else [IN_PYTHON]
        self.earlier = read_training_facts(Path(started_from)) if started_from else None
        if self.earlier is None:
            base_model = None if started_from is None or is_local(started_from) else started_from
            self.earlier = {"base_model": base_model, "from_scratch": from_scratch, "runs": []}

    def facts(self, args, *, steps: int, max_steps: int, versions: dict[str, str], **more) -> dict[str, Any]:
        """The content of `training_facts.json`: the earlier runs, and this one.

        Of `max_steps`, which were meant to be made, a warm-up may be a share; `more` is `tokens`, `machine`, `adapter`,
        `rewards`, `exact_match`, where known.
        """
        stage, options = STAGES[args.stage], args.to_dict()
        optimiser = {name: options[name] for name in OPTIMISER_OPTIONS}
        batch = {
            "per_device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "processes": args.world_size,
        }
        if options.get("sample_packing"):
            batch |= {"samples_per_pack": args.max_samples_per_pack, "max_length": args.max_length}
        run = {
            "stage": args.stage,
            "title": stage.title,
            "started_from": self.started_from,
            "data": self.data,
            "losses": loss_weights(args),
            "options": {name: options[name] for name in stage.options if options[name] is not None},
            "optimiser": optimiser | {"warmup_steps": args.get_warmup_steps(max_steps)},
            "batch": batch,
            "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
            "seed": args.seed,
            "steps": steps,
            **more,
            "versions": versions,
        }
        return {**self.earlier, "runs": [*self.earlier["runs"], run]}


def is_local(name: str) -> bool:
    """Whether this is the path of a file or folder, and no Hub id."""
    return Path(name).exists() or not is_hub_id(name)


def public_name(name: str) -> str:
    """A Hub id as it is; of a path its last part."""
    return Path(name).resolve().name if is_local(name) else name


def public_source(source: dict[str, Any]) -> dict[str, Any]:
    """A source of data without a path: a Hub id, or the name of a file or folder."""
    described = {"format": source.get("format", "messages")}
    if described["format"] not in GLYPHSEARCH:
        described["local" if is_local(source["path"]) else "dataset"] = public_name(source["path"])
    return described | {name: source[name] for name in SOURCE_OPTIONS if source.get(name) is not None}


def trainer_facts(trainer) -> dict[str, Any]:
    """The content of `training_facts.json` at a moment of a trainer's run."""
    adapter = getattr(trainer.model, "peft_config", {}).get("default")
    more = {}
    if adapter is not None:
        more["adapter"] = {name: getattr(adapter, name) for name in ("r", "lora_alpha") if hasattr(adapter, name)}
    if rewards := getattr(trainer, "reward_func_names", None):
        more["rewards"] = rewards
    if found := last_exact_match(trainer.state.log_history):
        more["exact_match"] = found
    return trainer.origin.facts(
        trainer.args,
        steps=trainer.state.global_step,
        max_steps=trainer.state.max_steps,
        tokens=trainer.progress.num_tokens,
        machine=describe_machine(trainer.args.device),
        versions=describe_versions() | {"trl": trl.__version__, "accelerate": accelerate.__version__},
        **more,
    )


def last_exact_match(history: list[dict[str, Any]]) -> dict[str, float]:
    """The shares of exact answers at the last evaluation, by the names that they were logged under, and its `step`."""
    logs = [log for log in history if any("_exact_match" in name for name in log)]
    # Several sets are logged one after the other, at the same step.
    last = {name: share for log in logs for name, share in log.items() if log["step"] == logs[-1]["step"]}
    return {name: share for name, share in last.items() if name == "step" or "_exact_match" in name}


def trainer_card(
    trainer, model_name: str | None, dataset_name: str | None, tags: str | Sequence[str] | None
) -> ModelCard:
    """The card of a trainer's model; which license follows from the base model, publishing asks the Hub."""
    facts, adapter = trainer_facts(trainer), hasattr(trainer.model, "peft_config")
    model = trainer.model.get_base_model() if adapter else trainer.model
    folder = Path(trainer.args.output_dir)
    # While it trains the weights lie in checkpoint-*; what lies here may be an earlier run's.
    weights = None if adapter or trainer.is_in_train else read_weights(folder)
    decoding = ReflectionOptions.resolve(model.config, model.generation_config)
    tags = [tags] if isinstance(tags, str) else tags or []
    return render_card(
        model_name or public_name(str(folder)),
        Checkpoint(model.config, decoding, weights, adapter),
        facts,
        base_model=facts["base_model"],
        repo_id=trainer.args.hub_model_id,
        datasets=[] if dataset_name is None or is_local(dataset_name) else [dataset_name],
        tags=[*tags, *trainer._tag_names],
    )
