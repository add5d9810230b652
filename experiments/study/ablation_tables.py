"""The study's result files as Markdown tables, and what the differences are worth."""

import json
from pathlib import Path
from statistics import fmean

import pandas
import yaml

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS
from vreflection_hub_card.evaluation.report import percent
from vreflection_hub_card.evaluation.statistics import wilson_interval

from ..markdown_tables import markdown
from .arms import PLAIN, Form, Group, Study
from .paired_bootstrap import paired_bootstrap


POINTING = ("pointing.dac.share", "pointing.llm.share", "attention_inside_box.dac")


def read_results(study: Study, folder: Path) -> dict[str, dict]:
    """The result files of those arms that have one, by the arms' names.

    Raises:
        ValueError: No result file at all.
    """
    paths = {name: folder / f"{name}.json" for name in study.arms}
    if found := {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}:
        return found
    raise ValueError(f"{folder}: no results yet.")


def read_findings(folder: Path) -> dict[str, str]:
    """What was written about groups after they were run, by the groups' names, from `findings.yaml`."""
    path = folder / "findings.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def as_frame(results: dict[str, dict]) -> pandas.DataFrame:
    """A row for each `arm`, `way` of decoding and `seed`; nested results in columns such as `outcomes.usual`."""
    rows = []
    for name, result in results.items():
        learned = {part["stage"] for part in result["parts"]} & {"2", "joint"}
        for seed, entry in result["seeds"].items():
            for way, evaluation in entry["evaluations"].items():
                row = pandas.json_normalize(evaluation).iloc[0].to_dict() | {"arm": name, "way": way, "seed": seed}
                # A DAC that was never trained points nowhere.
                rows.append({key: value for key, value in row.items() if learned or ".dac" not in key})
    frame = pandas.DataFrame(rows)
    return frame.reindex(columns=frame.columns.union(POINTING, sort=False))


def seeds_of(frame: pandas.DataFrame, arm: str, way: str = PLAIN) -> pandas.DataFrame:
    """An arm's results in one way of decoding, by seed."""
    return frame[(frame.arm == arm) & (frame.way == way)].set_index("seed")


def share_right(outcomes: pandas.Series) -> dict:
    """The mean share of right answers over seeds, with a Wilson interval for one seed's scenes.

    All seeds answer the same scenes: they say more about training, and nothing more about scenes.

    Args:
        outcomes (`pandas.Series`): For each seed one character a scene: right `1`, wrong `0`, not asked `-`.
    """
    asked = outcomes.str.replace("-", "")
    share, count = float((asked.str.count("1") / asked.str.len()).mean()), int(asked.str.len().min())
    low, high = wilson_interval(share * count, count)
    return {"share": share, "low": low, "high": high}


def difference(first: pandas.Series, second: pandas.Series) -> str:
    """The second arm's accuracy minus the first's in points, on the seeds that both have, and whether it is beyond noise."""
    first, second = first.align(second, join="inner")
    change = paired_bootstrap(list(zip(first, second)))
    text = f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    return text if change["low"] > 0 or change["high"] < 0 else f"{text}, within noise"


def mean_and_range(values: pandas.Series) -> str:
    """The mean of the seeds that have a value, and the range of several."""
    values = values.dropna()
    seeds = f" ({100 * values.min():.1f} to {100 * values.max():.1f})" if len(values) > 1 else ""
    return percent(fmean(values)) + seeds if len(values) else ""


