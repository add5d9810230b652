"""Do answers depend on the latents? What replacing them costs, as numbers, a sentence, a table and a figure."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..inference.drawing import add_title, new_figure
from .comparison import aligned_table
from .interventions import INTERVENTIONS, NEEDED, OWN
from .statistics import paired_difference, proportion


# A loss of fewer points counts as none.
NEGLIGIBLE = 5
USUAL_LABEL = "the model's own latents"
BASE_COLOUR, BAR_COLOUR = "#2b6cb0", "#c05621"


def summarise_replacement(usual: Sequence[bool], replaced: Sequence[bool], changed: Sequence[bool]) -> dict:
    """What a replacement costs the rows that it was tried on: which were right before and after, and whose text changed."""
    return {
        "accuracy": proportion(replaced),
        "usual_accuracy_of_the_same": proportion(usual),
        "changed": proportion(changed),
        **({"difference": paired_difference(usual, replaced)} if usual else {}),
    }


def judge(measured: dict) -> str:
    """What one replacement says: the answers `"depend"` on the latents, in `"part"`, `"not"`, or it is `"unclear"`.

    They depend where `NEEDED` points are lost. They don't where the loss is below `NEGLIGIBLE` points or its interval holds 0,
    and the interval excludes a loss of `NEEDED`. If no answer was right, none could be lost: then only equal texts say something.
    """
    difference = measured["difference"]
    loss, low, high = (100 * -difference[name] for name in ("difference", "high", "low"))
    if not measured["usual_accuracy_of_the_same"]["successes"] and measured["changed"]["successes"]:
        return "unclear"
    if low > 0 and loss >= NEEDED:
        return "depend"
    if loss < NEGLIGIBLE or low <= 0:
        return "not" if high < NEEDED else "unclear"
    return "part"


def latents_sentence(replacements: dict[str, dict]) -> str:
    """Whether the answers depend on the latents, in a sentence; `replacements` are by name what `summarise_replacement` gives.

    Those that still feed latents of the same answer don't count. All others must agree.
    """
    counted = {name: one for name, one in replacements.items() if one["accuracy"]["count"]}
    if not counted:
        return "No answer holds a reflection whose latents could be replaced: try --reflect, or more rows."
    foreign = {name: one for name, one in counted.items() if name not in OWN}
    if not foreign:
        return "The latents were only rearranged, which doesn't tell whether the answers depend on them: add zeroed."
    verdicts = {name: judge(one) for name, one in foreign.items()}
    kinds = set(verdicts.values())
    weakest = max(foreign, key=lambda name: foreign[name]["difference"]["difference"])
    shown = "zeroed" if "zeroed" in foreign else weakest
    costs = cost(shown, foreign[shown])
    if kinds == {"depend"}:
        return f"The answers depend on the latents: {costs}."
    if kinds == {"not"}:
        return f"The answers do not depend on the latents: {costs}."
    other = (
        "" if shown == weakest or verdicts[shown] == verdicts[weakest] else f", but {cost(weakest, foreign[weakest])}"
    )
    if kinds & {"depend", "part"}:
        return f"The answers depend on the latents in part: {costs}{other}."
    rows = foreign[shown]["accuracy"]["count"]
    reason = (
        "none of them is answered right"
        if not foreign[shown]["usual_accuracy_of_the_same"]["successes"]
        else "they are too few"
    )
    return f"{rows} rows don't tell whether the answers depend on the latents, for {reason}: {costs}{other}."


def cost(name: str, measured: dict) -> str:
    """The cost of a replacement in words."""
    difference = measured["difference"]
    way = "when zeroed" if name == "zeroed" else f"with {INTERVENTIONS[name]}"
    interval = f"{points(difference['low'])} to {points(difference['high'])}"
    return f"{points(difference['difference'])} points {way} (95 % interval {interval})"


def points(difference: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "−").replace("−0.0", "0.0").replace("+0.0", "0.0")


def dependence_table(result: dict) -> str:
    """The accuracy of all rows and of each replacement, as a Markdown table that is readable in a terminal."""
    lines = [("latents", "rows", "right", "accuracy", "95 % interval", "points", "95 % interval", "changed answers")]
    lines.append(accuracy_cells(f"{USUAL_LABEL}, all rows", result["accuracy"]) + ("", "", ""))
    if result["replacements"]:
        lines.append(
            accuracy_cells(f"{USUAL_LABEL}, rows that reflect", result["accuracy_of_reflecting"]) + ("", "", "")
        )
    for name, one in result["replacements"].items():
        cells = accuracy_cells(f"{name}: {INTERVENTIONS[name]}", one["accuracy"])
        if one["accuracy"]["count"]:
            difference = one["difference"]
            interval = f"{points(difference['low'])} to {points(difference['high'])}"
            cells += (points(difference["difference"]), interval, f"{one['changed']['share']:.1%}")
        else:
            cells += ("", "", "")
        lines.append(cells)
    return aligned_table(lines)


def accuracy_cells(name: str, accuracy: dict) -> tuple[str, ...]:
    """Name, count, right ones, share and interval of a proportion."""
    if not accuracy["count"]:
        return name, "0", "", "", ""
    interval = f"{accuracy['low']:.1%} to {accuracy['high']:.1%}"
    return name, str(accuracy["count"]), str(accuracy["successes"]), f"{accuracy['share']:.1%}", interval


def draw_dependence(result: dict) -> Figure:
    """A bar for the accuracy of the rows that reflect and for each replacement, with 95 % intervals; the sentence is the title."""
    bars = {USUAL_LABEL: result["accuracy_of_reflecting"]}
    bars |= {INTERVENTIONS[name]: one["accuracy"] for name, one in result["replacements"].items()}
    bars = {name: one for name, one in bars.items() if one["count"]}
    figure = new_figure((8.2, 1.3 + 0.42 * len(bars)))
    axes = figure.subplots()
    shares = [100 * one["share"] for one in bars.values()]
    errors = [
        [max(0, share - 100 * one["low"]) for share, one in zip(shares, bars.values())],
        [max(0, 100 * one["high"] - share) for share, one in zip(shares, bars.values())],
    ]
    colours = [BASE_COLOUR, *[BAR_COLOUR] * (len(bars) - 1)]
    axes.barh(
        range(len(bars)), shares, xerr=errors, color=colours, height=0.66, error_kw={"ecolor": "0.2", "capsize": 3}
    )
    for place, (share, one) in enumerate(zip(shares, bars.values())):
        axes.text(max(share, 100 * one["high"]) + 1.5, place, f"{share:.1f} %", va="center", fontsize=9)
    if shares:
        axes.axvline(shares[0], color=BASE_COLOUR, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 20))
    rows = result["accuracy_of_reflecting"]["count"]
    axes.set_xlabel(f"right answers in %, with 95 % intervals; {rows} rows whose answers reflect", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    add_title(figure, [result["sentence"]], 10)
    return figure
