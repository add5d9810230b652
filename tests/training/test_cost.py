import copy
import json
import math
import random
import statistics

import pytest
import torch
from accelerate import init_empty_weights
from transformers import Qwen2_5_VLForConditionalGeneration

from modeling_vreflection import VReflectionForConditionalGeneration
from vreflection_hub_card.efficiency.instruments import PeakMemory
from vreflection_hub_card.efficiency.shapes import SHAPES, TEXT, VISION, Shape, stock_config
from vreflection_hub_card.evaluation.report import fill_block
from vreflection_hub_card.evaluation.statistics import median_interval
from vreflection_training.cost.bench import ARMS, BATCH_SIZE, Bench
from vreflection_training.cost.cli import main
from vreflection_training.cost.measure import count_parameters, measure
from vreflection_training.cost.observers import VocabularyWatch
from vreflection_training.cost.report import render
from vreflection_training.cost.samples import draw_grid
from vreflection_training.cost.shapes import PAPER, build_config


CPU = torch.device("cpu")
TINY = Shape(
    note="a tiny one",
    text={
        **TEXT,
        "vocab_size": 1031,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]},
    },
    vision={
        **VISION,
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 64,
    },
    tied=False,
    dtype="float32",
    side=4,
    mix_divisor=32,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(TINY, CPU, 0, str(tmp_path_factory.mktemp("bench")))


@pytest.fixture(scope="module")
def result():
    measured = {"command": "vreflection-train cost", **measure(TINY, repeats=2)}
    return json.loads(json.dumps(measured))  # as its file holds it


def test_peak_memory_is_what_was_held_at_once():
    before = torch.zeros(2_000_000)
    with PeakMemory(CPU) as memory:
        one = torch.empty(1_000_000)  # 4 MB
        three = torch.empty(3, 1_000_000)  # 16 MB together: the peak
        del one, before  # what was held before doesn't count
        two = torch.empty(2_000_000)  # 20 MB together: a higher one
        del three
        torch.empty(1_000_000)  # 12 MB
    assert 20_000_000 <= memory.bytes < 20_010_000
    with PeakMemory(CPU) as second:  # whatever the first context left
        torch.empty(1_000_000)
    assert 4_000_000 <= second.bytes < 4_010_000
    assert two.numel() == 2_000_000


def test_peak_memory_of_a_backward_pass():
    layer = torch.nn.Linear(1000, 500, bias=False)
    inputs = torch.randn(200, 1000)
    with PeakMemory(CPU) as memory:
        layer(inputs).sum().backward()
    # The output and the weight's gradient; the gradient of the sum has one element, spread out without memory.
    at_least = 4 * (200 * 500 + 500 * 1000)
    assert at_least <= memory.bytes < 1.25 * at_least


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


@pytest.mark.parametrize(
    "count, low, high, coverage",
    [(9, 2, 8, 1 - 20 / 512), (8, 1, 8, 1 - 2 / 256), (6, 1, 6, 1 - 2 / 64), (3, 1, 3, 0.75), (1, 1, 1, 0.0)],
)
def test_interval_of_the_median(count, low, high, coverage):
    values = [float(value) for value in range(1, count + 1)]
    random.Random(0).shuffle(values)
    found = median_interval(values)
    assert (found["median"], found["low"], found["high"]) == ((count + 1) / 2, low, high)
    assert found["coverage"] == pytest.approx(coverage)


def test_interval_covers_the_median_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        found = median_interval([rng.expovariate(1) for _ in range(9)])
        hits += found["low"] <= math.log(2) <= found["high"]
    assert hits / 2000 == pytest.approx(found["coverage"], abs=0.015)


@pytest.mark.parametrize("name, count", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_have_the_published_numbers_of_parameters(name, count, bench):
    config = stock_config(build_config(SHAPES[name], bench.processor))
    with init_empty_weights(include_buffers=False):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_small_shape_splits_its_parameters_as_the_7b_does(bench):
    shares = {}
    for name in ("small", "7b"):
        with init_empty_weights(include_buffers=False):
            model = VReflectionForConditionalGeneration(build_config(SHAPES[name], bench.processor))
        language_model = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
        parts = {"bcm": model.model.bcm, "dac": model.model.dac, "visual": model.model.visual, "head": model.lm_head}
        shares[name] = {
            part: sum(parameter.numel() for parameter in module.parameters()) / language_model
            for part, module in parts.items()
        }
    assert shares["small"] == pytest.approx(shares["7b"], rel=0.15)


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
