"""The table and the figure of the chains say what the result files say."""

import json
import re

import pytest
from PIL import Image

from experiments.chains import table
from experiments.chains.answer_time import ratios
from experiments.chains.arms import ARMS
from experiments.chains.figure import draw_accuracy, draw_all
from experiments.chains.table import TABLES, read_results, schedule
from experiments.chains.train import RESULTS
from vreflection_hub_card.evaluation.statistics import wilson_interval
from vreflection_hub_card.glyphsearch import DIFFICULTIES


COUNTS = {
    (kind, hops): 90 + hops
    for difficulty in ("chains", "longer_chains")
    for kind, longest in DIFFICULTIES[difficulty].chains.items()
    for hops in range(longest + 1)
} | {("attribute", 0): 80, ("relation", 1): 70}


def by_kind(value) -> dict:
    """Sums and counts as `evaluate.py` writes them, `value` of each question."""
    counted = {}
    for (kind, hops), count in COUNTS.items():
        counted.setdefault(kind, {})[str(hops)] = [round(value(hops) * count), count]
    return counted


def reflecting(right: float) -> dict:
    return {
        "accuracy": by_kind(lambda hops: right),
        "begins a reflection": 1.0,
        "replaced": {name: by_kind(lambda hops: right / 2) for name in table.REPLACED},
        "inside the box by step": [by_kind(lambda hops, step=step: right - step / 100) for step in range(8)],
        "tolerance": {"0.1": {"accuracy": by_kind(lambda hops: right / 3), "steps": by_kind(lambda hops: 2 + hops)}},
    }


def write_result(folder, arm: str, seed: int, right: float, **options) -> dict:
    """A result file of an arm that answers this share of every kind of question."""
    said = {
        decoding: {"accuracy": by_kind(lambda hops: right)} if decoding in ("text", "filler") else reflecting(right)
        for decoding in ARMS[arm].decodings
    }
    if ARMS[arm].plain_rows:
        said["without reflecting"] = {"accuracy": by_kind(lambda hops: 0.25)}
    result = {
        "arm": arm,
        "seed": seed,
        "options": {"steps": 10_000, "batch": 16, "learning_rate": 1e-3, "scenes": 24_000, **options},
        "made_with": {
            "torch": "2.0",
            "transformers": "5.0",
            "vreflection": "0.2",
            "machine": "a machine",
            "date": "2026-11-27",
        },
        "scenes": 3000,
        "results": {"tokens of a right answer": by_kind(lambda hops: 5 + hops), **said},
    }
    (folder / f"{arm}_seed{seed}.json").write_text(json.dumps(result))
    return result


