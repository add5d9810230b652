"""Whether a card is fit to be published: complete, without placeholders, about these weights."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import ADAPTER_CONFIG_NAME

from ..errors import InputError, first_line
from ..evaluation.provenance import sha256
from .facts import NO_FACTS, data_sources, read_training_facts


CARD, EVAL_RESULTS = "README.md", ".eval_results"
REQUIRED = ("language", "library_name", "pipeline_tag", "metrics", "tags")
# The last two are Jinja's; braces without spaces occur in BibTeX.
PLACEHOLDER = re.compile(
    r"\[?more information needed\]?|\bTODO\b|\bFIXME\b|<!--\s*provide|\{\{ .*? \}\}|\{% .*? %\}", re.IGNORECASE
)
MEASURED = re.compile(r"`([^`/\s]+\.safetensors)` \(SHA-256 `([0-9a-f]{64})`\)")
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError)


def load_card(folder: Path) -> ModelCard:
    """Reads the card of a checkpoint's folder.

    Raises:
        InputError: There is none, or its front matter can't be read.
    """
    path = folder / CARD
    if not path.is_file():
        raise InputError(f"{folder}: there is no model card, {CARD}")
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise InputError(f"{path}: its front matter can't be read ({first_line(error)})") from error


def check_card(folder: Path) -> ModelCard:
    """Checks the card of a checkpoint's folder, as far as that needs no network.

    Returns:
        `ModelCard`: The card, if nothing is wrong with it. It may name no license where it names a base model, whose license
        `vreflection publish` looks up.

    Raises:
        InputError: All that the card lacks, in one message.
    """
    folder = Path(folder)
    card = load_card(folder)
    wrong = wrong_front_matter(card, folder)
    wrong += [f"the placeholder {found!r}" for found in dict.fromkeys(PLACEHOLDER.findall(str(card)))]
    if not card.text.strip():
        wrong.append("no text")
    wrong += wrong_results(card, folder)
    if wrong:
        raise InputError(f"{folder / CARD}: {'; '.join(wrong)}")
    return card


def wrong_front_matter(card: ModelCard, folder: Path) -> list[str]:
    """What the front matter lacks."""
    data, facts = card.data, read_training_facts(folder) or NO_FACTS
    required = list(REQUIRED)
    if not facts["from_scratch"]:
        required += ["base_model", "base_model_relation"]
    sources = data_sources(facts)
    if not sources or any("dataset" in source for source in sources):  # else they were drawn, or are on no Hub
        required.append("datasets")
    if not data.get("base_model"):
        required.append("license")
    if data.get("license") == "other":
        required += ["license_name", "license_link"]
    missing = [name for name in required if not data.get(name)]
    wrong = [f"the front matter has no {', '.join(missing)}"] if missing else []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        values = values if isinstance(values, list) else [values]
        wrong += [f"{name}: {value!r} is no id on the Hub" for value in values if not is_hub_id(value)]
    relation = data.get("base_model_relation")
    if relation not in (None, "adapter" if (folder / ADAPTER_CONFIG_NAME).is_file() else "finetune"):
        wrong.append(f"base_model_relation is {relation!r}")
    return wrong


def wrong_results(card: ModelCard, folder: Path) -> list[str]:
    """Results that the Hub can't read, and those of other weights."""
    wrong = []
    files = sorted((folder / EVAL_RESULTS).glob("*.yaml"))
    for file in files:
        name = f"{EVAL_RESULTS}/{file.name}"
        try:
            entries = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
        except UNREADABLE as error:
            wrong.append(f"{name} can't be read ({first_line(error)})")
            continue
        wrong += [f"{name}: {e.dataset_id!r} is no id on the Hub" for e in entries if not is_hub_id(e.dataset_id)]
        wrong += [f"{name}: the value is no number" for e in entries if not is_number(e.value)]
    results = card.data.get("eval_results") or []
    wrong += [f"a result of {r.dataset_name} is no number" for r in results if not is_number(r.metric_value)]
    measured = dict(MEASURED.findall(card.text))
    if (results or files) and not measured:
        wrong.append("it has results and doesn't say of which weights")
    if measured and measured != {file.name: sha256(file) for file in folder.glob("*.safetensors")}:
        wrong.append("its results belong to other weights: measure these, and write the card again")
    return wrong


def is_number(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_hub_id(value: Any) -> bool:
    """Whether a value could be the id of something on the Hub."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True
