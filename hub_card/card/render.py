"""Puts a card together and writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..errors import InputError
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.provenance import sha256
from ..glyphsearch import draw_question
from .card_check import CARD, EVAL_RESULTS, is_hub_id
from .checkpoint import Checkpoint, read_checkpoint
from .facts import check_training_facts, hub_datasets, only_drawn, options_table, read_training_facts, training_table
from .results import GLYPHSEARCH_TASK, eval_entries, model_index, read_results, results_text


TEMPLATE = Path(__file__).parent / "card.md"
OWN_LICENSE = "apache-2.0"  # of weights that began as nothing
TAGS = ("v-reflection", "qwen2_5_vl", "latent-reasoning", "custom_code")
MERGED = "merged"  # what the snippets call an adapter's merged folder
# A picture and a question for the snippets.
EXAMPLE_SEED = 3
EXAMPLE = ("picture.png", "What does the sign say?", "stop")


def write_card(
    folder: str | Path,
    repo_id: str | None = None,
    results: Sequence[str | Path] = (),
    facts: dict[str, Any] | None = None,
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
        facts (`dict`, *optional*): How it was trained; by default what `training_facts.json` in the folder says.
        base_model (`str`, *optional*): The Hub id of the base model, where those facts know none.
        license (`str`, *optional*): The license, an id of the Hub's list or `other`. Without it the card names none where
            there is a base model, whose license `vreflection publish` asks the Hub for.
        license_name (`str`, *optional*): With `other`, its name.
        license_link (`str`, *optional*): With `other`, where its text is.
        datasets (`Sequence[str]`): Hub ids of data it was trained on, beside those that the facts name.
        tags (`Sequence[str]`): More tags.
        study (`str` or `Path`, *optional*): The tables of `experiments/study`, a `tables.md`.

    Returns:
        `Path`: The card's file.

    Raises:
        InputError: No checkpoint; results that aren't its own; a base model that doesn't fit; `other` without name or link.
    """
    folder = Path(folder)
    checkpoint = read_checkpoint(folder)
    facts = read_training_facts(folder) if facts is None else check_training_facts(facts, "facts")
    base_model = choose_base_model(facts, base_model)
    for id in (value for value in (repo_id, base_model, *datasets) if value is not None):
        if not is_hub_id(id):
            raise InputError(f"{id!r} is no id on the Hub")
    if (license == "other") != bool(license_name and license_link):
        raise InputError("license other needs a name and a link, which no other license has")
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))} if results else {}
    reports = read_results([Path(path) for path in results], hashes)
    card = render_card(
        folder.resolve().name,
        checkpoint,
        facts,
        base_model=base_model,
        license=license,
        license_name=license_name,
        license_link=license_link,
        repo_id=repo_id,
        reports=reports,
        hashes=hashes,
        datasets=datasets,
        tags=tags,
        study=read_study(study),
    )
    return save_card(card, folder, eval_entries(reports, checkpoint))


def read_study(path: str | Path | None) -> str | None:
    """The tables of a study.

    Raises:
        InputError: A file that can't be read, or without tables.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as a study's tables ({error})") from error
    if not text.startswith("| arm |"):
        raise InputError(f"{path}: holds no tables of the study; a tables.md of experiments/study does")
    return text


def choose_base_model(facts: dict[str, Any] | None, base_model: str | None) -> str | None:
    """The base model of the facts, or where they know none, the one that is given.

    Raises:
        InputError: The two contradict each other.
    """
    known = facts["base_model"] if facts else None
    if base_model is not None and facts and (facts["from_scratch"] or known not in (None, base_model)):
        raise InputError(f"the base model can't be {base_model}: the checkpoint began as {known or 'nothing'}")
    return base_model or known


def render_card(
    name: str,
    checkpoint: Checkpoint,
    facts: dict[str, Any] | None = None,
    *,
    base_model: str | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    repo_id: str | None = None,
    reports: Sequence[dict] = (),
    hashes: dict[str, str] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    study: str | None = None,
) -> ModelCard:
    """Renders a card; what isn't known is left out.

    Args:
        name (`str`): The model's name.
        checkpoint (`Checkpoint`): What it is.
        facts (`dict`, *optional*): How it was trained, see `read_training_facts`.
        base_model (`str`, *optional*): Hub id of the base model.
        license (`str`, *optional*): The license; apache-2.0 where the weights began as nothing.
        license_name (`str`, *optional*): Its name, if it is `other`.
        license_link (`str`, *optional*): Its text, likewise.
        repo_id (`str`, *optional*): Its own Hub id.
        reports (`Sequence[dict]`): Results, see `read_results`.
        hashes (`dict[str, str]`, *optional*): SHA-256 of the weights' files; needed with results.
        datasets (`Sequence[str]`): Hub ids of data beside those of the facts.
        tags (`Sequence[str]`): More tags.
        study (`str`, *optional*): Tables of the study.
    """
    reports = list(reports)
    if facts and facts["from_scratch"]:
        license = license or OWN_LICENSE
    title = repo_id.rpartition("/")[2] if repo_id else name
    data = ModelCardData(
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=["en"],
        library_name="peft" if checkpoint.adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        base_model_relation=base_model and ("adapter" if checkpoint.adapter else "finetune"),
        datasets=list(dict.fromkeys([*hub_datasets(facts), *datasets])) or None,
        metrics=["accuracy"],
        tags=[*TAGS, *sorted(set(tags) - set(TAGS))],
        model_name=title,
        eval_results=list(model_index(reports)) or None,
    )
    drawn, runs = only_drawn(facts), facts["runs"] if facts else []
    picture, question, answer = EXAMPLE
    if drawn:
        _, asked = draw_question("test", EXAMPLE_SEED)  # as `vreflection ask --seed` does
        picture, question, answer = "scene.png", asked.text, asked.answer
    tasks = {task for report in reports for task in report["tasks"]}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        model=MERGED if checkpoint.adapter else repo_id or name,
        adapter=repo_id or name,
        checkpoint=checkpoint,
        config=checkpoint.config,
        text_config=checkpoint.config.get_text_config(),
        weights=checkpoint.weights,
        base=base_model,
        facts=facts,
        from_scratch=bool(facts and facts["from_scratch"]),
        training=training_table(facts) if runs else None,
        options=options_table(facts) if runs else None,
        only_sft=bool(runs) and all(run["stage"] == "sft" for run in runs),
        drawn=drawn,
        results=results_text(reports),
        study=study,
        hashes=hashes or {},
        glyphsearch=GLYPHSEARCH_TASK in tasks,
        benchmarks=bool(tasks & set(BENCHMARKS)),
        license=license_name or license,
        license_link=license_link,
        seed=EXAMPLE_SEED,
        picture=picture,
        question=question,
        answer=answer,
    )


def save_card(card: ModelCard, folder: Path, entries: dict | None = None) -> Path:
    """Writes a card and its `.eval_results/TASK.yaml`; of an earlier card nothing is left.

    Args:
        card (`ModelCard`): The card.
        folder (`Path`): The checkpoint's folder.
        entries (`dict[str, EvalResultEntry]`, *optional*): A result for each task, see `eval_entries`.
    """
    entries = entries or {}
    for task in BENCHMARKS:
        path = folder / EVAL_RESULTS / f"{task}.yaml"
        if task in entries:
            path.parent.mkdir(exist_ok=True)
            content = yaml.safe_dump(eval_result_entries_to_yaml([entries[task]]), sort_keys=False, allow_unicode=True)
            path.write_text(content, encoding="utf-8")
        else:
            path.unlink(missing_ok=True)
    card.save(folder / CARD)
    return folder / CARD
