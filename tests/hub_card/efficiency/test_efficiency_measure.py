import statistics

import pytest
import torch
from transformers import CompileConfig

from vreflection_hub_card.efficiency import contenders
from vreflection_hub_card.efficiency.contenders import PHASES, Contender, Variant
from vreflection_hub_card.efficiency.measure import (
    DEFAULT,
    judge,
    list_variants,
    measure,
    measure_steps,
    until_end,
)
from vreflection_hub_card.efficiency.questions import draw_conversations, make_inputs


def test_every_variant_is_measured_or_says_why_not(result):
    plain = {f"{attention}, {cache} cache" for attention in ("sdpa", "eager") for cache in ("dynamic", "static")}
    assert set(result["variants"]) == plain and next(iter(result["variants"])) == DEFAULT.title
    assert set(result["not_run"]) == {
        "flash_attention_2",
        "sdpa, static cache, compiled",
        "eager, static cache, compiled",
    }


def test_ratios_are_taken_within_a_round(result):
    for variant in result["variants"].values():
        for phase in PHASES:
            ours, stock = (variant[name][phase]["values"] for name in ("ours", "stock"))
            assert len(ours) == len(stock) == result["repeats"]
            assert variant["ratios"][phase]["values"] == pytest.approx([a / b for a, b in zip(ours, stock)])
    for one in result["batches"].values():
        pairs = zip(one["ours"]["values"], one["stock"]["values"])
        assert one["ratio"]["values"] == pytest.approx([a / b for a, b in pairs])


def test_parameters_are_those_of_the_modules(result, subject):
    own = sum(
        weight.numel() for name, weight in subject.weights.items() if name.startswith(("model.bcm", "model.dac"))
    )
    parameters = result["parameters"]
    assert parameters["overhead"] == own > 0
    assert parameters["all"] == parameters["stock"] + own == subject.description["parameters"]
    assert parameters["overhead_megabytes_bf16"] == pytest.approx(own * 2 / 1e6)


def test_memory_is_the_weights_and_what_an_answer_needs(result, subject):
    memory, parameters = result["memory"], result["parameters"]
    assert memory["ours"]["weights_bytes"] == 4 * parameters["all"]
    assert memory["stock"]["weights_bytes"] == memory["inference_only"]["weights_bytes"] == 4 * parameters["stock"]
    for one in memory.values():
        assert one["all_bytes"] == one["weights_bytes"] + one["peak_bytes"]
        assert one["peak_bytes"] > 4 * subject.config.text_config.vocab_size
    assert memory["inference_only"]["all_ratio"] == pytest.approx(1, abs=0.01)


def test_answers_in_batches_are_compared_with_those_one_by_one(result):
    assert {size: one["same_answers"] for size, one in result["batches"].items()} == {"1": 8, "8": 8}
    assert result["batches"]["1"]["against_batch_1"]["values"] == [1.0, 1.0]


def test_an_answer_that_changes_with_the_batch_is_found(subject, cpu, monkeypatch):
    answer = Contender.answer

    def confused(self, inputs, text_steps):
        tokens, seconds = answer(self, inputs, text_steps)
        if len(tokens) > 1:
            tokens[1, -1] += 1
        return tokens, seconds

    monkeypatch.setattr(Contender, "answer", confused)
    found = measure(subject, cpu, 1, text_steps=1, attentions=(), batch_sizes=(1, 2, 4))
    assert {size: one["same_answers"] for size, one in found["batches"].items()} == {"1": 4, "2": 2, "4": 3}
    assert [goal["met"] for goal in found["goals"] if goal["goal"].startswith("answers at batch")] == [False, False]


def test_goals_are_judged_by_the_figures(result):
    assert judge(result) == result["goals"]
    values = {(goal["goal"], goal["bound"]): goal for goal in result["goals"]}
    ratios = result["variants"][DEFAULT.title]["ratios"]
    latent = statistics.median(ratios["latent_step"]["values"])
    for bound, met in (("<= 1.0", latent <= 1), ("< 0.95", latent < 0.95)):
        goal = values["latent step, stock = 1", bound]
        assert goal["value"] == pytest.approx(latent) and goal["met"] == met
    assert "answers/s at batch 8, batch 1 = 1" not in {name for name, _ in values}  # a goal for a GPU
    on_a_gpu = judge({**result, "decoding": {**result["decoding"], "device": "cuda"}})
    assert on_a_gpu[-1]["goal"] == "answers/s at batch 8, batch 1 = 1"
    heavy = {"weights_bytes": 10**9, "peak_resident_bytes": 2 * 10**9, "peak_anonymous_bytes": 10**9}
    assert judge({**result, "loading": heavy})[-1]["met"] is False


def test_an_answer_ends_at_its_end_token():
    assert until_end([3, 4, 1, 5, 0], (0, 1)) == [3, 4]
    assert until_end([3, 4], (0, 1)) == [3, 4]


@pytest.mark.parametrize("backend, works", [("eager", True), ("no such backend", False)])
def test_compiled_steps_are_measured_or_say_how_they_failed(subject, cpu, monkeypatch, backend, works):
    monkeypatch.setattr(contenders, "CompileConfig", lambda: CompileConfig(backend=backend, mode=None))
    variants, not_run = list_variants(subject, cpu, True, ("sdpa",), ("static",))
    assert variants == [DEFAULT, Variant("sdpa", "static"), Variant("sdpa", "static", True)]
    assert not_run == {"eager": "not asked for", "flash_attention_2": "not asked for"}

    def contender(ours: bool, variant: Variant) -> Contender:
        return Contender(subject.weights, subject.config, ours, variant, cpu)

    prompt = make_inputs(subject.processor, draw_conversations(0, 1, 4), cpu)
    found = measure_steps(contender, variants, not_run, prompt, 1, 2)
    title = "sdpa, static cache, compiled"
    assert (title in found) == works and (title in not_run) != works
    torch.compiler.reset()


def test_nothing_is_measured_in_no_round(subject, cpu):
    for name in ("repeats", "text_steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            measure(subject, cpu, **{name: 0})
