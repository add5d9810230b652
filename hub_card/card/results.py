"""Results for a card: read from the files of `vreflection evaluate`, of these very weights, whole benchmarks only."""

import json
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from modeling_vreflection.decoding_vreflection import ReflectionOptions

from ..errors import InputError, reading
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.dependence import latents_sentence
from ..evaluation.glyphsearch_accuracy import replacements_of
from ..evaluation.interventions import INTERVENTIONS
from ..evaluation.report import glyphsearch_table, percent, with_interval
from .checkpoint import Checkpoint


GLYPHSEARCH_TASK = "glyphsearch"
TABLE_TITLES = {
    GLYPHSEARCH_TASK: "GlyphSearch",
    "mmvp": "MMVP",
    "vstar": "V*",
    "blink": "BLINK",
    "hrbench4k": "HR-Bench 4K",
    "hrbench8k": "HR-Bench 8K",
    "mmerealworld_lite": "MME-RealWorld-Lite",
    "gqa": "GQA",
    "glyphsearch_answers": "GlyphSearch, answers alone",
}
SCORED_BY = ("strict", "exact", "exact_match", "authors")


def read_results(paths: Sequence[str | Path], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """Reads files of `vreflection evaluate`; `hashes` are the SHA-256 of the checkpoint's weight files, by name.

    Raises:
        InputError: What is no result file; results of other weights, of a part of a benchmark, of an unknown task; the
            same measurement twice.
    """
    reports, seen = [], {}
    for path in paths:
        report = read_report(Path(path), hashes)
        for task in report["tasks"]:
            measured = (task, *condition(report, task))
            if measured in seen:
                raise InputError(f"{path}: {TABLE_TITLES[task]} was measured in the same way in {seen[measured]}")
            seen[measured] = path
        reports.append(report)
    return reports


def read_report(path: Path, hashes: dict[str, str]) -> dict[str, Any]:
    """Reads a result file; raises an `InputError` unless a card can quote all of it."""
    with reading(path, "can't be read as a result file"):
        report = json.loads(path.read_text(encoding="utf-8"))
    try:
        if not isinstance(report["model"], dict) or report["model"].get("sha256") != hashes:
            raise InputError(f"{path}: measured with other weights than these; measure this checkpoint")
        unknown = [task for task in report["tasks"] if task not in TABLE_TITLES]
        if unknown or not report["tasks"]:
            raise InputError(f"{path}: the card can't show the task {unknown[0] if unknown else 'that is missing'}")
        if report.get("limit") is not None:
            raise InputError(f"{path}: only {report['limit']} items were asked; a card quotes whole benchmarks")
        for task in report["tasks"]:
            condition(report, task)
        model_index([report])
        results_text([report])
        latents_verdict([report])
    except KeyError as error:
        raise InputError(f"{path}: no result file of `vreflection evaluate`, it has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise InputError(f"{path}: no result file of `vreflection evaluate` ({error!r})") from error
    return report


def condition(report: dict, task: str) -> tuple:
    """What tells two measurements of a task apart."""
    if task == GLYPHSEARCH_TASK:
        data, decoding = (report["tasks"][task][name] for name in ("data", "decoding"))
        return data["difficulty"], data["split"], *reflection_of(decoding)
    options = report["options"]
    return *reflection_of(options), options["min_pixels"], options["max_pixels"]


def reflection_of(options: dict) -> tuple:
    """How a measurement reflected, in the order of [`ReflectionOptions`]; older results know no tolerance."""
    return tuple(options.get(field.name) for field in fields(ReflectionOptions))


def describe_decoding(report: dict) -> str:
    """How a benchmark was decoded, in words."""
    options = report["options"]
    names = ("reflect", "reflect_threshold", "max_reflections", "latent_tolerance")
    others = [f", `{name}={options[name]}`" for name in names if options.get(name) is not None]
    return f"{options['latent_steps']} latent steps, `{options['latent_feedback']}` fed back{''.join(others)}"


def model_index(reports: list[dict]) -> list[EvalResult]:
    """All accuracies in the form of a card's model-index; shares as fractions of 1."""
    results = []
    for report in reports:
        for task, result in report["tasks"].items():
            data, benchmark = result["data"], BENCHMARKS.get(task)
            if benchmark is None:  # GlyphSearch, which is drawn and not on the Hub
                dataset, title = GLYPHSEARCH_TASK, f"GlyphSearch ({data['difficulty']})"
                config, split = data["difficulty"], data["split"]
            else:
                dataset, title = benchmark.dataset, TABLE_TITLES[task]
                config, split = benchmark.config, benchmark.split
            results += [
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=dataset,
                    dataset_name=title,
                    dataset_config=config,
                    dataset_split=split,
                    dataset_revision=data.get("revision"),
                    metric_type="accuracy",
                    metric_name=name,
                    metric_value=accuracy["share"],
                )
                for name, accuracy in named_accuracies(report, task).items()
                if accuracy["count"]
            ]
    return results


def named_accuracies(report: dict, task: str) -> dict[str, dict]:
    """The accuracies over all items of a task, by what was measured."""
    result = report["tasks"][task]
    if task != GLYPHSEARCH_TASK:
        name = "accuracy, scored by `{}`, " + describe_decoding(report)
        return {name.format(scorer): result[scorer]["accuracy"] for scorer in scorers_of(task)}
    measured = {
        f"accuracy, {result['decoding']['latent_steps']} latent steps": result,
        "accuracy without latents": result["without_latents"],
    }
    measured |= {f"accuracy with {INTERVENTIONS[name]}": other for name, other in result["interventions"].items()}
    return {name: one["accuracy"]["overall"] for name, one in measured.items()}


def eval_entries(reports: list[dict], checkpoint: Checkpoint) -> dict[str, EvalResultEntry]:
    """What goes into `.eval_results/TASK.yaml`: benchmarks whose items came from the Hub, decoded as the checkpoint does.

    The value is the accuracy by the first of `scorers_of`; the notes name it, and give the authors' scorer's if there is one.
    """
    own = astuple(checkpoint.decoding)
    entries = {}
    for report in reports:
        for task, result in report["tasks"].items():
            if "revision" not in result["data"] or reflection_of(report["options"]) != own:
                continue
            if task in entries:
                raise InputError(
                    f"{TABLE_TITLES[task]} was measured at several picture sizes: give the card one of them"
                )
            scorer, *others = scorers_of(task)
            authors = [f"by the authors' scorer {result[name]['accuracy']['share']}" for name in others]
            sizes = "pictures of {min_pixels} to {max_pixels} pixels".format_map(report["options"])
            notes = [f"{scorer} accuracy", *authors, describe_decoding(report).replace("`", ""), sizes]
            entries[task] = EvalResultEntry(
                dataset_id=result["data"]["dataset"],
                task_id=task,
                value=result[scorer]["accuracy"]["share"],
                dataset_revision=result["data"]["revision"],
                date=report["date"],
                notes="; ".join(notes),
            )
    return entries


def results_text(reports: list[dict]) -> str:
    """All results as Markdown tables, each with the command that measured it."""
    tables = [glyphsearch_table(report) for report in reports if GLYPHSEARCH_TASK in report["tasks"]]
    tables += [benchmark_table(report) for report in reports if set(report["tasks"]) - {GLYPHSEARCH_TASK}]
    return "\n\n".join(tables)


def latents_verdict(reports: list[dict]) -> str | None:
    """Whether the answers depend on the latents, a sentence for each report on GlyphSearch where some answers reflect."""
    sentences = []
    for report in reports:
        result = report["tasks"].get(GLYPHSEARCH_TASK)
        if result and result["interventions"]:
            data, decoding, reflecting = result["data"], result["decoding"], result["reflection_rate"]
            sentences.append(
                f"**{latents_sentence(replacements_of(result))}** (GlyphSearch, `{data['difficulty']}` difficulty, {data['split']} "
                f"split, {decoding['latent_steps']} latent steps, `{decoding['latent_feedback']}` fed back; "
                f"{reflecting['successes']} of {reflecting['count']} answers reflect.)"
            )
    return "\n\n".join(sentences) or None


def scorers_of(task: str) -> list[str]:
    """The scorers of a benchmark that a card shows, the strictest first."""
    return [scorer for scorer in SCORED_BY if scorer in BENCHMARKS[task].scorers]


def benchmark_table(report: dict) -> str:
    """A run's benchmarks as a Markdown table, and what is to know about them."""
    heads = dict.fromkeys(scorers_of(task)[0] for task in report["tasks"] if task in BENCHMARKS)
    lines = [
        f"| {describe_decoding(report)} | items | {' or '.join(heads)} | 95 % interval | authors' scorer | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for task, result in report["tasks"].items():
        scorers = scorers_of(task)
        for title, scores in table_rows(TABLE_TITLES[task], [result[scorer] for scorer in scorers]).items():
            empty = " | |" * (2 - len(scores))
            lines.append(f"| {title} | {scores[0]['count']:,} | {' | '.join(map(with_interval, scores))} |{empty}")
        local = result["data"].get("folder")
        notes.append(
            f"{TABLE_TITLES[task]}: {percent(result['reflection_rate']['share'])} of the answers hold a reflection, "
            f"{result[scorers[0]]['unparsed']} could not be parsed"
            + (f", items from a local folder, {local}" if local is not None else "")
        )
    versions, machine = report["versions"], report["machine"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "lmms-eval"))
    where = machine.get("gpu") or machine["processor"]
    measured = f"Measured by `{report['command']}` on {report['date'][:10]} ({packages}, {where})."
    return "\n".join([*lines, "", f"{'. '.join(notes)}. {measured}"])


def table_rows(title: str, summaries: list[dict]) -> dict[str, list[dict]]:
    """The proportions of a benchmark's rows, by their titles: all items, then groups; one proportion for each scorer."""
    rows = {title: [summary["accuracy"] for summary in summaries]}
    for kind in summaries[0]:
        if kind in ("accuracy", "unparsed"):
            continue
        scores = [summary[kind] for summary in summaries]
        if "count" in scores[0]:
            rows[f"- every item of a {kind}"] = scores
        else:
            rows |= {f"- {group}": [score[group] for score in scores] for group in scores[0]}
    return rows
