"""The decoding benchmark, at a size that takes seconds."""

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch

from experiments.benchmark import decoding
from experiments.benchmark.benchmark_tables import decoding_tables
from experiments.benchmark.decoding import (
    CLASSES,
    DEFAULT,
    PHASES,
    VARIANTS,
    DecodingArm,
    PhaseTimer,
    draw_prompts,
    measure_decoding,
    measure_loading,
    random_subject,
)
from vreflection_hub_card.embedded import EMBEDDED


OPTIONS = {"text_steps": 2, "variants": ("sdpa_static",), "batch_sizes": (1, 2), "command": "the command"}


@pytest.fixture(scope="module")
def weights(subject):
    return subject.model.state_dict()


@pytest.fixture
def make(subject, weights):
    return lambda name, variant=DEFAULT: DecodingArm(weights, subject.model.config, name, variant)


@pytest.fixture(scope="module")
def result_file(subject, tmp_path_factory):
    """Two rounds, of a run that was interrupted in the second and called again."""
    path = tmp_path_factory.mktemp("decoding") / "result.json"
    answer, answers = DecodingArm.answer, 0

    def interrupted(self, inputs, text_steps):
        nonlocal answers
        answers += 1
        if answers == 6 + 3 + 6 + 4:  # six arms warm up, three are watched, a round; then in the next one
            raise KeyboardInterrupt
        return answer(self, inputs, text_steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodingArm, "answer", interrupted)
        # Importing torch in a new process would take longer than all of this.
        patch.setattr(decoding, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
        with pytest.raises(KeyboardInterrupt):
            measure_decoding(subject, path, repeats=2, **OPTIONS)
    kept = json.loads(path.read_text())
    assert kept["repeats"] == 1
    measure_decoding(subject, path, repeats=2, **OPTIONS)
    return path, kept


@pytest.fixture
def result(result_file):
    return json.loads(result_file[0].read_text())


def test_an_interrupted_run_keeps_its_rounds(result_file, result):
    kept = result_file[1]
    assert result["repeats"] == 2 and result["memory"] == kept["memory"] and result["loading"] == kept["loading"]
    for title, classes in kept["seconds"].items():
        for name, phases in classes.items():
            for phase, values in phases.items():
                assert len(values) == 1 and result["seconds"][title][name][phase][:1] == values
                assert len(result["seconds"][title][name][phase]) == 2


def test_other_settings_are_refused(subject, result_file):
    with pytest.raises(ValueError, match="holds figures with decoding"):
        measure_decoding(subject, result_file[0], repeats=2, **OPTIONS | {"text_steps": 3})


def test_ratios_are_of_the_same_round(result):
    assert list(result["variants"]) == ["sdpa, dynamic cache", "sdpa, static cache"]
    for title, variant in result["variants"].items():
        seconds = result["seconds"][f"{title}, batch 1"]
        for phase in PHASES:
            pairs = zip(*(seconds[name][phase] for name in ("ours", "stock")))
            assert variant["ratios"][phase]["values"] == pytest.approx([a / b for a, b in pairs])
    rates = result["batches"]["2"]
    assert rates["ours"]["values"] == [
        2 / one for one in result["seconds"]["sdpa, dynamic cache, batch 2"]["ours"]["whole"]
    ]
    assert rates["ratio"]["values"] == pytest.approx(
        [a / b for a, b in zip(*(rates[name]["values"] for name in ("ours", "stock")))]
    )
    assert result["batches"]["1"]["against_batch_1"]["values"] == [1, 1]


def test_memory_and_parameters_are_those_of_the_modules(result, weights):
    own = sum(weight.numel() for name, weight in weights.items() if name.startswith(("model.bcm", "model.dac")))
    counts, memory = result["parameters"], result["memory"]
    assert counts["overhead"] == own > 0 and counts["all"] == counts["stock"] + own
    assert memory["ours"]["weights_bytes"] == 4 * counts["all"]
    assert memory["stock"]["weights_bytes"] == memory["inference_only"]["weights_bytes"] == 4 * counts["stock"]
    for one in memory.values():
        assert one["all_bytes"] == one["weights_bytes"] + one["peak_bytes"] and one["peak_bytes"] > 4 * 1031
    assert result["loading"]["weights_bytes"] == 4 * counts["all"]


@pytest.mark.slow
def test_loading_holds_the_weights_once(tiny_backbone, tmp_path):
    """Two tables of 64 MB each; what else loading needs is smaller."""
    wide = replace(tiny_backbone, text=tiny_backbone.text | {"vocab_size": 250_000})
    random_subject("wide", wide, torch.device("cpu"), 0, tmp_path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        loading = pool.submit(measure_loading, tmp_path).result()
    assert 128e6 < loading["weights_bytes"] < loading["peak_resident_bytes"] < loading["weights_bytes"] + 40e6


def test_tables_show_the_figures(result):
    text = decoding_tables(result)
    ratio = result["variants"][DEFAULT.title]["ratios"]["prefill"]
    assert f"| {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}) |\n" in text
    assert (
        "Measured by `the command`" in text and "2 rounds" in text and f"{result['parameters']['overhead']:,}" in text
    )


def count_in(arm, slot: int) -> dict:
    """Clocks that count forward passes, those that read a slot, and projections onto the vocabulary."""
    counts = {"passes": 0, "slots": 0, "projections": 0}

    def begins(module, args, kwargs):
        counts["passes"] += 1
        counts["slots"] += int((kwargs["input_ids"] == slot).any())

    arm.model.model.register_forward_pre_hook(begins, with_kwargs=True)
    arm.model.lm_head.register_forward_hook(lambda *_: counts.update(projections=counts["projections"] + 1))
    return {name: lambda name=name: counts[name] for name in counts}


@pytest.mark.parametrize("variant", ["sdpa", "sdpa_static"])
@pytest.mark.parametrize("name", CLASSES)
def test_phases_hold_the_steps_that_they_are_named_after(make, subject, name, variant):
    prompts, config, ours = draw_prompts(subject, 0, 2), subject.model.config, name == "ours"
    arm, found = make(name, VARIANTS[variant]), {}
    for what, clock in count_in(arm, config.latent_token_id).items():
        arm.clock = clock
        found[what] = arm.answer(prompts, 3)
    for phase in PHASES:
        latent = ours and phase == "latent_step"
        assert [found[what][phase] for what in ("passes", "slots", "projections")] == [1, latent, not latent]
    # Both write the start token, 8 slots, the end token and 3 more; the last is chosen without another pass. Ours reflects once.
    assert found["passes"]["whole"] == 8 + 2 + 3 and found["slots"]["whole"] == (8 if ours else 0)


def test_both_classes_share_the_weights_and_keep_their_attention(make, weights):
    models = {(name, key): make(name, VARIANTS[key]).model for key in ("sdpa", "eager") for name in CLASSES}
    for (_, attention), model in models.items():
        parts = (model.config, model.model.visual.config, model.model.language_model.config)
        assert {part._attn_implementation for part in parts} == {attention}
    stock, ours = (dict(models[name, "sdpa"].named_parameters()) for name in CLASSES)
    extra = {name for name in ours if name.startswith(("model.bcm.", "model.dac."))}
    assert set(ours) - set(stock) == extra and extra
    assert all(ours[name].data_ptr() == stock[name].data_ptr() == weights[name].data_ptr() for name in stock)


def test_the_clock_is_read_at_its_moments_and_no_answer_is_stopped():
    readings = iter("abcd")
    timer = PhaseTimer(lambda: next(readings), (0, 2))
    for length in range(4):
        assert timer(torch.zeros(2, length, dtype=torch.long), None).tolist() == [False, False]
    assert timer.readings == ["a", "b"]


def test_the_command_measures_a_backbone(monkeypatch, tmp_path, tiny_backbone):
    measured = []
    monkeypatch.setitem(decoding.BACKBONES, "tiny", replace(tiny_backbone, side=6))
    monkeypatch.setattr(decoding, "measure_decoding", lambda subject, **options: measured.append((subject, options)))
    words = ["--backbone", "tiny", "--output", str(tmp_path / "x.json"), "--repeats", "1", "--device", "cpu"]
    decoding.main(words)
    ((subject, options),) = measured
    assert draw_prompts(subject, 0, 1)["image_grid_thw"].prod() == 4 * 36
    assert options["command"].startswith("python -m experiments.benchmark.decoding --backbone tiny")
    assert options["repeats"] == 1 and options["batch_sizes"] == [1]
    with pytest.raises(SystemExit):
        decoding.main(["somewhere", *words])


def test_the_command_measures_the_embedded_checkpoint_by_default(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(decoding, "measure_decoding", lambda subject, **options: measured.append(subject))
    decoding.main(["--output", str(tmp_path / "x.json"), "--device", "cpu"])
    assert measured[0].folder == EMBEDDED and measured[0].description["name"] == "vreflection_tiny"
