"""What a run notes about itself next to its weights, and the model card made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import trl
from huggingface_hub import ModelCard

from vreflection_hub_card.card import read_training_facts, render_card
from vreflection_hub_card.card.card_check import is_hub_id
from vreflection_hub_card.card.checkpoint import Checkpoint, read_weights
from vreflection_hub_card.evaluation.provenance import describe_machine, describe_versions

from ..data.sources import GLYPHSEARCH
from ..losses import loss_weights
from ..stages import STAGES


# The options of a source that the facts name: they hold no path.
SOURCE_OPTIONS = ("name", "revision", "split", "weight", "difficulty", "start", "count", "crops", "lists", "scenes")


class RunOrigin:
    """What a run started from, noted at its start: its output may land in the folder that it was loaded from.

    Args:
        started_from (`str`, *optional*): The Hub id or folder that the model was loaded from.
        sources (`list[dict]`, *optional*): What the training data were loaded from, see `load_rows`.
        from_scratch (`bool`): Whether the model began with random weights.

    Raises:
        InputError: A folder with damaged training facts.
    """

    def __init__(self, started_from: str | None, sources: list[dict] | None = None, from_scratch: bool = False):
        self.data = [public_source(source) for source in sources or []]
        self.started_from = None if from_scratch or not started_from else public_name(started_from)
        local = started_from and Path(started_from).exists()
        earlier = read_training_facts(Path(started_from)) if local and not from_scratch else None
        if earlier is None:
            on_hub = self.started_from is not None and not local and is_hub_id(started_from)
            base_model = self.started_from if on_hub else None
            earlier = {"base_model": base_model, "from_scratch": from_scratch, "runs": []}
        self.earlier = earlier

    def facts(self, args, **more) -> dict[str, Any]:
        """The content of `training_facts.json`: the earlier runs, and this one; `more` are facts of `run_facts`."""
        run = run_facts(args, started_from=self.started_from, data=self.data, **more)
        return {**self.earlier, "runs": [*self.earlier["runs"], run]}


def public_name(path: str) -> str:
    """A Hub id as it is; of a path its last part."""
    return Path(path).resolve().name if Path(path).exists() or not is_hub_id(path) else path


def public_source(source: dict[str, Any]) -> dict[str, Any]:
    """A source of data without a path: a Hub id, or the name of a file or folder."""
    described = {"format": source.get("format", "messages")}
    if described["format"] not in GLYPHSEARCH:
        path = source["path"]
        local = Path(path).exists() or not is_hub_id(path)
        described |= {"local": public_name(path)} if local else {"dataset": path}
    return described | {name: source[name] for name in SOURCE_OPTIONS if source.get(name) is not None}


def run_facts(
    args,
    *,
    started_from: str | None,
    data: list[dict],
    steps: int,
    max_steps: int,
    versions: dict[str, str],
    **more,
) -> dict[str, Any]:
    """One run as `training_facts.json` holds it, see `vreflection_hub_card.card.facts`.

    Args:
        args (`VReflectionSFTConfig`): The run's options.
        started_from (`str`, *optional*): What it was loaded from: a Hub id, or a folder's name.
        data (`list[dict]`): Where the rows came from, see `public_source`.
        steps (`int`): Steps that were made.
        max_steps (`int`): Steps that were meant to be made; a warm-up may be a share of them.
        versions (`dict[str, str]`): Of the packages.
        more: `tokens`, `machine`, `adapter`, where known.
    """
    batch = {
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }
    if getattr(args, "sample_packing", False):
        batch |= {"samples_per_pack": args.max_samples_per_pack, "max_length": args.max_length}
    stage = STAGES[args.stage]
    return {
        "stage": args.stage,
        "title": stage.title,
        "started_from": started_from,
        "data": data,
        "losses": loss_weights(args),
        "options": {name: getattr(args, name) for name in stage.options},
        "optimiser": {
            "optim": str(getattr(args.optim, "value", args.optim)),
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "warmup_steps": args.get_warmup_steps(max_steps),
            "weight_decay": args.weight_decay,
            "adam_beta1": args.adam_beta1,
            "adam_beta2": args.adam_beta2,
            "max_grad_norm": args.max_grad_norm,
        },
        "batch": batch,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "seed": args.seed,
        "steps": steps,
        **more,
        "versions": versions,
    }


def trainer_facts(trainer) -> dict[str, Any]:
    """The content of `training_facts.json` at a moment of a trainer's run."""
    adapter = getattr(trainer.model, "peft_config", {}).get("default")
    more = {}
    if adapter is not None:
        more["adapter"] = {name: getattr(adapter, name) for name in ("r", "lora_alpha") if hasattr(adapter, name)}
    return trainer.origin.facts(
        trainer.args,
        steps=trainer.state.global_step,
        max_steps=trainer.state.max_steps,
        tokens=trainer.progress.num_tokens,
        machine=describe_machine(trainer.args.device),
        versions=describe_versions() | {"trl": trl.__version__, "accelerate": accelerate.__version__},
        **more,
    )


def trainer_card(
    trainer, model_name: str | None, dataset_name: str | None, tags: str | Sequence[str] | None
) -> ModelCard:
    """The card of a trainer's model; which license follows from the base model, publishing asks the Hub."""
    facts, adapter = trainer_facts(trainer), hasattr(trainer.model, "peft_config")
    model = trainer.model.get_base_model() if adapter else trainer.model
    folder = Path(trainer.args.output_dir)
    # While it trains the weights lie in checkpoint-*; what lies here may be an earlier run's.
    weights = None if adapter or trainer.is_in_train else read_weights(folder)
    checkpoint = Checkpoint.from_configs(model.config, model.generation_config, weights=weights, adapter=adapter)
    datasets = [name for name in [dataset_name] if name is not None and is_hub_id(name) and not Path(name).exists()]
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    return render_card(
        model_name or public_name(str(folder)),
        checkpoint,
        facts,
        base_model=facts["base_model"],
        repo_id=trainer.args.hub_model_id,
        datasets=datasets,
        tags=[*tags, *trainer._tag_names],
    )
