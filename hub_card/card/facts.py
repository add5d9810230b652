"""The file that training leaves beside the weights, so that a card can say how they came about.

`vreflection_tiny/training_facts.json` is an example. `base_model` is a Hub id, or null where nobody knows one;
`from_scratch` says that there is none. `runs` are the stages one after the other, those of the checkpoints before included;
`title` is the stage's name on the card, missing in old files. `exact_match`, where there is one, holds the last evaluation's
shares of exact answers and its step; `rewards` names those of a run by reward. `losses` holds weights besides cross-entropy's 1. A source of
data has a `dataset`, which is a Hub id, or the name of something `local`, or neither where its `format` draws scenes. There
are no paths in it.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..inference.checkpoint_files import read_json_object


TRAINING_FACTS = "training_facts.json"
NO_FACTS = {"base_model": None, "from_scratch": False, "runs": []}  # of a checkpoint without the file
FIELDS = {"base_model": (str, type(None)), "from_scratch": bool, "runs": list}
RUN_FIELDS = {"stage": str, "steps": int, "data": list}
RUN_FIELDS |= dict.fromkeys(("losses", "options", "optimiser", "batch", "versions"), dict)
DRAWN = ("glyphsearch", "glyphsearch_curriculum")


def write_training_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the file."""
    (folder / TRAINING_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_training_facts(folder: Path) -> dict[str, Any] | None:
    """Reads the file of a checkpoint's folder; where there is none, returns `None`.

    Raises:
        InputError: A damaged file; a field that is missing or of another type, named.
    """
    path = folder / TRAINING_FACTS
    if not path.is_file():
        return None
    facts = read_json_object(path)
    check_fields(facts, FIELDS, path)
    if facts["from_scratch"] and facts["base_model"] is not None:
        raise InputError(f"{path}: `from_scratch` is true, and yet there is a `base_model`")
    for number, run in enumerate(facts["runs"]):
        check_fields(run, RUN_FIELDS, f"{path}, run {number}")
        check_fields({"title": "", **run}, {"title": str}, f"{path}, run {number}")
    return facts


def check_fields(found: Any, fields: dict[str, Any], where: str | Path) -> None:
    """Raises where a field is missing or of another type."""
    for name, kind in fields.items():
        if not isinstance(found, dict) or name not in found or not isinstance(found[name], kind):
            raise InputError(f"{where}: `{name}` is missing or of the wrong type; write the file by training again")


def data_sources(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The sources of the data of all runs."""
    return [source for run in facts["runs"] for source in run["data"]]


def only_drawn(facts: dict[str, Any]) -> bool:
    """Whether all data were GlyphSearch's scenes."""
    sources = data_sources(facts)
    return bool(sources) and all(source.get("format") in DRAWN for source in sources)


def training_table(facts: dict[str, Any]) -> str:
    """What matters about the runs, as a Markdown table with a column each."""
    columns = [summarise_run(run) for run in facts["runs"]]
    return run_table(facts["runs"], columns, [name for column in columns for name in column])


def options_table(facts: dict[str, Any]) -> str:
    """All options of the runs, likewise."""
    runs, columns = facts["runs"], []
    for run in runs:
        options = run["options"] | run["optimiser"] | ({"seed": run["seed"]} if "seed" in run else {})
        columns.append({name: code(value) for name, value in options.items()})
    names = [name for group in ("options", "optimiser") for run in runs for name in run[group]]
    return run_table(runs, columns, [*names, "seed"])


def run_table(runs: list[dict[str, Any]], columns: list[dict[str, str]], names: list[str]) -> str:
    """A Markdown table with a column for each run, and a row for each name that says something of any run."""
    titles = [table_text(run.get("title", f"stage {run['stage']}")) for run in runs]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in dict.fromkeys(names)]
    lines = [["", *titles], ["---"] * (len(runs) + 1), *(row for row in rows if any(row[1:]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summarise_run(run: dict[str, Any]) -> dict[str, str]:
    """What matters about a run, by name."""
    machine = run.get("machine", {})
    return {
        "started from": code(run["started_from"]) if run.get("started_from") else "nothing",
        "data": "; ".join(describe_source(source) for source in run["data"]) or "not recorded",
        "loss": describe_loss(run),
        "adapter": assignments(run.get("adapter", {})),
        "steps": describe_steps(run),
        "exact match": describe_exact_match(run.get("exact_match", {})),
        "precision": run.get("precision", ""),
        "on": machine.get("gpu") or machine.get("processor", ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }


def describe_loss(run: dict[str, Any]) -> str:
    """The losses of a run, or its rewards."""
    if "rewards" in run:
        return "GRPO, by " + ", ".join(map(code, run["rewards"]))
    return " + ".join(["CE", *(f"{weight:g} {name}" for name, weight in run["losses"].items())])


def describe_source(source: dict[str, Any]) -> str:
    """Where data came from, with the options of reading it."""
    name = source.get("dataset") or source.get("local") or source["format"]
    more = {key: value for key, value in source.items() if key not in ("dataset", "local") and value != name}
    notes = [*(["local, not on the Hub"] if "local" in source else []), *([assignments(more)] if more else [])]
    return code(name) + (f" ({'; '.join(notes)})" if notes else "")


def describe_steps(run: dict[str, Any]) -> str:
    """How many steps there were, and of how much."""
    batch = run["batch"]
    count = batch["per_device"] * batch["accumulation"] * batch["processes"]
    packed = batch.get("samples_per_pack")
    of = f"{count:,} packs of at most {packed} samples" if packed else f"{count:,} samples"
    processes = f", on {batch['processes']} processes" if batch["processes"] > 1 else ""
    return f"{run['steps']:,} of {of}{processes}" + (f"; {run['tokens']:,} tokens" if "tokens" in run else "")


def describe_exact_match(shares: dict[str, float]) -> str:
    """The shares of exact answers at a run's last evaluation."""
    named = [f"{code(name)} {share:.1%}" for name, share in shares.items() if name != "step"]
    return ", ".join(named) + (f" (after step {shares['step']:,})" if named else "")


def assignments(options: dict[str, Any]) -> str:
    """Options as `name=value`, code each."""
    return ", ".join(code(f"{name}={value}") for name, value in options.items())


def code(text: Any) -> str:
    """Text as Markdown code that no table cell breaks at."""
    return "`" + table_text(text).replace("`", "'") + "`"


def table_text(text: Any) -> str:
    """Text that no table cell breaks at."""
    return str(text).replace("|", "\\|").replace("\n", " ")
