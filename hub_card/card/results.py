"""Results for a card: read from the files of `vreflection evaluate`, of these very weights, whole benchmarks only."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from ..errors import InputError
from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.interventions import INTERVENTIONS
from ..evaluation.report import glyphsearch_table, percent, with_interval
from .checkpoint import Checkpoint


GLYPHSEARCH_TASK = "glyphsearch"
NEEDED = ("command", "date", "model", "versions", "machine", "tasks")
TABLE_TITLES = {
    GLYPHSEARCH_TASK: "GlyphSearch",
    "mmvp": "MMVP",
    "vstar": "V*",
    "blink": "BLINK",
    "hrbench4k": "HR-Bench 4K",
    "hrbench8k": "HR-Bench 8K",
    "mmerealworld_lite": "MME-RealWorld-Lite",
    "glyphsearch_answers": "GlyphSearch, answers alone",
}
SCORED_BY = ("strict", "exact", "authors")
TASK_TYPE = "image-text-to-text"


def read_results(paths: Sequence[Path], hashes: dict[str, str]) -> list[dict[str, Any]]:
    """Reads result files.

    Args:
        paths (`Sequence[Path]`): Files of `vreflection evaluate`.
        hashes (`dict[str, str]`): SHA-256 of each of the checkpoint's weight files, by name.

    Returns:
        `list[dict]`: The reports.

    Raises:
        InputError: What is no result file; results of other weights, of a part of a benchmark, of an unknown task; the
            same measurement twice.
    """
    reports, seen = [], {}
    for path in map(Path, paths):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: can't be read as a result file ({error})") from error
        missing = [name for name in NEEDED if not isinstance(report, dict) or name not in report]
        if missing:
            raise InputError(f"{path}: no result file of `vreflection evaluate`, it has no {missing[0]!r}")
        if not isinstance(report["model"], dict) or report["model"].get("sha256") != hashes:
            raise InputError(f"{path}: measured with other weights than these; measure this checkpoint")
        unknown = [name for name in report["tasks"] if name not in TABLE_TITLES]
        if unknown or not report["tasks"]:
            raise InputError(f"{path}: the card can't show the task {unknown[0] if unknown else 'that is missing'}")
        if report.get("limit") is not None:
            raise InputError(f"{path}: only {report['limit']} items were asked; a card quotes whole benchmarks")
        try:
            for name in report["tasks"]:
                conditions = (name, *condition(report, name))
                if conditions in seen:
                    raise InputError(
                        f"{path}: {TABLE_TITLES[name]} was measured in the same way in {seen[conditions]}"
                    )
                seen[conditions] = path
            list(model_index([report]))
            results_text([report])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: no result file of `vreflection evaluate` ({error!r})") from error
        reports.append(report)
    return reports


def condition(report: dict, task: str) -> tuple:
    """What tells two measurements of a task apart."""
    if task == GLYPHSEARCH_TASK:
        data, decoding = (report["tasks"][task][name] for name in ("data", "decoding"))
        return data["difficulty"], data["split"], decoding["latent_steps"], decoding["latent_feedback"]
    options = report["options"]
    return tuple(options[name] for name in ("latent_steps", "latent_feedback", "reflect", "min_pixels", "max_pixels"))


def describe_decoding(report: dict) -> str:
    """How a benchmark was decoded, in words."""
    options = report["options"]
    reflect = {None: "", True: ", `reflect=True`", False: ", `reflect=False`"}[options["reflect"]]
    return f"{options['latent_steps']} latent steps, `{options['latent_feedback']}` fed back{reflect}"


def model_index(reports: list[dict]) -> Iterator[EvalResult]:
    """All results in the form of a card's model-index; shares as fractions of 1."""
    for report in reports:
        for name, result in report["tasks"].items():
            yield from (
                glyphsearch_index(result) if name == GLYPHSEARCH_TASK else benchmark_index(report, name, result)
            )


def glyphsearch_index(result: dict) -> Iterator[EvalResult]:
    """The accuracies of GlyphSearch, which is drawn and not on the Hub."""
    data, decoding = result["data"], result["decoding"]
    found = {
        f"accuracy, {decoding['latent_steps']} latent steps": result["accuracy"]["overall"],
        "accuracy without latents": result["without_latents"]["accuracy"]["overall"],
    }
    for name, told in result["interventions"].items():
        found[f"accuracy with {INTERVENTIONS[name]}"] = told["accuracy"]["overall"]
    for name, proportion in found.items():
        if proportion["count"]:
            yield EvalResult(
                task_type=TASK_TYPE,
                dataset_type=GLYPHSEARCH_TASK,
                dataset_name=f"GlyphSearch ({data['difficulty']})",
                dataset_config=data["difficulty"],
                dataset_split=data["split"],
                metric_type="accuracy",
                metric_name=name,
                metric_value=proportion["share"],
            )


