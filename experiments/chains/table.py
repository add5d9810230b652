"""Markdown tables of all finished result files: `python -m experiments.chains.table`."""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from vreflection_hub_card.evaluation.statistics import wilson_interval
from vreflection_hub_card.glyphsearch import DIFFICULTIES

from ..markdown_tables import markdown
from .arms import ARMS, MAIN_ARMS
from .rows import QUESTIONS
from .train import RESULTS


TRAINED = DIFFICULTIES["chains"].chains  # the longest chain of each kind
UNSEEN = DIFFICULTIES["longer_chains"].chains
SEEDS = 3  # of each of the main arms
SCHEDULE = ("steps", "batch", "learning_rate", "scenes")
OPTIONS = (*SCHEDULE, "test_scenes")
REPLACED = {
    "zeroed": "zeros",
    "noise": "noise of the same norms",
    "shuffled": "another scene's",
    "first_look": "the first look alone, in all steps",
    "reversed": "reversed order",
}
Count = tuple[int, int]  # sum and count
KINSHIP = [("kinship", hops) for hops in range(TRAINED["kinship"] + 1)]
SPATIAL = [("spatial", hops) for hops in range(TRAINED["spatial"] + 1)]
SINGLE = [("attribute", 0), ("relation", 1)]


def read_results(folder: Path) -> list[dict]:
    """The result files of a folder whose runs have ended, ordered by arm, schedule and seed.

    Raises:
        ValueError: A result of an arm that `arms.py` doesn't have, or two of one arm, schedule and seed.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [result for result in results if "results" in result]
    if unknown := {result["arm"] for result in results} - set(ARMS):
        raise ValueError(f"arms.py has no arm {', '.join(sorted(unknown))}: take the result files out of {folder}.")
    keys = [(list(ARMS).index(result["arm"]), schedule(result), result["seed"]) for result in results]
    if len(set(keys)) < len(keys):
        raise ValueError(f"Two result files in {folder} are of one arm, schedule and seed: take one of them out.")
    return [result for _, result in sorted(zip(keys, results), key=lambda pair: pair[0])]


def schedule(result: dict) -> tuple:
    """What seeds of one table row have in common, besides the arm."""
    return (*(result["options"][name] for name in SCHEDULE), result["scenes"])


def by_arm(results: list[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Each arm with the results of its seeds; an arm of two schedules comes twice."""
    for (arm, _), seeds in groupby(results, lambda result: (result["arm"], schedule(result))):
        yield arm, list(seeds)


def by_decoding(results: list[dict]) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """For each arm and decoding the title, the results of its seeds, and what they say of that decoding."""
    for arm, seeds in by_arm(results):
        decodings = ARMS[arm].decodings
        for decoding in decodings:
            title = ARMS[arm].title + (f", decoded with `{decoding}`" if len(decodings) > 1 else "")
            yield title, seeds, [result["results"][decoding] for result in seeds]


def run_cells(seeds: list[dict]) -> list[str]:
    """The seeds and the steps of a table row."""
    return [", ".join(str(result["seed"]) for result in seeds), f"{seeds[0]['options']['steps']:,}"]


def pick(tables: list[dict], kind: str, hops: int) -> list[Count]:
    """Sum and count of each seed."""
    return [tuple(table[kind][str(hops)]) for table in tables]


def share_and_range(counts: list[Count]) -> tuple[float, float, float]:
    """The mean of the seeds' shares, the lowest and the highest; of one seed its share and the 95 % interval. All in %."""
    shares = [100 * total / count for total, count in counts]
    low, high = (min(shares), max(shares)) if len(shares) > 1 else (100 * end for end in wilson_interval(*counts[0]))
    return sum(shares) / len(shares), low, high


def share_cell(counts: list[Count]) -> str:
    """E.g. `"96.4 (95.1 to 97.4)"`, in %."""
    share, low, high = share_and_range(counts)
    return f"{share:.1f} ({low:.1f} to {high:.1f})"


