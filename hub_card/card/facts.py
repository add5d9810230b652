"""The file that training leaves beside the weights, so that a card can say how they came about.

```json
{
  "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
  "from_scratch": false,
  "runs": [
    {
      "stage": "1",
      "title": "stage 1, BCM",
      "started_from": "Qwen/Qwen2.5-VL-7B-Instruct",
      "data": [{"format": "visual_cot", "local": "viscot_363k.json"}],
      "losses": {"L_BCM": 0.1},
      "options": {"latent_inputs": "bcm", "latent_loss": "l1"},
      "optimiser": {"optim": "adamw_torch", "learning_rate": 1e-05, "lr_scheduler_type": "cosine"},
      "batch": {"per_device": 1, "accumulation": 8, "processes": 8, "samples_per_pack": 4},
      "steps": 2500,
      "versions": {"torch": "2.15.0"}
    }
  ]
}
```

`base_model` is a Hub id, or null where nobody knows one; `from_scratch` says that there is none. `runs` are the stages one
after the other, those of the checkpoints before included; `title` is the stage's name on the card, missing in old files.
`losses` holds weights besides cross-entropy's 1. A source of data has a `dataset`, which is a Hub id, or the name of
something `local`, or neither where its `format` draws scenes. There are no paths in it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError


TRAINING_FACTS = "training_facts.json"
RUN_FIELDS = {
    "stage": str,
    "data": list,
    "losses": dict,
    "options": dict,
    "optimiser": dict,
    "batch": dict,
    "steps": int,
    "versions": dict,
}
DRAWN = ("glyphsearch", "glyphsearch_curriculum")


def write_training_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the file."""
    (folder / TRAINING_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_training_facts(folder: Path) -> dict[str, Any] | None:
    """Reads the file of a checkpoint's folder; where there is none, returns `None`.

    Raises:
        InputError: A damaged file.
    """
    path = folder / TRAINING_FACTS
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({error})") from error
    return check_training_facts(facts, path)


def check_training_facts(facts: Any, where: str | Path) -> dict[str, Any]:
    """Returns facts that a card can quote.

    Raises:
        InputError: A field that is missing or of another type, named.
    """
    fields = {"base_model": (str, type(None)), "from_scratch": bool, "runs": list}
    check_fields(facts, fields, where)
    if facts["from_scratch"] and facts["base_model"] is not None:
        raise InputError(f"{where}: `from_scratch` is true, and yet there is a `base_model`")
    for number, run in enumerate(facts["runs"]):
        check_fields(run, RUN_FIELDS, f"{where}, run {number}")
        check_fields({"title": "", **run}, {"title": str}, f"{where}, run {number}")
    return facts


def check_fields(found: Any, fields: dict[str, Any], where: str | Path) -> None:
    """Raises where a field is missing or of another type."""
    for name, kind in fields.items():
        if not isinstance(found, dict) or name not in found or not isinstance(found[name], kind):
            raise InputError(f"{where}: `{name}` is missing or of the wrong type; write the file by training again")


def hub_datasets(facts: dict[str, Any] | None) -> list[str]:
    """Hub ids of the data of all runs, each once."""
    sources = [source for run in (facts or {"runs": []})["runs"] for source in run["data"]]
    return list(dict.fromkeys(source["dataset"] for source in sources if "dataset" in source))


def only_drawn(facts: dict[str, Any] | None) -> bool:
    """Whether all data were GlyphSearch's scenes."""
    sources = [source for run in (facts or {"runs": []})["runs"] for source in run["data"]]
    return bool(sources) and all(source.get("format") in DRAWN for source in sources)


def training_table(facts: dict[str, Any]) -> str:
    """What matters about the runs, as a Markdown table with a column each."""
    rows = {
        "started from": lambda run: code(run["started_from"]) if run.get("started_from") else "nothing",
        "data": describe_run_data,
        "loss": lambda run: " + ".join(["CE", *(f"{weight:g} {name}" for name, weight in run["losses"].items())]),
        "adapter": lambda run: assignments(run.get("adapter", {})),
        "steps": describe_steps,
        "precision": lambda run: run.get("precision", ""),
        "on": describe_run_machine,
        "versions": lambda run: ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return run_table(facts["runs"], rows)


def options_table(facts: dict[str, Any]) -> str:
    """All options of the runs, likewise."""
    groups = ("options", "optimiser")
    names = {group: dict.fromkeys(name for run in facts["runs"] for name in run[group]) for group in groups}
    rows = {
        name: lambda run, group=group, name=name: code(run[group][name]) if name in run[group] else ""
        for group in groups
        for name in names[group]
    }
    rows["seed"] = lambda run: code(run["seed"]) if "seed" in run else ""
    return run_table(facts["runs"], rows)


def run_table(runs: list[dict[str, Any]], rows: dict[str, Callable[[dict], str]]) -> str:
    """A Markdown table with a column for each run; rows that say nothing of any run are left out."""
    lines = [["", *(table_text(run.get("title", f"stage {run['stage']}")) for run in runs)], ["---"] * (len(runs) + 1)]
    cells = [[name, *map(cell, runs)] for name, cell in rows.items()]
    lines += [row for row in cells if any(row[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_run_data(run: dict[str, Any]) -> str:
    """The sources of a run's data."""
    described = []
    for source in run["data"]:
        name = source.get("dataset") or source.get("local") or source["format"]
        more = {key: value for key, value in source.items() if key not in ("dataset", "local") and value != name}
        described.append(code(name) + (f" ({assignments(more)})" if more else ""))
    return "; ".join(described) or "not recorded"


def describe_steps(run: dict[str, Any]) -> str:
    """How many steps there were, and of how much."""
    batch = run["batch"]
    count = batch["per_device"] * batch["accumulation"] * batch["processes"]
    packed = batch.get("samples_per_pack")
    of = f"{count:,} packs of at most {packed} samples" if packed else f"{count:,} samples"
    processes = f", on {batch['processes']} processes" if batch["processes"] > 1 else ""
    return f"{run['steps']:,} of {of}{processes}" + (f"; {run['tokens']:,} tokens" if "tokens" in run else "")


def describe_run_machine(run: dict[str, Any]) -> str:
    """What a run computed on."""
    machine = run.get("machine", {})
    return machine.get("gpu") or machine.get("processor", "")


def assignments(options: dict[str, Any]) -> str:
    """Options as `name=value`, code each."""
    return ", ".join(code(f"{name}={value}") for name, value in options.items())


def code(text: Any) -> str:
    """Text as Markdown code that no table cell breaks at."""
    return "`" + table_text(text).replace("`", "'") + "`"


def table_text(text: Any) -> str:
    """Text that no table cell breaks at."""
    return str(text).replace("|", "\\|").replace("\n", " ")
