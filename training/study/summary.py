"""The study's result files as a table, and what the differences are worth."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import yaml

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS
from vreflection_hub_card.evaluation.report import percent
from vreflection_hub_card.evaluation.statistics import paired_bootstrap, wilson_interval

from .table import PLAIN, Form, Group, Study


def read_results(study: Study, output: Path) -> dict[str, dict]:
    """The result files of those arms that have one, by the arms' names."""
    paths = {name: output / f"{name}.json" for name in study.arms}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}


def evaluations(result: dict, way: str = PLAIN) -> dict[str, dict]:
    """An arm's results in one way of decoding, by seed."""
    return {seed: told["evaluations"][way] for seed, told in result["seeds"].items()}


def share_right(outcomes: dict[str, str]) -> dict:
    """The mean share of right answers over seeds, with a Wilson interval for one seed's scenes.

    All seeds answer the same scenes: they say more about training, and nothing more about scenes.
    """
    asked = [outcome.replace("-", "") for outcome in outcomes.values()]
    share = fmean(outcome.count("1") / len(outcome) for outcome in asked)
    count = min(map(len, asked))
    low, high = wilson_interval(share * count, count)
    return {"share": share, "low": low, "high": high}


def accuracy(result: dict, way: str = PLAIN) -> dict:
    """How many answers of an arm are right, see [`share_right`]."""
    return share_right(outcomes(result, way))


def outcomes(result: dict, way: str = PLAIN, asked: str = "usual") -> dict[str, str]:
    """For each seed one character a scene: right, wrong, or not asked."""
    return {seed: one["outcomes"][asked] for seed, one in evaluations(result, way).items()}


def difference(first: dict[str, str], second: dict[str, str]) -> dict:
    """The second arm's accuracy minus the first's, on the seeds that both have, with its bootstrap interval."""
    seeds = [seed for seed in first if seed in second]
    return paired_bootstrap([(first[seed], second[seed]) for seed in seeds]) | {"seeds": len(seeds)}


def verdict(change: dict) -> str:
    """A difference in points with its interval, and whether it is one."""
    text = f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
    return text if change["low"] > 0 or change["high"] < 0 else f"{text}, within noise"


def read_findings(output: Path) -> dict[str, str]:
    """What people wrote about groups after they were run, by the groups' names, from `findings.yaml`."""
    path = output / "findings.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def summarise(
    study: Study,
    form: Form,
    results: dict[str, dict],
    left: Sequence[tuple[str, int]],
    findings: dict[str, str],
) -> str:
    """The whole summary as Markdown: a table a group, what was expected and found, other latents, what did not run."""
    lines = [f"# The study, `{form.name}`", "", describe(form, results), ""]
    for group in study.groups:
        lines += [f"## {group.title}", "", f"Expected: {group.expectation.strip()}", ""]
        lines += [*group_table(group, results), ""]
        if group.name in findings:
            lines += [f"Found: {findings[group.name].strip()}", ""]
    lines += ["## Do the latents matter?", "", *intervention_table(results), ""]
    lines += ["## Not run", ""]
    lines += [f"- {name}, seed {seed}" for name, seed in left] or ["Everything ran."]
    return "\n".join(lines).rstrip() + "\n"


def main_tables(study: Study, results: dict[str, dict]) -> str:
    """The main arms and what other latents do to them, for a document that says the rest."""
    main = next(group for group in study.groups if group.name == "main")
    finished = {arm.name: results[arm.name] for arm in main.arms if arm.name in results}
    return "\n".join([*group_table(main, results), "", *intervention_table(finished)])


def describe(form: Form, results: dict[str, dict]) -> str:
    """What all arms have in common."""
    told = next(iter(next(iter(results.values()))["seeds"].values()))
    machine, versions = told["machine"], told["versions"]
    return (
        f"Each arm: two parts of {form.part_steps} steps, 32 scenes a step, from one base: the embedded checkpoint without "
        f"BCM and DAC, tuned for {form.base_steps} steps to answer without reflecting. {form.scenes} unseen scenes of the "
        "preset `study`. Seeds differ in the training scenes, in what is drawn for new "
        "weights and in Eq. 2's draws; the base is the same. Shares are means over seeds with a 95 % Wilson interval for the scenes; differences are "
        "paired, scene by scene, with a 95 % bootstrap over scenes and seeds. With one seed, no interval holds what another "
        "training would have brought; where attention points, in brackets the range of the seeds, differs most of all. "
        f"{machine.get('gpu', machine['processor'])}, torch {versions['torch']}, transformers {versions['transformers']}."
    )


def group_table(group: Group, results: dict[str, dict]) -> list[str]:
    """A group's arms and those that it is compared with; differences are to the last of these, else to `sft`."""
    names = [name for name in (*group.compare, *(arm.name for arm in group.arms)) if name in results]
    reference = group.compare[-1] if group.compare else "sft"
    lines = [
        f"| arm | decoding | seeds | accuracy | 95 % interval | minus `{reference}` | DAC points | LLM points | DAC inside |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        ways = next(iter(results[name]["seeds"].values()))["evaluations"]
        for way in [PLAIN] if name in group.compare else ways:
            share = accuracy(results[name], way)
            against = ""
            if reference in results and (name, way) != (reference, PLAIN):
                against = verdict(difference(outcomes(results[reference]), outcomes(results[name], way)))
            cells = [name, way, str(len(results[name]["seeds"])), percent(share["share"])]
            cells += [f"{percent(share['low'])} to {percent(share['high'])}", against, *pointing(results[name], way)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def pointing_shares(result: dict, source: str, way: str = PLAIN, measure: str = "pointing") -> list[float]:
    """Each seed's pointing game of a source, or its share inside the box; empty where the source was never trained."""
    if source == "dac" and not any(part["stage"] in ("2", "joint") for part in result["parts"]):
        return []
    found = [one[measure][source] for one in evaluations(result, way).values() if source in one[measure]]
    return [one["share"] if isinstance(one, dict) else one for one in found]


def pointing(result: dict, way: str) -> list[str]:
    """The cells of an arm's pointing games and DAC's share inside the box: the mean, and the range of several seeds."""
    asked = (("dac", "pointing"), ("llm", "pointing"), ("dac", "attention_inside_box"))
    cells = []
    for source, measure in asked:
        shares = pointing_shares(result, source, way, measure)
        seeds = f" ({100 * min(shares):.1f} to {100 * max(shares):.1f})" if len(shares) > 1 else ""
        cells.append(percent(fmean(shares)) + seeds if shares else "")
    return cells


def intervention_table(results: dict[str, dict]) -> list[str]:
    """What other latents do, for the arms on which it was tried."""
    lines = ["| arm | latents | accuracy | minus its own latents | answers changed |", "|---|---|---|---|---|"]
    for name, result in results.items():
        told = evaluations(result)
        tried = [way for way in INTERVENTIONS if all(way in one["interventions"] for one in told.values())]
        if not tried:
            continue
        lines.append(f"| {name} | its own | {percent(accuracy(result)['share'])} | | |")
        for way in (*tried, "without_latents"):
            change = difference(outcomes(result), outcomes(result, asked=way))
            share = share_right(outcomes(result, asked=way))["share"]
            changed = (
                percent(fmean(one["interventions"][way]["changed"]["share"] for one in told.values()))
                if way in INTERVENTIONS
                else ""
            )
            told_as = INTERVENTIONS.get(way, "none at all (`latent_steps=0`)")
            lines.append(f"| {name} | {told_as} | {percent(share)} | {verdict(change)} | {changed} |")
    return lines
