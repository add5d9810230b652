"""The training benchmark, at a size that takes seconds."""

import json
import math
import random

import pytest
import torch

from experiments.benchmark import training
from experiments.benchmark.benchmark_tables import training_tables
from experiments.benchmark.random_rows import MAX_PATCHES, MIN_PATCHES, draw_grid
from experiments.benchmark.training import BATCH_SIZE, MIXED_BATCHES, TRAININGS, TrainingBench, measure_training


pytestmark = pytest.mark.slow  # its result file takes 15 seconds
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tiny_backbone, tmp_path_factory):
    return TrainingBench(tiny_backbone, CPU, 0, str(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def result_file(tiny_backbone, tmp_path_factory):
    """What is left of a run that was interrupted in its second round, after its first arm."""
    path = tmp_path_factory.mktemp("training") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            measure_training(tiny_backbone, CPU, path, command="the command", repeats=2)
    return path


def interrupt(patch, number: int) -> None:
    """Lets nobody finish a round."""
    train = TrainingBench.train

    def interrupted(self, trainer, arm, round_number, *args, **kwargs):
        if round_number == number and arm is TRAININGS["sft"]:
            raise KeyboardInterrupt
        return train(self, trainer, arm, round_number, *args, **kwargs)

    patch.setattr(TrainingBench, "train", interrupted)


@pytest.fixture
def result(result_file):
    return json.loads(result_file.read_text())


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_rounds_and_is_gone_on_with(tiny_backbone, result, tmp_path, monkeypatch):
    first_again = list(TRAININGS)[1]  # each round begins with another arm
    counts = {name: len(rounds) for name, rounds in result["rounds"].items()}
    assert result["repeats"] == 1 and counts == dict.fromkeys(TRAININGS, 1) | {first_again: 2}
    monkeypatch.setattr(training, "TRAININGS", {name: TRAININGS[name] for name in ("trl_sft", "sft")})
    path = tmp_path / "result.json"
    first = measure_training(tiny_backbone, CPU, path, repeats=1)
    kept, memory = [*first["rounds"]["sft"]], first["memory"]
    monkeypatch.setattr(training, "PeakMemory", None)  # isn't measured again
    again = measure_training(tiny_backbone, CPU, path, repeats=2)
    assert again["repeats"] == 2 and again["memory"] == memory
    assert len(again["rounds"]["sft"]) == 2 and again["rounds"]["sft"][:1] == kept


def test_other_settings_are_refused(tiny_backbone, result_file):
    with pytest.raises(ValueError, match="holds figures with seed = 0, not 1"):
        measure_training(tiny_backbone, CPU, result_file, seed=1)


def test_arms_train_the_same_samples(result):
    sizes = {
        name: [[one[key] for key in ("tokens", "positions", "labels")] for one in rounds[:1]]  # the whole round
        for name, rounds in result["rounds"].items()
    }
    assert sizes["trl_sft"] == sizes["trl_sft_no_checkpointing"] == sizes["sft"]
    for name in ("path", "stage1", "stage2_bcm", "stage2_dac", "stage2_hidden"):
        for (tokens, _, labels), (own_tokens, _, own_labels) in zip(sizes["sft"], sizes[name]):
            # Ten tokens of a reflection, of which the first is supervised.
            assert own_tokens == tokens + 10 * BATCH_SIZE and own_labels == labels + BATCH_SIZE
    assert [one[0] for one in sizes["packed"]] == [one[0] for one in sizes["padded"]]


def test_ratios_are_of_the_same_round(result):
    arms, rounds = result["arms"], result["rounds"]
    for name, arm in arms.items():
        assert tuple(arm["against"]) == TRAININGS[name].against
        for other, ratios in arm["against"].items():
            pairs = list(zip(rounds[name], rounds[other]))
            speeds = [theirs["step_seconds"] / own["step_seconds"] for own, theirs in pairs]
            assert ratios["speed"]["values"] == pytest.approx(speeds)
            rates = [own["tokens"] / own["seconds"] * theirs["seconds"] / theirs["tokens"] for own, theirs in pairs]
            assert ratios["tokens_per_second"]["values"] == pytest.approx(rates)
            if name != "packed":
                assert ratios["peak_memory"] == arm["peak_memory_bytes"] / arms[other]["peak_memory_bytes"]


def test_packs_leave_no_padding(result):
    assert result["arms"]["packed"]["padding"] == 0 < result["arms"]["padded"]["padding"] < 1
    assert result["rounds"]["padded"][0]["labels"] > MIXED_BATCHES * BATCH_SIZE


def test_peak_memory_holds_at_least_the_gradients(result):
    counts = result["shape"]["parameters"]
    trained = counts["stock"] - counts["visual"]
    peaks = {name: arm["peak_memory_bytes"] for name, arm in result["arms"].items()}
    assert peaks["sft"] >= 4 * trained and peaks["stage1"] >= 4 * (trained + counts["bcm"])
    assert peaks["stage2_hidden"] > peaks["stage2_bcm"]  # stores what the others compute again


def test_models_share_weights_but_not_what_they_train(bench):
    trl, ours = (bench.trainer(TRAININGS[name]).model for name in ("trl_sft", "stage1"))
    theirs, own = dict(trl.named_parameters()), dict(ours.named_parameters())
    assert set(own) - set(theirs) == {name for name in own if name.startswith(("model.bcm.", "model.dac."))}
    assert all(own[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    trained = {name for name, parameter in theirs.items() if parameter.requires_grad}
    assert trained == {name for name in theirs if not name.startswith("model.visual.")}
    assert {name for name, parameter in own.items() if parameter.requires_grad} - trained == {
        name for name in own if name.startswith("model.bcm.")
    }


def test_arms_train_adapters_and_the_base_is_the_same(tiny_backbone, tmp_path):
    bench = TrainingBench(tiny_backbone, CPU, 0, str(tmp_path), lora=4)
    before = {name: weight.clone() for name, weight in bench.weights.items()}
    trained = {}
    for name in ("trl_sft", "path"):
        trainer = bench.trainer(TRAININGS[name])
        bench.train(trainer, TRAININGS[name], 0, 1)
        trained[name] = {key for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    adapters = {key for key in trained["trl_sft"]}
    assert adapters and all(".language_model." in key and ".lora_" in key for key in adapters)
    rest = trained["path"] - adapters
    assert adapters < trained["path"] and {key.split(".")[3] for key in rest} >= {"bcm", "dac"}
    assert all(torch.equal(weight, before[name]) for name, weight in bench.weights.items())


def test_mix_keeps_the_paper_limits_and_the_shares_of_the_sources():
    rng = random.Random(0)
    areas = [math.prod(draw_grid(rng, 1)) for _ in range(4000)]
    assert 0.9 * MIN_PATCHES <= min(areas) and max(areas) <= MAX_PATCHES
    # Scanned pages and posters are 63 of the 438 thousand samples, and nothing else is as large.
    assert sum(area > 2500 for area in areas) / len(areas) == pytest.approx(63 / 438, abs=0.02)
    scaled = [math.prod(draw_grid(random.Random(seed), 4)) for seed in range(300)]
    whole = [math.prod(draw_grid(random.Random(seed), 1)) for seed in range(300)]
    assert sum(scaled) / sum(whole) == pytest.approx(1 / 4, rel=0.1)


def test_tables_show_the_figures(result):
    text = training_tables(result)
    for name, arm in result["arms"].items():
        if name not in ("padded", "packed"):
            line = next(line for line in text.splitlines() if line.startswith(f"| {arm['title']} |"))
            assert f"| {arm['step_seconds']['median']:.3g} |" in line
            assert f"| {arm['peak_memory_bytes'] / 2**20:,.0f} MiB |" in line
    packed = result["arms"]["packed"]["against"]["padded"]["tokens_per_second"]
    assert f"| {packed['median']:.2f} ({packed['low']:.2f} to {packed['high']:.2f}) |\n" in text
    assert "Measured by `the command`" in text and "1 rounds" in text


def test_the_command_hands_over_what_it_was_given(monkeypatch, tmp_path, tiny_backbone):
    measured = []
    monkeypatch.setitem(training.BACKBONES, "tiny", tiny_backbone)
    monkeypatch.setattr(training, "measure_training", lambda *args, **options: measured.append((args, options)))
    training.main(["--backbone", "tiny", "--output", str(tmp_path / "x.json"), "--repeats", "1"])
    ((backbone, device), options) = measured[0]
    assert backbone is tiny_backbone and device == CPU and options["repeats"] == 1
    assert options["command"].startswith("python -m experiments.benchmark.training --backbone tiny")
