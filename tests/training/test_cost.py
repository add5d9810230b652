import copy
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from tiny_shape import TINY

from vreflection_hub_card.efficiency.models import count_parameters
from vreflection_hub_card.evaluation.report import fill_block
from vreflection_training.cost.bench import ARMS, BATCH_SIZE, Bench
from vreflection_training.cost.cli import main
from vreflection_training.cost.measure import measure
from vreflection_training.cost.observers import VocabularyWatch
from vreflection_training.cost.report import render
from vreflection_training.cost.samples import PAPER, draw_grid


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(TINY, CPU, 0, str(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def result():
    measured = {"command": "vreflection-train cost", **measure(TINY, repeats=2)}
    return json.loads(json.dumps(measured))  # as its file holds it


def test_the_widest_tensor_is_found_forward_and_backward():
    head = torch.nn.Linear(8, 1031, bias=False)
    states = torch.randn(3, 5, 8, requires_grad=True)
    with VocabularyWatch(1031, 8) as watch:
        head(states[:, :2]).square().sum().backward()
    assert (watch.rows, watch.shape[-1]) == (6, 1031)

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            torch.zeros(15, 1031)  # only here
            return gradient

    with VocabularyWatch(1031, 8) as watch:
        Whole.apply(head(states[:, :2]).sum()).backward()
    assert (watch.rows, watch.shape) == (15, [15, 1031])


def test_models_share_weights_but_not_what_they_train(bench):
    trl, ours = (bench.runner(ARMS[name].options, ARMS[name].stock).trainer.model for name in ("trl_sft", "stage1"))
    theirs, own = dict(trl.named_parameters()), dict(ours.named_parameters())
    assert set(own) - set(theirs) == {name for name in own if name.startswith(("model.bcm.", "model.dac."))}
    assert all(own[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    trained = {name for name, parameter in theirs.items() if parameter.requires_grad}
    assert trained == {name for name in theirs if not name.startswith("model.visual.")}
    assert {name for name, parameter in own.items() if parameter.requires_grad} - trained == {
        name for name in own if name.startswith("model.bcm.")
    }


def test_mix_keeps_the_paper_limits_and_the_shares_of_the_sources():
    rng = random.Random(0)
    areas = [math.prod(draw_grid(rng, 1)) for _ in range(4000)]
    assert 0.9 * PAPER["min_patches"] <= min(areas) and max(areas) <= PAPER["max_patches"]
    # Scanned pages and posters are 63 of the 438 thousand samples, and nothing else is as large.
    assert sum(area > 2500 for area in areas) / len(areas) == pytest.approx(63 / 438, abs=0.02)
    scaled = [math.prod(draw_grid(random.Random(seed), 4)) for seed in range(300)]
    whole = [math.prod(draw_grid(random.Random(seed), 1)) for seed in range(300)]
    assert sum(scaled) / sum(whole) == pytest.approx(1 / 4, rel=0.1)


def test_arms_train_the_same_samples(result):
    arms = result["arms"]
    assert set(arms) == set(ARMS)
    sizes = {
        name: [arm[f"{size}_per_step"] for size in ("tokens", "positions", "labels")] for name, arm in arms.items()
    }
    assert sizes["trl_sft"] == sizes["trl_sft_no_checkpointing"] == sizes["sft"]
    tokens, _, labels = sizes["sft"]
    for name in ("stage1", "stage2_bcm", "stage2_dac", "stage2_hidden"):
        # Ten tokens of a reflection, of which the first is supervised.
        assert sizes[name][0] == tokens + 10 * BATCH_SIZE and sizes[name][2] == labels + BATCH_SIZE


def test_ratios_are_taken_within_a_round(result):
    arms = result["arms"]
    for name, arm in arms.items():
        assert set(arm["against"]) == set(ARMS[name].against)
        for other, ratios in arm["against"].items():
            own, theirs = arm["step_seconds"]["values"], arms[other]["step_seconds"]["values"]
            assert len(own) == len(theirs) == result["repeats"]
            assert ratios["speed"]["values"] == pytest.approx([b / a for a, b in zip(own, theirs)])
            rates = zip(arm["tokens_per_second"]["values"], arms[other]["tokens_per_second"]["values"])
            assert ratios["tokens_per_second"]["values"] == pytest.approx([a / b for a, b in rates])
            assert ratios["peak_memory"] == arm["peak_memory_bytes"] / arms[other]["peak_memory_bytes"]


def test_peak_memory_holds_at_least_the_gradients(result, bench):
    counts = count_parameters(bench.weights)
    assert counts["all"] == sum(weight.numel() for weight in bench.weights.values())
    trained = counts["all"] - counts["visual"] - counts["bcm"] - counts["dac"]
    peaks = {name: arm["peak_memory_bytes"] for name, arm in result["arms"].items()}
    assert peaks["sft"] >= 4 * trained and peaks["stage1"] >= 4 * (trained + counts["bcm"])
    assert peaks["stage2_hidden"] > peaks["stage2_bcm"]  # stores what the others compute again


def test_ours_never_holds_logits_of_whole_sequences(result):
    for name, arm in result["arms"].items():
        tensor = arm["largest_vocabulary_tensor"]
        assert tensor["shape"][-1] == TINY.text["vocab_size"]
        if not ARMS[name].stock:
            assert arm["labels_per_step"] / 2 <= tensor["rows"] < tensor["positions"]


def test_packing_compares_the_same_tokens(result):
    packing = result["packing"]
    assert packing["packed"]["padding"] == 0 < packing["padded"]["padding"] < 1
    assert packing["padded"]["steps_per_round"] == packing["samples_per_round"] / BATCH_SIZE
    assert packing["limits"] == {"max_length": 16_384 // 32, "long_sample_length": 4096 // 32}
    ratios = [a / b for a, b in zip(*(packing[name]["tokens_per_second"]["values"] for name in ("packed", "padded")))]
    assert packing["speed"]["values"] == pytest.approx(ratios)


def test_goals_are_judged_by_the_figures(result):
    for goal in result["goals"]:
        relation, bound = goal["bound"].split()
        holds = {">=": goal["value"] >= float(bound), "<=": goal["value"] <= float(bound)}
        assert goal["met"] == holds.get(relation, goal["value"] < float(bound))
    values = {goal["goal"]: goal["value"] for goal in result["goals"]}
    speed = result["arms"]["stage1"]["against"]["sft"]["speed"]["values"]
    assert values["`stage1`: speed on the same samples, `sft` = 1"] == pytest.approx(statistics.median(speed))
    assert values["packing: useful tokens/s, padding = 1"] == result["packing"]["speed"]["median"]


def test_render_writes_every_figure(result):
    text = render(result)
    for arm in result["arms"].values():
        line = next(line for line in text.splitlines() if line.startswith(f"| {arm['title']} |"))
        assert f"| {arm['step_seconds']['median']:.3g} |" in line
        assert f"| {arm['peak_memory_bytes'] / 2**20:,.0f} MiB |" in line
    assert result["command"] in text


@pytest.mark.parametrize(
    "path",
    [
        ["arms"],
        ["arms", "stage2_dac"],
        ["arms", "stage1", "step_seconds", "median"],
        ["arms", "stage1", "against", "trl_sft", "speed"],
        ["arms", "stage1", "peak_memory_bytes"],
        ["packing", "speed"],
        ["command"],
    ],
)
def test_render_refuses_a_result_without_figures(result, path):
    broken = copy.deepcopy(result)
    holder = broken
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    with pytest.raises(ValueError, match="lacks figures"):
        render(broken)


def test_render_refuses_empty_figures(result):
    broken = copy.deepcopy(result)
    broken["arms"]["stage1"]["step_seconds"]["median"] = None
    with pytest.raises(ValueError, match="lacks figures"):
        render(broken)


def test_command_fills_a_document(result, tmp_path):
    file, document = tmp_path / "cost.json", tmp_path / "README.md"
    file.write_text(json.dumps(result))
    document.write_text("above\n<!-- cost -->\nold\n<!-- /cost -->\nbelow\n")
    assert main(["--render", str(file), str(document)]) == 0
    assert document.read_text() == f"above\n<!-- cost -->\n\n{render(result)}\n\n<!-- /cost -->\nbelow\n"


def test_the_readme_quotes_the_committed_result():
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    committed = json.loads((root / "training/results/cost_cpu.json").read_text())
    assert fill_block(readme, "cost", render(committed)) == readme


def test_what_the_command_refuses(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="<!-- cost -->"):
        fill_block("no markers", "cost", "text")
    for arguments in ([], ["--output", "x.json", "--render", "a", "b"], ["--output", "x.json", "--shape", "72b"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert main(["--output", str(tmp_path / "x.json"), "--repeats", "0"]) == 2
    assert "`repeats` must be at least 1, got 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path / "x.json"), "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
