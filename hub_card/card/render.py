"""Puts a card together and writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..errors import InputError, reading
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.provenance import sha256
from ..glyphsearch import draw_chain
from ..whole_files import replacing
from .card_check import CARD, EVAL_RESULTS, is_hub_id
from .checkpoint import Checkpoint, read_checkpoint
from .facts import NO_FACTS, data_sources, only_drawn, options_table, read_training_facts, training_table
from .results import GLYPHSEARCH_TASK, eval_entries, latents_verdict, model_index, read_results, results_text


TEMPLATE = Path(__file__).parent / "card.md"
OWN_LICENSE = "apache-2.0"  # of weights that began as nothing
BACKBONE_NAMES = {
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL mixture of experts",
}
EXAMPLE_SEED = 3  # of the scene in the snippets, where a model knows nothing but scenes


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    results: Sequence[str | Path] = (),
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    study: str | Path | None = None,
) -> Path:
    """Writes the card of a checkpoint, `README.md`, and its results, `.eval_results/*.yaml`, into its folder.

    What was there under these names is replaced.

    Args:
        folder (`str` or `Path`): The checkpoint.
        repo_id (`str`, *optional*): Under which id it is to be on the Hub; by default the card shows the folder's name.
        results (`Sequence[str | Path]`): Result files of `vreflection evaluate`, of this checkpoint's weights.
        base_model (`str`, *optional*): The Hub id of the base model, where `training_facts.json` knows none.
        license (`str`, *optional*): The license, an id of the Hub's list or `other`, which needs `license_name` and
            `license_link`. Without it `vreflection publish` asks the Hub for the base model's.
        datasets (`Sequence[str]`): Hub ids of data it was trained on, beside those that `training_facts.json` names.
        tags (`Sequence[str]`): More tags.
        study (`str` or `Path`, *optional*): The tables of `experiments/study`, a `tables.md`.

    Returns:
        `Path`: The card's file.

    Raises:
        InputError: No checkpoint; results that aren't its own; a base model that doesn't fit; `other` without name or link.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    facts = read_training_facts(folder) or NO_FACTS
    known = facts["base_model"]
    if base_model is not None and (facts["from_scratch"] or known not in (None, base_model)):
        raise InputError(f"the base model can't be {base_model}: the checkpoint began as {known or 'nothing'}")
    base_model = base_model or known
    for id in (value for value in (repo_id, base_model, *datasets) if value is not None):
        if not is_hub_id(id):
            raise InputError(f"{id!r} is no id on the Hub")
    if (license == "other") != bool(license_name and license_link):
        raise InputError("license other needs a name and a link, which no other license has")
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))} if results else {}
    reports = read_results(results, hashes)
    card = render_card(
        folder.resolve().name,
        checkpoint,
        facts,
        repo_id=repo_id,
        base_model=base_model,
        datasets=datasets,
        tags=tags,
        reports=reports,
        hashes=hashes,
        study=None if study is None else read_study(Path(study)),
        license=license,
        license_name=license_name,
        license_link=license_link,
    )
    return save_card(card, folder, eval_entries(reports, checkpoint))


def read_study(path: Path) -> str:
    """The tables of a study.

    Raises:
        InputError: A file that can't be read, or without tables.
    """
    with reading(path, "can't be read as a study's tables"):
        text = path.read_text(encoding="utf-8").strip()
    if not text.startswith("| arm |"):
        raise InputError(f"{path}: holds no tables of the study; a tables.md of experiments/study does")
    return text


def render_card(
    name: str,
    checkpoint: Checkpoint,
    facts: dict[str, Any],
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    reports: Sequence[dict] = (),
    hashes: dict[str, str] | None = None,
    study: str | None = None,
    license: str | None = None,
    **license_details,
) -> ModelCard:
    """Renders a card; what isn't known is left out. The options are those of [`write_card`], read and checked.

    `facts` are those of the training, or `NO_FACTS`. `reports` come from `read_results`; `hashes`, needed with them, are the
    SHA-256 of the weights' files.
    """
    title = repo_id.rpartition("/")[2] if repo_id else name
    backbone = checkpoint.config.backbone_type
    tags = ("v-reflection", backbone, "latent-reasoning", "custom_code", *sorted(tags))
    trained_on = [source["dataset"] for source in data_sources(facts) if "dataset" in source]
    # The template knows these fields, too.
    data = ModelCardData(
        license=license or (OWN_LICENSE if facts["from_scratch"] else None),
        language=["en"],
        library_name="peft" if checkpoint.adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        base_model_relation=base_model and ("adapter" if checkpoint.adapter else "finetune"),
        datasets=list(dict.fromkeys([*trained_on, *datasets])) or None,
        metrics=["accuracy"],
        tags=list(dict.fromkeys(tags)),
        model_name=title,
        eval_results=model_index(reports) or None,
        **license_details,
    )
    _, asked = draw_chain("test", EXAMPLE_SEED)  # as `vreflection ask --seed` does
    tasks = {task for report in reports for task in report["tasks"]}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        name=repo_id or name,
        checkpoint=checkpoint,
        backbone=BACKBONE_NAMES[backbone],
        facts=facts,
        training=training_table(facts),
        options=options_table(facts),
        drawn=only_drawn(facts),
        seed=EXAMPLE_SEED,
        asked=asked,
        results=results_text(reports),
        verdict=latents_verdict(reports),
        study=study,
        hashes=hashes,
        benchmarks=bool(tasks - {GLYPHSEARCH_TASK, "glyphsearch_answers"}),
    )


def save_card(card: ModelCard, folder: Path, entries: dict | None = None) -> Path:
    """Writes a card and its `.eval_results/TASK.yaml`, one for each of `entries`; of an earlier card nothing is left."""
    entries = entries or {}
    for task, entry in entries.items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        with replacing(folder / EVAL_RESULTS / f"{task}.yaml") as draft:
            draft.write_text(content, encoding="utf-8")
    with replacing(folder / CARD) as draft:
        card.save(draft)
    for task in BENCHMARKS:
        if task not in entries:
            (folder / EVAL_RESULTS / f"{task}.yaml").unlink(missing_ok=True)
    return folder / CARD