def benchmark_index(report: dict, name: str, result: dict) -> Iterator[EvalResult]:
    """The accuracies of a benchmark, by each scorer."""
    benchmark = BENCHMARKS[name]
    for scorer in scorers_of(name):
        yield EvalResult(
            task_type=TASK_TYPE,
            dataset_type=benchmark.dataset,
            dataset_name=TABLE_TITLES[name],
            dataset_config=benchmark.config,
            dataset_split=benchmark.split,
            dataset_revision=result["data"].get("revision"),
            metric_type="accuracy",
            metric_name=f"accuracy, scored by `{scorer}`, {describe_decoding(report)}",
            metric_value=result[scorer]["accuracy"]["share"],
        )


def eval_entries(reports: list[dict], checkpoint: Checkpoint) -> dict[str, EvalResultEntry]:
    """What goes into `.eval_results/TASK.yaml`: benchmarks whose items came from the Hub, decoded as the checkpoint does.

    The value is the strict accuracy; the notes give the authors' scorer's.
    """
    own = {"latent_steps": checkpoint.latent_steps, "latent_feedback": checkpoint.latent_feedback, "reflect": None}
    entries = {}
    for report in reports:
        for name, result in report["tasks"].items():
            if "revision" not in result["data"]:
                continue
            if any(report["options"][option] != value for option, value in own.items()):
                continue
            if name in entries:
                raise InputError(
                    f"{TABLE_TITLES[name]} was measured at several picture sizes: give the card one of them"
                )
            entries[name] = EvalResultEntry(
                dataset_id=result["data"]["dataset"],
                task_id=name,
                value=result["strict"]["accuracy"]["share"],
                dataset_revision=result["data"]["revision"],
                date=report["date"],
                notes=f"strict accuracy; by the authors' scorer {result['authors']['accuracy']['share']}; "
                + describe_decoding(report).replace("`", ""),
            )
    return entries


def results_text(reports: list[dict]) -> str:
    """All results as Markdown tables, each with the command that measured it."""
    tables = [glyphsearch_table(report) for report in reports if GLYPHSEARCH_TASK in report["tasks"]]
    tables += [benchmark_table(report) for report in reports if set(report["tasks"]) - {GLYPHSEARCH_TASK}]
    return "\n\n".join(tables)


def scorers_of(task: str) -> list[str]:
    """The scorers of a benchmark that a card shows, the strictest first."""
    return [scorer for scorer in SCORED_BY if scorer in BENCHMARKS[task].scorers]


def benchmark_table(report: dict) -> str:
    """A run's benchmarks as a Markdown table."""
    lines = [
        f"| {describe_decoding(report)} | items | strict | 95 % interval | authors' scorer | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for name, result in report["tasks"].items():
        scorers = scorers_of(name)
        rows = {TABLE_TITLES[name]: [result[scorer]["accuracy"] for scorer in scorers]}
        for kind in result[scorers[0]]:
            if kind in ("accuracy", "unparsed"):
                continue
            scores = [result[scorer][kind] for scorer in scorers]
            if "count" in scores[0]:
                rows[f"- every item of a {kind}"] = scores
            else:
                rows |= {f"- {group}": [score[group] for score in scores] for group in scores[0]}
        lines += [
            f"| {title} | {scores[0]['count']:,} | {' | '.join(map(with_interval, scores))} |"
            + " | |" * (2 - len(scores))
            for title, scores in rows.items()
        ]
        local = result["data"].get("folder")
        notes.append(
            f"{TABLE_TITLES[name]}: {percent(result['reflection_rate']['share'])} of the answers hold a reflection, "
            f"{result[scorers[0]]['unparsed']} could not be parsed"
            + (f", items from a local folder, {local}" if local is not None else "")
        )
    versions, machine = report["versions"], report["machine"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "lmms-eval"))
    where = machine.get("gpu") or machine["processor"]
    lines += [
        "",
        f"{'. '.join(notes)}. Measured by `{report['command']}` on {report['date'][:10]} ({packages}, {where}).",
    ]
    return "\n".join(lines)
