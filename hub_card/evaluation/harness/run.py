"""A run on lmms-eval: answers that are kept when it is killed, one JSON file, and the samples."""

import datetime
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger

from ...errors import InputError, reading
from ...whole_files import replacing
from ..benchmarks import BENCHMARKS, Benchmark
from ..comparison import SAMPLES
from ..provenance import describe_machine, describe_versions, option_flags
from ..scorers import summarise_verdicts
from ..statistics import proportion
from .answers import AnswerLog
from .model import VReflection
from .task import PREFIX


TASKS_FOLDER = Path(__file__).parent / "tasks"
HARNESS_PACKAGES = ("lmms-eval", "datasets", "accelerate")
RESULTS = "results.json"
# Where this differs from the authors' evaluation.
PICTURES = "opened with EXIF's rotation, which the authors' evaluation ignores"
KEPT_OF_ANSWERS = ("question", "raw", "text", "reflected", "tokens", "latent_tokens", "seconds")


def evaluate(
    model: str,
    tasks: Sequence[str],
    output: Path,
    data: Path | None = None,
    limit: int | None = None,
    **options,
) -> dict | None:
    """Asks a model the items of benchmarks and writes the scores; called again after it was killed, it continues.

    Args:
        model (`str`): See [`checkpoint_folder`].
        tasks (`Sequence[str]`): Names of `BENCHMARKS`.
        output (`Path`): A folder for this run's files: results, samples, and the answers as they come in.
        data (`Path`, *optional*): A folder with a local copy of each task's data, `TASK/[SUBSET/]SPLIT*.parquet`.
        limit (`int`, *optional*): Only so many items of each task, the first ones.
        options: Of [`VReflection`].

    Returns:
        `dict`: What was written to `results.json`. `None` in all processes but the first.

    Raises:
        InputError: Data, options or a checkpoint that can't be used.
    """
    logger.disable("lmms_eval")
    started = datetime.datetime.now(datetime.UTC)
    benchmarks = [BENCHMARKS[task] for task in dict.fromkeys(tasks)]
    if (output / RESULTS).exists():
        with reading(output / RESULTS, "no results of an earlier run"):
            others = set(json.loads((output / RESULTS).read_text())["tasks"]) - set(tasks)
        if others:
            raise InputError(
                f"{output} holds results of {', '.join(sorted(others))}, which would be lost: name another --output, or "
                "these tasks, too"
            )
    configs = [{"task": PREFIX + benchmark.name} for benchmark in benchmarks]
    for config, benchmark in zip(configs, benchmarks):
        if data is not None and benchmark.rows is None:
            config["dataset_path"] = str(data / benchmark.name)
    asked = VReflection(model, answers=output, **options)
    outcome = simple_evaluate(
        asked,
        tasks=configs,
        task_manager=TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False),
        batch_size=asked.batch_size,
        limit=limit,
        bootstrap_iters=0,
    )
    if asked.rank != 0:
        return None
    asked.log.read()  # the other processes' answers too
    results, lines = {}, []
    for benchmark in benchmarks:
        samples = join_samples(benchmark, outcome["samples"][PREFIX + benchmark.name], asked.log)
        results[benchmark.name] = {
            "data": describe_data(benchmark, data),
            **summarise_samples(benchmark, samples, limit),
        }
        lines += [json.dumps(sample) + "\n" for sample in samples]
    finished = datetime.datetime.now(datetime.UTC)
    report = {
        "command": repeat_command(asked, results, limit),
        "date": started.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 1),
        "model": asked.description,
        "options": asked.options,
        "limit": limit,
        "pictures": PICTURES,
        "versions": describe_versions() | {name: importlib.metadata.version(name) for name in HARNESS_PACKAGES},
        "machine": describe_machine(asked.device) | {"processes": asked.world_size},
        "tasks": results,
    }
    write(output / SAMPLES, "".join(lines))
    write(output / RESULTS, json.dumps(report, indent=2) + "\n")
    return report


def repeat_command(model: VReflection, tasks: Sequence[str], limit: int | None) -> str:
    """The command that repeats a run, with every default spelled out and no path of this machine in it."""
    given = {"revision": model.description["revision"], "limit": limit} | model.options
    return " ".join(["vreflection evaluate", model.description["name"], "--tasks", *tasks, *option_flags(given)])


def join_samples(benchmark: Benchmark, logged: list[dict], log: AnswerLog) -> list[dict]:
    """One row an item, in the order of the data: question, answer and verdicts."""
    rows = []
    for sample in sorted(logged, key=lambda sample: sample["doc_id"]):
        item = sample[benchmark.scorers[0]]
        answer = log.answers[PREFIX + benchmark.name, sample["doc_id"], 0]
        verdicts = {name: {key: sample[name][key] for key in ("letter", "correct")} for name in benchmark.scorers}
        row = {"task": benchmark.name, **{name: item[name] for name in ("id", "groups", "answer")}}
        rows.append(row | {name: answer[name] for name in KEPT_OF_ANSWERS} | {"verdicts": verdicts})
    return rows


def describe_data(benchmark: Benchmark, data: Path | None) -> dict:
    """Where the items came from: the Hub, or a local folder, whose path stays private."""
    if benchmark.rows is not None:
        return {"dataset": benchmark.dataset, "split": benchmark.split}
    if data is not None:
        return {"folder": (data / benchmark.name).resolve().name}
    return {"dataset": benchmark.dataset, "revision": benchmark.revision}


def summarise_samples(benchmark: Benchmark, samples: list[dict], limit: int | None) -> dict:
    """The scores of a task; a `RuntimeError` if the harness returned fewer items than there are."""
    expected = benchmark.total if limit is None else min(limit, benchmark.total)
    if len(samples) != expected:
        raise RuntimeError(f"{benchmark.name}: {len(samples)} items were scored instead of {expected}.")
    return {
        **{scorer: summarise_verdicts(benchmark, samples, scorer) for scorer in benchmark.scorers},
        "reflection_rate": proportion([sample["reflected"] for sample in samples]),
        "seconds_per_item": round(fmean(sample["seconds"] for sample in samples), 3),
    }


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text)
