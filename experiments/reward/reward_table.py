"""The table of what questions without boxes teach, from the result files of `without_boxes.py`."""

from ..markdown_tables import markdown
from .without_boxes import REPLACED


TITLES = {
    "grpo": "reward, gradients through the latents",
    "grpo_sigma": "reward, latents as actions",
    "grpo_constants": "reward, latents as constants",
    "sft": "right answers, without reflections",
    "sft_latents": "right answers behind own latents, as constants",
    "sft_through": "right answers behind own latents, gradients through them",
}
MANY_HOPS = ("2 hops", "3 hops")


def reward_table(results: list[dict]) -> str:
    """A row for the start and each arm. Raises a `ValueError` for arms of different options."""
    results = sorted((one for one in results if "after" in one), key=lambda one: list(TITLES).index(one["arm"]))
    if any(one["options"] != results[0]["options"] for one in results):
        raise ValueError("The arms' result files are of different options: run the arms anew with one set of them.")
    rows = [["the start", *figures(results[0]["before"]), "", "", ""]]
    for one in results:
        minutes = f"{one['seconds'] / 60:.0f}"
        rows.append([TITLES[one["arm"]], *figures(one["after"]), gained(one["gained"]), rewards(one), minutes])
    header = (
        "learned from | right, % | of 2 and 3 hops | reflects | made to reflect | zeros | noise | another scene's | gained"
        " | sampled reward | minutes"
    )
    return markdown(header, rows)


def figures(answers: dict) -> list[str]:
    """Percentages of the answers of one checkpoint."""
    many = [one for name, one in answers["by_kind"].items() if name.endswith(MANY_HOPS)]
    shares = [
        answers["accuracy"]["share"],
        sum(one["successes"] for one in many) / sum(one["count"] for one in many),
        answers["reflection_rate"]["share"],
        answers.get("made_to_reflect", {}).get("share"),
        *(answers["replacements"].get(name, {}).get("accuracy", {}).get("share") for name in REPLACED),
    ]
    return ["–" if share is None else f"{100 * share:.1f}" for share in shares]


def rewards(result: dict) -> str:
    """The share of sampled answers with a reward in the first and the last 100 steps, in %; nothing where none was sampled."""
    if not result["arm"].startswith("grpo"):
        return ""
    sampled = [step["reward"] for step in result["log"]]
    first, last = (sum(some) / len(some) for some in (sampled[:100], sampled[-100:]))
    return f"{100 * first:.1f} to {100 * last:.1f}"


def gained(difference: dict) -> str:
    """Points, with a 95 % interval."""
    points = (100 * difference[name] for name in ("difference", "low", "high"))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*points).replace("-", "−")