def cells(text: str, *beginning: str) -> list[str]:
    """The cells of the table's row that begins so, without its beginning."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    (row,) = [line for line in lines if line[: len(beginning)] == list(beginning)]
    return row[len(beginning) :]


@pytest.fixture
def folder(tmp_path):
    for seed, right in enumerate((0.9, 0.8, 0.7)):
        write_result(tmp_path, "path", seed, right, steps=18_000, learning_rate=2e-3)
    write_result(tmp_path, "sft", 0, 0.3)
    return tmp_path


@pytest.fixture
def results(folder):
    return read_results(folder)


def test_several_seeds_are_their_mean_and_range(folder, results):
    counted = []
    for seed in range(3):
        result = json.loads((folder / f"path_seed{seed}.json").read_text())
        right, count = result["results"]["dac"]["accuracy"]["kinship"]["3"]
        counted.append(100 * right / count)
    seeds, steps, rows, *shown = cells(TABLES["chains kinship"](results), "path")
    assert (seeds, steps, rows) == ("0, 1, 2", "18,000", f"{18_000 * 16 * 7:,}")
    assert shown[3] == f"{sum(counted) / 3:.1f} ({min(counted):.1f} to {max(counted):.1f})"


def test_one_seed_has_its_interval(results):
    count = COUNTS["kinship", 2]
    right = round(0.3 * count)
    low, high = wilson_interval(right, count)
    shown = cells(TABLES["chains kinship"](results), "SFT")[3:]
    assert shown[2] == f"{100 * right / count:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def test_committed_numbers_are_those_of_the_files():
    files = [json.loads(path.read_text()) for path in RESULTS.glob("path_seed*.json")]
    shown = cells(TABLES["chains other"](read_results(RESULTS)), "path")[2:]
    for column, (kind, hops) in enumerate([("spatial", "0"), ("spatial", "1"), ("spatial", "2"), ("relation", "1")]):
        shares = [
            100 * right / count for right, count in (one["results"]["dac"]["accuracy"][kind][hops] for one in files)
        ]
        place = 4 if kind == "relation" else column
        assert shown[place].split()[0] == f"{sum(shares) / len(shares):.1f}"


def test_points_lost_are_those_of_each_seed(results):
    lost = []
    for right in (0.9, 0.8, 0.7):
        count = COUNTS["spatial", 2]
        lost.append(100 * (round(right * count) - round(right / 2 * count)) / count)
    shown = cells(TABLES["chains replaced"](results), "path", "reversed order")
    assert shown[-1] == f"{sum(lost) / 3:.1f} ({min(lost):.1f} to {max(lost):.1f})"
    assert "SFT" not in TABLES["chains replaced"](results)


def test_looks_and_tolerance_go_by_step_and_hops(results):
    looks = cells(TABLES["chains looks"](results), "path")
    assert len(looks) == 8
    count = COUNTS["kinship", 3]
    inside = [100 * round((right - 0.07) * count) / count for right in (0.9, 0.8, 0.7)]
    assert looks[7] == f"{sum(inside) / 3:.1f} ({min(inside):.1f} to {max(inside):.1f})"
    early = [100 * round(right / 3 * count) / count for right in (0.9, 0.8, 0.7)]
    assert cells(TABLES["chains tolerance"](results), "path", "0.1")[3] == f"{sum(early) / 3:.1f} / 5.0"
    assert cells(TABLES["chains tolerance"](results), "path", "0")[3].endswith(" / 8.0")


def test_unseen_lengths_and_tokens_have_their_own_tables(results):
    count = COUNTS["kinship", 4]
    shown = cells(TABLES["chains unseen"](results), "SFT", "0", "10,000")
    assert shown[0].split()[0] == f"{100 * round(0.3 * count) / count:.1f}"
    assert cells(TABLES["chains tokens"](results), "SFT") == ["5.0", "6.0", "7.0", "8.0"]


def test_arms_that_were_not_run_are_named(folder, results):
    told = TABLES["chains missing"](results)
    missing = set(re.findall(r"`(\w+)` \([^0-9]", told.splitlines()[0]))
    assert missing == set(ARMS) - {"path", "sft"}
    assert "Fewer than 3 seeds: `sft` (1)." in told
    assert "10,000, 18,000 steps" in told
    assert TABLES["chains without reflecting"](results) == "No such arm was run."


def test_later_files_fill_the_tables(folder):
    for arm in ARMS:
        write_result(folder, arm, 5, 0.6, steps=18_000, learning_rate=2e-3)
    results = read_results(folder)
    assert "Not run: none." in TABLES["chains missing"](results)
    kinship = TABLES["chains kinship"](results)
    titles = [line.split(" | ")[0].strip("| ") for line in kinship.splitlines() if line.startswith("| ")][1:]
    assert "one box, decoded with `hidden`" in titles
    assert cells(kinship, "path")[0] == "0, 1, 2, 5"
    # SFT was trained with two schedules: they don't mix.
    assert [cells(kinship, "SFT", seed)[0] for seed in ("0", "5")] == ["10,000", "18,000"]
    without = cells(TABLES["chains without reflecting"](results), ARMS["path_half"].title)
    assert without[-1].split()[0] == f"{100 * round(0.25 * COUNTS['relation', 1]) / COUNTS['relation', 1]:.1f}"


def test_a_caption_says_how_it_was_measured(results):
    caption = TABLES["chains kinship"](results).splitlines()[-1]
    path, sft = (
        f"`python -m experiments.chains.train --arms {arm} --steps {steps} --batch 16 --learning_rate {rate} "
        "--scenes 24000 --test_scenes 3000`"
        for arm, steps, rate in (("path --seeds 0 1 2", 18_000, 0.002), ("sft --seeds 0", 10_000, 0.001))
    )
    assert caption.endswith(f"To repeat: {path}, {sft}.")
    assert "3,000 unseen scenes, 70 to 94 questions of each kind and length" in caption
    assert "on 2026-11-27 with torch 2.0, transformers 5.0, vreflection 0.2; a machine." in caption


def test_unfinished_runs_are_left_out(folder):
    path = folder / "names_seed0.json"
    result = write_result(folder, "names", 0, 0.5)
    del result["results"], result["scenes"]
    path.write_text(json.dumps(result))
    results = read_results(folder)
    assert {one["arm"] for one in results} == {"path", "sft"}
    assert "`names` (" in TABLES["chains missing"](results).splitlines()[0]


def test_wrong_folders_are_refused(folder):
    result = json.loads((folder / "sft_seed0.json").read_text())
    (folder / "again.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="Two result files"):
        read_results(folder)
    (folder / "again.json").write_text(json.dumps({**result, "arm": "other"}))
    with pytest.raises(ValueError, match="no arm other"):
        read_results(folder)


def test_the_figure_shows_the_accuracies(folder):
    write_result(folder, "sft_2", 0, 0.2)
    axes = draw_accuracy(read_results(folder)).axes[0]
    lines = {line.get_label().splitlines()[0]: list(line.get_ydata()) for line in axes.lines}
    assert set(lines) == {"path", "path, its latents", "SFT", "one of ten glyphs"}
    for title, rights in (("path", (0.9, 0.8, 0.7)), ("path, its latents", (0.45, 0.4, 0.35)), ("SFT", (0.3,))):
        shares = [sum(100 * round(right * (90 + hops)) / (90 + hops) for right in rights) for hops in range(4)]
        assert lines[title] == pytest.approx([share / len(rights) for share in shares])
    band = axes.collections[0].get_paths()[0].vertices
    ends = [sorted({round(y, 6) for x, y in band if x == hops}) for hops in range(4)]
    expected = [[100 * round(right * (90 + hops)) / (90 + hops) for right in (0.7, 0.9)] for hops in range(4)]
    assert ends == [pytest.approx(pair) for pair in expected]


def test_the_figures_are_drawn_from_a_folder(folder, tmp_path):
    draw_all(read_results(folder), tmp_path)
    for name in ("accuracy.png", "question.png"):
        path = tmp_path / name
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert picture.width > 400


def test_times_are_ratios_of_answers_to_the_same_question():
    # The machine is twice as slow for the second question, which no ratio shows.
    seconds = {"path": {"0": [1.0, 2.0, 1.0]}, "sft": {"0": [0.5, 1.0, 0.25]}}
    assert ratios(seconds) == {"path": {"0": [1.0, 1.0, 1.0]}, "sft": {"0": [0.5, 0.25, 0.5]}}


def test_the_prose_says_what_the_result_files_say():
    files = {path.stem: json.loads(path.read_text())["results"] for path in RESULTS.glob("*_seed*.json")}
    paths = [files[f"path_seed{seed}"]["dac"] for seed in range(3)]

    def share(table, kind, hops):
        total, count = table[kind][str(hops)]
        return 100 * total / count

    kinship = [[share(one["accuracy"], "kinship", hops) for one in paths] for hops in range(4)]
    lost = [
        share(one["accuracy"], kind, hops) - share(one["replaced"][name], kind, hops)
        for one in paths
        for name in ("zeroed", "noise", "shuffled")
        for kind, longest in (("kinship", 3), ("spatial", 2))
        for hops in range(longest + 1)
    ]
    losses = f"{min(lost):.0f} to {max(lost):.0f} points"
    root = RESULTS.parents[2]
    readme, page = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/latents.md"))
    means = [f"{sum(seeds) / 3:.1f}" for seeds in kinship]
    seeds = f"three seeds, {min(kinship[3]):.1f} to {max(kinship[3]):.1f} at three hops"
    assert f"answers {', '.join(means[:-1])} and {means[-1]} % ({seeds})" in readme
    words = [share(files[f"{arm}_seed0"]["text"]["accuracy"], "kinship", 3) for arm in ("sft", "names")]
    assert f"SFT has {words[0]:.1f} % at three hops, words that name each shape {words[1]:.1f} %" in readme
    assert f"The seeds of the path differ by {max(kinship[3]) - min(kinship[3]):.0f} points" in page
    assert losses in readme and losses in page
    assert min(map(min, kinship)) > 88 and "more than 88 %" in page


def test_the_prose_on_reflecting_in_doubt_says_what_its_file_says():
    """Half of the latent steps at a loss of less than a point."""
    result = json.loads((RESULTS / "thresholds" / "path_then_half.json").read_text())["tasks"]["thresholds"]
    always, *_ = result["thresholds"]
    (half,) = [one for one in result["thresholds"] if 3.9 < one["mean_latent_steps"] < 4.1]
    assert (always["threshold"], always["mean_latent_steps"]) == (0, 8)
    assert always["accuracy"]["share"] - half["accuracy"]["share"] < 0.01


def test_the_prose_on_the_short_schedule_says_what_its_files_say():
    files = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "cpu").glob("*.json")}
    assert len({schedule(result) for result in files.values()}) == 1
    tables = {(name, way): one for name, result in files.items() for way, one in result["results"].items()}
    shares = {
        key: {kind: {hops: 100 * a / b for hops, (a, b) in counts.items()} for kind, counts in one["accuracy"].items()}
        for key, one in tables.items()
        if "accuracy" in one
    }
    far = [("spatial", "1"), ("spatial", "2"), ("relation", "1")]

    def guesses(one: dict, *beside: tuple[str, str]) -> bool:
        return all(one[kind][hops] < 35 for kind, hops in (*far, *beside))

    paths = [one for (name, _), one in shares.items() if name.startswith("path_seed")]
    assert len(paths) == 3
    for path in paths:
        assert min(path["spatial"][hops] for hops in "012") > 70 and path["relation"]["1"] > 95
        assert 35 < path["kinship"]["1"] < 50
    assert max(one["kinship"][hops] for one in shares.values() for hops in "23") < 33, "no arm answers them"
    for (name, _), one in shares.items():
        if name.startswith("sft_seed"):
            assert guesses(one) and max(one["kinship"][hops] for hops in "123") < 20
    words = [one for (name, _), one in shares.items() if name.startswith("names_seed")]
    ahead = [
        sum(one["kinship"][hops] for one in words) / len(words) - sum(path["kinship"][hops] for path in paths) / 3
        for hops in "12"
    ]
    assert all(map(guesses, words)) and abs(ahead[0]) < 8 and 2 < ahead[1] < 10
    plain = shares["path_without_positions_seed0", "dac"]
    assert guesses(plain) and plain["kinship"]["1"] > 35
    asked = [("kinship", hops) for hops in "0123"] + [("spatial", hops) for hops in "012"] + [("relation", "1")]
    means = {(kind, hops): sum(path[kind][hops] for path in paths) / 3 for kind, hops in asked}
    for name, least, most in (("path_jitter_10_seed0", 0.6, 0.73), ("path_jitter_30_seed0", 0.4, 0.6)):
        moved = shares[name, "dac"]
        assert least < moved["kinship"]["1"] / means["kinship", "1"] < most
        assert all(0.7 < moved["spatial"][hops] / means["spatial", hops] < 0.85 for hops in "12")
    parts = [shares[f"path_{part}_seed0", "dac"] for part in (2, 4, 8)]
    for part in parts:
        assert all(means[kind, hops] - part[kind][hops] <= (10 if kind == "spatial" else 2) for kind, hops in far)
    assert [round(edge(part["kinship"]["1"] for part in parts)) for edge in (min, max)] == [23, 57]
    assert all(guesses(shares[f"sft_{part}_seed0", "text"]) for part in (2, 4, 8))
    fewer = [shares[f"names_{part}_seed0", "text"]["kinship"]["1"] for part in (2, 4, 8)]
    assert [round(edge(fewer)) for edge in (min, max)] == [35, 40]
    zeroed = {
        key: {
            kind: {hops: 100 * a / b for hops, (a, b) in counts.items()}
            for kind, counts in one["replaced"]["zeroed"].items()
        }
        for key, one in tables.items()
        if "replaced" in one
    }
    for seed in (0, 1, 2):
        name = f"path_then_half_seed{seed}"
        later, plain = shares[name, "dac"], shares[name, "without reflecting"]
        assert all(means[kind, hops] - later[kind][hops] < 8 for kind, hops in asked)
        assert all(later[kind][hops] - zeroed[name, "dac"][kind][hops] > 70 for kind, hops in far)
        assert plain["attribute"]["0"] == 100 and plain["kinship"]["0"] > 50 and plain["spatial"]["0"] > 50
    quarters = [shares[f"path_quarter_seed{seed}", "dac"] for seed in (0, 1)]
    assert [round(edge(one["spatial"][hops] for one in quarters for hops in "12")) for edge in (min, max)] == [62, 89]
    assert [round(one["relation"]["1"]) for one in quarters] == [89, 100]
    halves = [shares[f"path_half_seed{seed}", "dac"] for seed in (1, 2)]
    assert [round(edge(one["spatial"][hops] for one in halves for hops in "12")) for edge in (min, max)] == [58, 76]
    assert [round(one["relation"]["1"]) for one in halves] == [96, 88]
    assert all(
        guesses(zeroed[name, "dac"])
        for name in ("path_quarter_seed0", "path_quarter_seed1", "path_half_seed1", "path_half_seed2")
    )
    one_box = shares["one_box_seed0", "dac"]
    assert all(30 < one_box["spatial"][hops] < 37 for hops in "12") and 45 < one_box["relation"]["1"] < 55
    assert guesses(shares["one_box_seed0", "hidden"])
    sft = shares["sft_seed0", "text"]
    alike = [shares["filler_seed0", "filler"], *(shares["two_stages_seed0", way] for way in ("hidden", "dac"))]
    alike.append(shares["path_half_seed0", "dac"])
    assert guesses(shares["path_half_seed0", "without reflecting"])
    for kind, longest in (("kinship", "0123"), ("spatial", "012"), ("relation", "1")):
        assert all(abs(sft[kind][hops] - one[kind][hops]) < 10 for one in alike for hops in longest)
    for name in ("boundaries_seed0", "boxes_seed0"):
        one = shares[name, "text"]
        assert (
            max(one[kind][hops] for kind, longest in (("kinship", "0123"), ("spatial", "012")) for hops in longest)
            < 25
        )
    after = {}
    for name in ("path_seed0", "path_seed1", "path_seed2", "path_half_seed0", "sft_seed0"):
        losses = files[name]["losses"]
        curve = [loss for step, loss in zip(losses["step"], losses["CE"]) if step > 1200]
        after[name] = sum(curve) / len(curve)
    assert max(after[f"path_seed{seed}"] for seed in range(3)) < 0.02
    assert after["sft_seed0"] < after["path_half_seed0"] < 1.2 * after["sft_seed0"]
    for arm, way, most in (("two_stages", "hidden", 4), ("two_stages", "dac", 4), ("path_half", "dac", 3)):
        one = tables[f"{arm}_seed0", way]
        for replaced in one["replaced"].values():
            for kind, longest in (("kinship", 3), ("spatial", 2)):
                for hops in map(str, range(longest + 1)):
                    (own, count), (other, _) = one["accuracy"][kind][hops], replaced[kind][hops]
                    assert 100 * (own - other) / count < most