def mean_cell(values: list[float]) -> str:
    """The seeds' mean; of several seeds with the lowest and the highest."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def header_of(columns: list[tuple[str, int]]) -> str:
    """Names of columns, e.g. `"kinship 0 | kinship 1"`."""
    return " | ".join(kind if (kind, hops) in SINGLE else f"{kind} {hops}" for kind, hops in columns)


def kinship_table(results: list[dict]) -> str:
    """Accuracy on kinship chains, and the rows that an arm has seen."""
    rows = []
    for title, seeds, said in by_decoding(results):
        options = seeds[0]["options"]
        seen = f"{options['steps'] * options['batch'] * QUESTIONS:,}"
        accuracy = [table["accuracy"] for table in said]
        rows.append([title, *run_cells(seeds), seen, *(share_cell(pick(accuracy, *column)) for column in KINSHIP)])
    return captioned(f"arm | seeds | steps | rows seen | {header_of(KINSHIP)}", rows, results, "Right answers in %.")


def other_table(results: list[dict]) -> str:
    """Accuracy on spatial chains, attributes and relations."""
    columns, rows = [*SPATIAL, *SINGLE], []
    for title, seeds, said in by_decoding(results):
        accuracy = [table["accuracy"] for table in said]
        rows.append([title, *run_cells(seeds), *(share_cell(pick(accuracy, *column)) for column in columns)])
    return captioned(f"arm | seeds | steps | {header_of(columns)}", rows, results, "Right answers in %.")


def unseen_table(results: list[dict]) -> str:
    """Accuracy on chains longer than any in training; where the model looks, how often the last look is in the last box."""
    columns = list(UNSEEN.items())
    rows = []
    for title, seeds, said in by_decoding(results):
        accuracy = [share_cell(pick([table["accuracy"] for table in said], *column)) for column in columns]
        looks = [""] * len(columns)
        if "inside the box by step" in said[0]:
            last = [table["inside the box by step"][-1] for table in said]
            looks = [share_cell(pick(last, *column)) for column in columns]
        rows.append([title, *run_cells(seeds), *accuracy, *looks])
    names = header_of(columns)
    header = f"arm | seeds | steps | {names} | last look inside, {names.replace(' | ', ' | last look inside, ')}"
    return captioned(header, rows, results, "Right answers, and last looks inside the last shape's box, in %.")


def tokens_table(results: list[dict]) -> str:
    """Tokens of a right answer, by the length of a kinship chain."""
    rows = []
    for arm, seeds in by_arm(results):
        tokens = [result["results"]["tokens of a right answer"] for result in seeds]
        lengths = [[total / count for total, count in pick(tokens, *column)] for column in KINSHIP]
        rows.append([ARMS[arm].title, *(mean_cell([length[0]]) for length in lengths)])  # the same for every seed
    note = "Latent steps, the tokens around them and the end of the turn count."
    return captioned(f"arm | {header_of(KINSHIP)}", rows, results, note, brackets=False)


def time_table(measured: dict) -> str:
    """The time of an answer by the length of a kinship chain, from the file that `answer_time.py` wrote."""
    first = next(iter(measured["median_seconds"]))
    rows = []
    for arm, by_hops in measured["ratio_to_the_first"].items():
        cells = [f"{ratio:.2f} ({low:.2f} to {high:.2f})" for ratio, low, high in by_hops.values()]
        if arm == first:
            cells = [f"{seconds:.3f} s" for seconds in measured["median_seconds"][arm].values()]
        rows.append([ARMS[arm].title, *cells])
    made = measured["made_with"]
    note = (
        f"The first line in seconds, the others as ratios to it: medians, in brackets the quartiles. Greedy, one answer at a "
        f"time, {measured['questions_of_each_length']} questions of each length, in which the arms take turns, "
        f"{measured['threads']} thread of a CPU. Measured on {made['date']} by `python -m experiments.chains.answer_time` with torch "
        f"{made['torch']}, transformers {made['transformers']}, vreflection {made['vreflection']}."
    )
    return markdown(f"arm | {header_of(KINSHIP)}", rows) + "\n\n" + note


def replaced_table(results: list[dict]) -> str:
    """Points that an answer loses with other latents than the model's own."""
    columns, rows, used = [*KINSHIP, *SPATIAL], [], []
    for title, seeds, said in by_decoding(results):
        if "replaced" not in said[0]:
            continue
        used += seeds
        for name, words in REPLACED.items():
            cells = [title, words]
            for column in columns:
                own = pick([table["accuracy"] for table in said], *column)
                other = pick([table["replaced"][name] for table in said], *column)
                cells.append(mean_cell([100 * (a - b) / count for (a, count), (b, _) in zip(own, other)]))
            rows.append(cells)
    header = f"arm | latents | {header_of(columns)}"
    note = "Points of accuracy lost against the arm's own latents; with several seeds with the lowest and the highest."
    return captioned(header, rows, used, note, brackets=False)


def looks_table(results: list[dict]) -> str:
    """How often each step looks inside its own box, on the longest kinship chains of the training."""
    column, rows, used, steps = KINSHIP[-1], [], [], 0
    for title, seeds, said in by_decoding(results):
        if "inside the box by step" in said[0]:
            used += seeds
            steps = len(said[0]["inside the box by step"])
            inside = [[table["inside the box by step"][step] for table in said] for step in range(steps)]
            rows.append([title, *(share_cell(pick(step, *column)) for step in inside)])
    header = " | ".join(["arm", *(f"step {step + 1}" for step in range(steps))])
    boxes = TRAINED["kinship"] + 1
    note = (
        f"Looks whose largest attention is inside the step's box, in %, kinship {column[1]}. Steps 1 to {boxes} have the "
        f"boxes of the {boxes} shapes, later steps the last one again."
    )
    return captioned(header, rows, used, note)


