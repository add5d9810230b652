"""Renders a result file as Markdown, so that no number in a document is written by hand."""

from .interventions import INTERVENTIONS
from .thresholds import thresholds_table


def glyphsearch_table(report: dict) -> str:
    """The results of GlyphSearch, as `vreflection evaluate` wrote them, as a table with what they were measured on."""
    result = report["tasks"]["glyphsearch"]
    data, decoding, machine, versions = result["data"], result["decoding"], report["machine"], report["versions"]
    accuracy = result["accuracy"]
    rows = {"Accuracy": accuracy["overall"]}
    kinds = {name: one for name, one in accuracy.items() if name != "overall" and one["count"]}
    if len(kinds) > 1:
        rows |= {f"- {describe_kind(name)}": one for name, one in kinds.items()}
    rows["Answers that begin to reflect"] = result["reflection_rate"]
    rows["Accuracy without latents (`latent_steps=0`)"] = result["without_latents"]["accuracy"]["overall"]
    for name, measured in result["interventions"].items():
        other = measured["accuracy"]["overall"]
        some = f" (of {other['count']} answers that reflect)" if 0 < other["count"] < data["count"] else ""
        rows[f"Accuracy with {INTERVENTIONS[name]}{some}"] = other
    for source, pointing in result["pointing"].items():
        rows[f"Largest attention inside the target's box, {source.upper()}"] = pointing
    by_step = result.get("pointing_by_step", {})  # results from before there were paths have none
    for source, looks in by_step.items():
        rows[f"- of the last step alone, {source.upper()}"] = looks["last"]
    lines = [
        f"| {data['count']} unseen scenes, `{data['difficulty']}` difficulty | share | 95 % interval |",
        "|---|---|---|",
        *(f"| {name} | {with_interval(row)} |" for name, row in rows.items()),
        f"| The box's share of the picture | {percent(result['mean_box_area'])} | |",
        "",
        f"Measured by `{report['command']}` on {report['date'][:10]} ({data['split']} seeds {data['first_seed']} to "
        f'{data["last_seed"]}, `latent_feedback="{decoding["latent_feedback"]}"`; chance is {percent(data["chance"])}; '
        f"torch {versions['torch']}, transformers {versions['transformers']}, {machine['processor']}, "
        f"{machine['cores']} cores).",
    ]
    for source, looks in by_step.items():
        shares = ", ".join(percent(one["share"]) for step, one in looks.items() if step != "last")
        lines += [
            "",
            f"{source.upper()}'s largest attention inside the box of its own step, from step 1 on: {shares}.",
        ]
    return "\n".join(lines)


def thresholds_report(report: dict) -> str:
    """The table of `vreflection evaluate --thresholds` on GlyphSearch, with what it was measured on."""
    result, machine, versions = report["tasks"]["thresholds"], report["machine"], report["versions"]
    data, decoding = result["data"], result["decoding"]
    return (
        f"{thresholds_table(result)}\n\nMeasured by `{report['command']}` on {report['date'][:10]} ({data['count']} unseen scenes, "
        f"{data['split']} seeds {data['first_seed']} to {data['last_seed']}, `{data['difficulty']}` difficulty, "
        f'{decoding["latent_steps"]} latent steps, `latent_feedback="{decoding["latent_feedback"]}"`, '
        f"`max_reflections={decoding['max_reflections']}`; chance is {percent(data['chance'])}; vreflection "
        f"{versions['vreflection']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{machine['processor']}, {machine['cores']} cores)."
    )


def describe_kind(name: str) -> str:
    """A kind of questions as result files name it, e.g. `"kinship 1"`, in words."""
    kind, _, hops = name.partition(" ")
    return f"{kind} questions" + (f", {hops} hop{'' if hops == '1' else 's'}" if hops else "")


def with_interval(proportion: dict) -> str:
    """The cells of a proportion: share and interval, or that nothing was counted."""
    if not proportion["count"]:
        return "none counted | "
    return f"{percent(proportion['share'])} | {percent(proportion['low'])} to {percent(proportion['high'])}"


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"
