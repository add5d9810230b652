"""The study as plots."""

from pathlib import Path

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vreflection_hub_card.inference.drawing import new_figure, save_figure

from .ablation_tables import seeds_of, share_right
from .arms import PLAIN, REFLECTING, Study


GREY, BLUE, ORANGE = "0.55", "#3466a5", "#d1752b"


def draw_all(study: Study, frame: pandas.DataFrame, folder: Path) -> None:
    """Writes `accuracy.png` and `pointing.png`."""
    save_figure(draw_accuracies(study, frame), folder / "accuracy.png")
    save_figure(draw_pointing(study, frame), folder / "pointing.png")


def new_rows(study: Study, frame: pandas.DataFrame) -> tuple[Figure, Axes, dict[str, int]]:
    """A figure with a row for each arm, under its group's title; the axes, and each arm's height."""
    heights, height = {}, 0
    figure = new_figure((7.5, 1))
    axes = figure.add_subplot()
    for group in study.groups:
        names = [arm.name for arm in group.arms if arm.name in frame.arm.unique()]
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


def draw_accuracies(study: Study, frame: pandas.DataFrame) -> Figure:
    """Every arm's accuracy with its interval, group by group; pale dots are single seeds."""
    figure, axes, heights = new_rows(study, frame)
    for name, height in heights.items():
        outcomes = seeds_of(frame, name)["outcomes.usual"]
        share = {key: 100 * value for key, value in share_right(outcomes).items()}
        axes.plot([share["low"], share["high"]], [height, height], color=GREY, linewidth=2, zorder=1)
        axes.scatter(100 * outcomes.str.count("1") / outcomes.str.len(), [height] * len(outcomes), s=12, color="0.75")
        axes.scatter(share["share"], height, s=28, color=BLUE, zorder=3)
    axes.set_xlabel("accuracy, %")
    return figure


def draw_pointing(study: Study, frame: pandas.DataFrame) -> Figure:
    """How often the largest attention of a reflection lies in the target's box: DAC's and the model's own; pale, single seeds."""
    figure, axes, heights = new_rows(study, frame)
    for source, color, label in (("dac", BLUE, "DAC"), ("llm", ORANGE, "language model")):
        for name, height in heights.items():
            way = REFLECTING if len(seeds_of(frame, name, REFLECTING)) else PLAIN
            shares = 100 * seeds_of(frame, name, way)[f"pointing.{source}.share"].dropna()
            axes.scatter(shares, [height] * len(shares), s=12, color=color, alpha=0.4, linewidths=0, zorder=2)
            if len(shares):
                axes.scatter(shares.mean(), height, s=28, color=color, label=label, zorder=3)
                label = None  # one entry in the legend
    area = 100 * frame["mean_box_area"].mean()
    axes.axvline(area, color=GREY, linestyle=":", label="the box's share of the picture")
    axes.set_xlim(0, 100)
    axes.set_xlabel("largest attention in the target's box, % of scenes")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
