"""The study as pictures."""

from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS
from vreflection_hub_card.inference.drawing import new_figure, save_figure

from .summary import accuracy, evaluations, outcomes, pointing_shares, share_right
from .table import PLAIN, REFLECTING, Study


INTERVAL, POINT, OTHER, PALE = "0.55", "#3466a5", "#d1752b", "0.75"


def draw_all(study: Study, results: dict[str, dict], folder: Path) -> list[Path]:
    """Writes the pictures whose arms have results; returns their paths."""
    figures = {"accuracy.png": draw_accuracies(study, results), "pointing.png": draw_pointing(study, results)}
    if any(evaluations(result) and tried(result) for result in results.values()):
        figures["interventions.png"] = draw_interventions(results)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in figures]


def new_rows(study: Study, results: dict[str, dict]) -> tuple[Figure, Axes, dict[str, int]]:
    """A figure with a row for each arm, under its group's title; the axes, and each arm's height."""
    heights, height = {}, 0
    figure = new_figure((7.5, 1))
    axes = figure.add_subplot()
    for group in study.groups:
        names = [arm.name for arm in group.arms if arm.name in results]
        if names:
            axes.text(0.01, height, group.title, transform=axes.get_yaxis_transform(), va="center", size="small")
            axes.axhline(height - 0.5, color="0.8", linewidth=0.6)
            heights |= {name: height + 1 + number for number, name in enumerate(names)}
            height += 1 + len(names)
    figure.set_size_inches(7.5, 0.9 + 0.24 * height)
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_yticks(list(heights.values()), list(heights))
    axes.tick_params("y", length=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    return figure, axes, heights


def draw_accuracies(study: Study, results: dict[str, dict]) -> Figure:
    """Every arm's accuracy with its interval, group by group; pale dots are single seeds."""
    figure, axes, heights = new_rows(study, results)
    for name, height in heights.items():
        share = accuracy(results[name])
        axes.plot([100 * share["low"], 100 * share["high"]], [height, height], color=INTERVAL, linewidth=2, zorder=1)
        seeds = [100 * outcome.count("1") / len(outcome) for outcome in outcomes(results[name]).values()]
        axes.scatter(seeds, [height] * len(seeds), s=12, color=PALE, zorder=2)
        axes.scatter([100 * share["share"]], [height], s=28, color=POINT, zorder=3)
    axes.set_xlabel("accuracy, %")
    return figure


def draw_pointing(study: Study, results: dict[str, dict]) -> Figure:
    """How often the largest attention of an arm's first reflection lies in the target's box: DAC's, and the model's own; pale, single seeds."""
    figure, axes, heights = new_rows(study, results)
    for source, color, label in (("dac", POINT, "DAC"), ("llm", OTHER, "language model")):
        ways = {name: REFLECTING if REFLECTING in results[name]["evaluate"] else PLAIN for name in heights}
        shares = {name: pointing_shares(results[name], source, way) for name, way in ways.items()}
        found = {name: 100 * fmean(seeds) for name, seeds in shares.items() if seeds}
        axes.scatter(found.values(), [heights[name] for name in found], s=28, color=color, label=label, zorder=3)
        pale = [(100 * share, heights[name]) for name, seeds in shares.items() for share in seeds]
        axes.scatter(*zip(*pale), s=12, color=color, alpha=0.4, linewidths=0, zorder=2)
    area = fmean(one["mean_box_area"] for result in results.values() for one in evaluations(result).values())
    axes.axvline(100 * area, color=INTERVAL, linestyle=":", label="the box's share of the picture")
    axes.set_xlim(0, 100)
    axes.set_xlabel("largest attention in the target's box, % of scenes")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
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
            shares.append(share_right(outcomes(result, asked=way)))
        places = [index + (number - (len(arms) - 1) / 2) * width for index in range(len(ways))]
        heights = [100 * share["share"] for share in shares]
        spread = [
            [
                max(0.0, height - 100 * share["low"]) for height, share in zip(heights, shares)
            ],  # of 0 % a rounding error
            [max(0.0, 100 * share["high"] - height) for height, share in zip(heights, shares)],
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
