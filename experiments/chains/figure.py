"""The figures of `docs/latents.md`: `python -m experiments.chains.figure`.

`accuracy.png`, every arm's accuracy by kinship hops, is drawn from the result files; `question.png` is one scene with the path
of a question.
"""

from pathlib import Path

from matplotlib.figure import Figure

from vreflection_hub_card.glyphsearch import Question, Scene, chain_questions, make_scene, scene_seed
from vreflection_hub_card.inference.drawing import new_figure, save_figure, show

from .arms import ARMS
from .table import KINSHIP, by_decoding, pick, read_results, share_and_range
from .train import RESULTS


COLOURS = (
    "#3466a5",
    "#d1752b",
    "#3d8f5f",
    "#a03c78",
    "#7a6a2f",
    "#4aa3b5",
    "#8a5ac2",
    "#b23a3a",
    "#5f6b73",
    "#c29a2b",
)
GREY = "0.45"
DPI = 110
EXAMPLE = 4  # index of the scene in the test split


def draw_accuracy(results: list[dict]) -> Figure:
    """Accuracy by kinship hops, a line for each arm with a band: the seeds' range, or one seed's 95 % interval.

    Arms with a part of the scenes are in the table alone.
    """
    results = [result for result in results if ARMS[result["arm"]].share_of_scenes == 1]
    lines = list(by_decoding(results))
    figure = new_figure((8.2, max(3.8, 0.48 * (len(lines) + 2))), DPI)
    axes = figure.add_subplot()
    hops = [hops for _, hops in KINSHIP]
    for number, (title, seeds, said) in enumerate(lines):
        colour, marker = COLOURS[number % len(COLOURS)], "os"[number // len(COLOURS) % 2]
        mean, low, high = by_hops([table["accuracy"] for table in said])
        count = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        title = title.replace("`", "")
        label = f"{title}\n({seeds[0]['options']['steps']:,} steps, {count})"
        axes.plot(hops, mean, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
        axes.fill_between(hops, low, high, color=colour, alpha=0.2, linewidth=0)
        if seeds[0]["arm"] == "path" and "replaced" in said[0]:
            zeroed, *_ = by_hops([table["replaced"]["zeroed"] for table in said])
            label = f"{title}, its latents\nreplaced by zeros"
            axes.plot(hops, zeroed, color=colour, linestyle="--", linewidth=1.6, label=label)
    axes.axhline(10, color=GREY, linewidth=0.8, linestyle=":", label="one of ten glyphs")
    axes.set_xticks(hops)
    axes.set_ylim(0, 101)
    axes.set_xlabel("hops from the shape in the question to the answer")
    axes.set_ylabel("right answers, %")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5), labelspacing=0.9)
    return figure


def by_hops(tables: list[dict]) -> list[list[float]]:
    """The mean, the lowest and the highest share by kinship hops, in %."""
    return [list(line) for line in zip(*(share_and_range(pick(tables, *column)) for column in KINSHIP))]


def example_question() -> tuple[Scene, Question]:
    """A scene of the test split, and its first kinship question of three hops."""
    scene = make_scene(scene_seed("test", EXAMPLE), "chains")
    return scene, chain_questions(scene, *KINSHIP[-1])[0]


def draw_scene(scene: Scene, question: Question) -> Figure:
    """The scene, and beside it the same with the boxes of the question's path, numbered by step."""
    figure = new_figure((5.4, 2.8), DPI)
    plain, path = figure.subplots(1, 2)
    show(plain, scene.image, [])
    show(path, scene.image, [item.box for item in question.path])
    return figure


def draw_all(results: list[dict], folder: Path) -> None:
    """Writes `accuracy.png` and `question.png`."""
    save_figure(draw_accuracy(results), folder / "accuracy.png")
    save_figure(draw_scene(*example_question()), folder / "question.png")


if __name__ == "__main__":
    draw_all(read_results(RESULTS), RESULTS)
    print(example_question()[1].text, "→", example_question()[1].answer)
