"""The study as pictures."""

from pathlib import Path

from matplotlib.figure import Figure

from vreflection_hub_card.drawing import new_figure, save_figure
from vreflection_hub_card.evaluation.interventions import INTERVENTIONS
from vreflection_hub_card.evaluation.statistics import proportion

from .summary import accuracy, evaluations, outcomes
from .table import PLAIN, Study


INTERVAL, POINT, PALE = "0.55", "#3466a5", "0.75"


def draw_all(study: Study, results: dict[str, dict], folder: Path) -> list[Path]:
    """Writes the pictures whose arms have results; returns their paths."""
    figures = {"accuracy.png": draw_accuracies(study, results)}
    if any(evaluations(result) and tried(result) for result in results.values()):
        figures["interventions.png"] = draw_interventions(results)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in figures]


def draw_accuracies(study: Study, results: dict[str, dict]) -> Figure:
    """Every arm's accuracy with its interval, group by group; pale dots are single seeds."""
    rows = []
    for group in study.groups:
        rows += [(group.title, None)] + [(arm.name, results[arm.name]) for arm in group.arms if arm.name in results]
    figure = new_figure((7.5, 0.8 + 0.26 * len(rows)))
    axes = figure.add_subplot()
    for height, (name, result) in enumerate(rows):
        if result is None:
            axes.text(
                -0.02, height, name, transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold"
            )
            continue
        axes.text(-0.02, height, name, transform=axes.get_yaxis_transform(), ha="right", va="center")
        share = accuracy(result)
        axes.plot([100 * share["low"], 100 * share["high"]], [height, height], color=INTERVAL, linewidth=2, zorder=1)
        seeds = [100 * outcome.count("1") / len(outcome) for outcome in outcomes(result).values()]
        axes.scatter(seeds, [height] * len(seeds), s=12, color=PALE, zorder=2)
        axes.scatter([100 * share["share"]], [height], s=28, color=POINT, zorder=3)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel("accuracy, %")
    axes.spines[["left", "right", "top"]].set_visible(False)
    return figure


def draw_interventions(results: dict[str, dict]) -> Figure:
    """Accuracy with the model's own latents, with others', and with none."""
    arms = {name: result for name, result in results.items() if tried(result)}
    ways = {"usual": "its own", **{way: way.replace("_", " ") for way in INTERVENTIONS}, "without_latents": "none"}
    figure = new_figure((7.5, 3.2))
    axes = figure.add_subplot()
    width = 0.8 / len(arms)
    for number, (name, result) in enumerate(arms.items()):
        shares = []
        for way in ways:
            text = "".join(outcomes(result, PLAIN, way).values()).replace("-", "")
            shares.append(proportion([character == "1" for character in text]))
        places = [index + (number - (len(arms) - 1) / 2) * width for index in range(len(ways))]
        heights = [100 * share["share"] for share in shares]
        spread = [
            [height - 100 * share["low"] for height, share in zip(heights, shares)],
            [100 * share["high"] - height for height, share in zip(heights, shares)],
        ]
        axes.bar(places, heights, 0.9 * width, yerr=spread, ecolor=INTERVAL, label=name)
    axes.set_xticks(range(len(ways)), ways.values())
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(arms), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def tried(result: dict) -> bool:
    """Whether other latents were tried on an arm."""
    return all(one["interventions"] for one in evaluations(result).values())