def group_table(group: Group, frame: pandas.DataFrame) -> str:
    """A group's arms and those that it is compared with; differences are to the last of these, else to `sft`."""
    found = frame.arm.unique()
    reference = group.compare[-1] if group.compare else "sft"
    rows = []
    for name in (*group.compare, *(arm.name for arm in group.arms)):
        if name not in found:
            continue
        for way in [PLAIN] if name in group.compare else frame.way[frame.arm == name].unique():
            seeds = seeds_of(frame, name, way)
            share, change = share_right(seeds["outcomes.usual"]), ""
            if reference in found and (name, way) != (reference, PLAIN):
                change = difference(seeds_of(frame, reference)["outcomes.usual"], seeds["outcomes.usual"])
            interval = f"{percent(share['low'])} to {percent(share['high'])}"
            pointing = [mean_and_range(seeds[column]) for column in POINTING]
            rows.append([name, way, str(len(seeds)), percent(share["share"]), interval, change, *pointing])
    header = f"arm | decoding | seeds | accuracy | 95 % interval | minus `{reference}` | DAC points | LLM points | DAC inside"
    return markdown(header, rows)


def intervention_table(frame: pandas.DataFrame) -> str:
    """What other latents do, for the arms on which it was tried."""
    rows = []
    for name in frame.arm.unique():
        seeds = seeds_of(frame, name)
        changed = {way: seeds.get(f"interventions.{way}.changed.share") for way in INTERVENTIONS}
        tried = [way for way, shares in changed.items() if shares is not None and shares.notna().all()]
        own = seeds["outcomes.usual"]
        rows += [[name, "its own", percent(share_right(own)["share"]), "", ""]] if tried else []
        for way in [*tried, "without_latents"] if tried else []:
            outcomes = seeds[f"outcomes.{way}"]
            title = INTERVENTIONS.get(way, "none at all (`latent_steps=0`)")
            cells = [percent(share_right(outcomes)["share"]), difference(own, outcomes)]
            rows.append([name, title, *cells, percent(changed[way].mean()) if way in tried else ""])
    return markdown("arm | latents | accuracy | minus its own latents | answers changed", rows)


def main_tables(study: Study, frame: pandas.DataFrame) -> str:
    """The main arms and what other latents do to them, for a document that says the rest."""
    main = next(group for group in study.groups if group.name == "main")
    names = [arm.name for arm in main.arms]
    tables = group_table(main, frame), intervention_table(frame[frame.arm.isin(names)])
    return "\n\n".join(tables)


def summarise(
    study: Study, form: Form, results: dict[str, dict], left: list[tuple[str, int]], findings: dict[str, str]
) -> str:
    """The whole summary as Markdown: a table a group, what was expected and found, other latents, what did not run."""
    frame = as_frame(results)
    parts = [f"# The study, `{form.name}`", describe(form, results)]
    for group in study.groups:
        parts += [f"## {group.title}", f"Expected: {group.expectation}", group_table(group, frame)]
        parts += [f"Found: {findings[group.name].strip()}"] if group.name in findings else []
    parts += ["## Do the latents matter?", intervention_table(frame), "## Not run"]
    parts += ["\n".join(f"- {name}, seed {seed}" for name, seed in left) or "Everything ran."]
    return "\n\n".join(parts) + "\n"


def describe(form: Form, results: dict[str, dict]) -> str:
    """What all arms have in common."""
    entry = next(iter(next(iter(results.values()))["seeds"].values()))
    machine, versions = entry["machine"], entry["versions"]
    return (
        f"Each arm: two parts of {form.part_steps} steps, 32 scenes a step, from one base: the embedded checkpoint as it was "
        f"before stage `path`, without BCM and DAC, tuned for {form.base_steps} steps to answer without reflecting. {form.scenes} unseen scenes of the "
        "preset `study`. Seeds differ in the training scenes, in what is drawn for new "
        "weights and in Eq. 2's draws; the base is the same. Shares are means over seeds with a 95 % Wilson interval for the scenes; differences are "
        "paired, scene by scene, with a 95 % bootstrap over scenes and seeds. With one seed, no interval holds what another "
        "training would have brought; where attention points, in brackets the range of the seeds, differs most of all. "
        f"{machine.get('gpu', machine['processor'])}, torch {versions['torch']}, transformers {versions['transformers']}."
    )