def tolerance_table(results: list[dict]) -> str:
    """Accuracy and mean steps with `latent_tolerance`."""
    columns, rows, used = [*KINSHIP, *SPATIAL], [], []
    for title, seeds, said in by_decoding(results):
        if "tolerance" not in said[0]:
            continue
        used += seeds
        steps = float(len(said[0]["inside the box by step"]))
        accuracy = [table["accuracy"] for table in said]
        whole = [tolerance_cell(pick(accuracy, *column), [steps]) for column in columns]
        rows.append([title, "0", *whole])
        for tolerance in said[0]["tolerance"]:
            early = [table["tolerance"][tolerance] for table in said]
            cells = [title, tolerance]
            for column in columns:
                taken = pick([table["steps"] for table in early], *column)
                means = [total / count for total, count in taken]
                cells.append(tolerance_cell(pick([table["accuracy"] for table in early], *column), means))
            rows.append(cells)
    note = "Right answers in %, and after a stroke the mean number of latent steps; means of the seeds."
    return captioned(f"arm | `latent_tolerance` | {header_of(columns)}", rows, used, note, brackets=False)


def tolerance_cell(counts: list[Count], steps: list[float]) -> str:
    """E.g. `"96.4 / 8.0"`."""
    return f"{share_and_range(counts)[0]:.1f} / {sum(steps) / len(steps):.1f}"


def without_reflecting_table(results: list[dict]) -> str:
    """Accuracy of answers in which no reflection may begin, of arms that were trained with such rows, too."""
    columns, rows, used = [*KINSHIP, *SPATIAL, *SINGLE], [], []
    for arm, seeds in by_arm(results):
        if ARMS[arm].plain_rows:
            used += seeds
            tables = [result["results"]["without reflecting"]["accuracy"] for result in seeds]
            cells = [share_cell(pick(tables, *column)) for column in columns]
            rows.append([ARMS[arm].title, *run_cells(seeds), *cells])
    note = "Right answers in %, where no reflection may begin."
    return captioned(f"arm | seeds | steps | {header_of(columns)}", rows, used, note)


def missing_runs(results: list[dict]) -> str:
    """Which arms have no results yet, and which main arms fewer seeds than were planned, as a list."""
    seeds = {arm: {result["seed"] for result in results if result["arm"] == arm} for arm in ARMS}
    missing = [arm for arm in ARMS if not seeds[arm]]
    few = [f"`{arm}` ({len(seeds[arm])})" for arm in MAIN_ARMS if 0 < len(seeds[arm]) < SEEDS]
    lines = [f"- Not run: {', '.join(f'`{arm}` ({ARMS[arm].title})' for arm in missing) or 'none'}."]
    if few:
        lines.append(f"- Fewer than {SEEDS} seeds: {', '.join(few)}.")
    steps = sorted({result["options"]["steps"] for result in results})
    if len(steps) > 1:
        lines.append(
            f"- Not all rows have one schedule: {', '.join(f'{count:,}' for count in steps)} steps. Compare arms of "
            "different schedules with care."
        )
    return "\n".join(lines)


def captioned(header: str, rows: list[list[str]], results: list[dict], note: str, brackets: bool = True) -> str:
    """A table with what it shows, and how that was measured; without rows, that no arm of the kind was run."""
    if not rows:
        return "No such arm was run."
    results = list({id(result): result for result in results}.values())  # an arm of two decodings comes twice
    counts = [
        count
        for result in results
        for of_kind in result["results"]["tokens of a right answer"].values()
        for _, count in of_kind.values()
    ]
    made_with = [result["made_with"] for result in results]
    packages = [
        f"{name} {' or '.join(sorted({made[name] for made in made_with}))}"
        for name in ("torch", "transformers", "vreflection")
    ]
    if brackets:
        note += " In brackets: the lowest and the highest seed, or of one seed the 95 % interval (Wilson)."
    seeds = sorted({result["seed"] for result in results})
    scenes = sorted({result["scenes"] for result in results})
    of_each = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    lines = [
        f"{note} Seeds {', '.join(map(str, seeds))}; {' or '.join(f'{count:,}' for count in scenes)} unseen scenes, "
        f"{of_each} questions of each kind and length.",
        f"Measured on {', '.join(sorted({made['date'] for made in made_with}))} with {', '.join(packages)}; "
        f"{', '.join(sorted({made['machine'] for made in made_with}))}. "
        f"To repeat: {', '.join(f'`{command}`' for command in commands(results))}.",
    ]
    return markdown(header, rows) + "\n\n" + " ".join(lines)


def commands(results: list[dict]) -> list[str]:
    """The commands that train and evaluate these arms, one for all arms of one schedule and the same seeds."""
    together = {}
    for arm, seeds in by_arm(results):
        together.setdefault((schedule(seeds[0]), tuple(result["seed"] for result in seeds)), []).append(arm)
    lines = []
    for (values, seeds), arms in together.items():
        options = [f"--{name} {value}" for name, value in zip(OPTIONS, values)]
        line = ["python -m experiments.chains.train --arms", *arms, "--seeds", *map(str, seeds), *options]
        lines.append(" ".join(line))
    return lines


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "chains missing": missing_runs,
    "chains kinship": kinship_table,
    "chains other": other_table,
    "chains unseen": unseen_table,
    "chains tokens": tokens_table,
    "chains replaced": replaced_table,
    "chains looks": looks_table,
    "chains tolerance": tolerance_table,
    "chains without reflecting": without_reflecting_table,
}


if __name__ == "__main__":
    finished = read_results(RESULTS)
    print("\n\n".join(render(finished) for render in TABLES.values()))
