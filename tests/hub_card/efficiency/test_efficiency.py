"""What is timed is what it says, both models are the same model, and the file holds what the table shows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vreflection_hub_card.cli import main
from vreflection_hub_card.efficiency.bench import Pair, random_model
from vreflection_hub_card.efficiency.loading import measure_loading
from vreflection_hub_card.efficiency.measure import judge, measure, way_name, ways
from vreflection_hub_card.efficiency.report import render
from vreflection_hub_card.efficiency.shapes import SHAPES, TEXT, VISION, Shape
from vreflection_hub_card.errors import InputError
from vreflection_hub_card.evaluation.report import fill_block


ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PREFILL, WORD, SLOT = 100.0, 1.0, 7.0
TINY = Shape(
    note="a tiny one",
    text={
        **TEXT,
        "vocab_size": 331,
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
    mix_divisor=4,
)


@pytest.fixture(scope="module")
def pair():
    return Pair(random_model(TINY, 0, CPU), words=8, side=4)


@pytest.fixture(scope="module")
def result(pair):
    return measure(pair, rounds=1, batch_sizes=(1, 3), latent_steps=4)


class TokenClock:
    """A clock that forward passes move on, by what they read."""

    name = "tokens"

    def __init__(self, pair):
        self.time = 0.0
        self.slot = pair.ours.config.latent_token_id
        self.handles = [
            model.register_forward_pre_hook(self.read, with_kwargs=True) for model in (pair.ours, pair.stock)
        ]

    def read(self, module, args, kwargs):
        ids = kwargs["input_ids"]
        self.time += PREFILL if ids.shape[1] > 1 else SLOT if (ids == self.slot).all() else WORD

    def now(self):
        return self.time


@pytest.mark.parametrize("latent_steps", [1, 8])
def test_each_kind_of_step_is_timed_as_what_it_is(pair, monkeypatch, latent_steps):
    clock = TokenClock(pair)
    monkeypatch.setattr(pair, "clock", clock)
    try:
        ours = pair.time(True, pair.prompts(1), latent_steps, words=4)
        stock = pair.time(False, pair.prompts(1), latent_steps, words=4)
    finally:
        for handle in clock.handles:
            handle.remove()
    assert (ours.prefill, ours.text_step, ours.latent_step) == (PREFILL, WORD, SLOT)
    assert (stock.prefill, stock.text_step, stock.latent_step) == (PREFILL, WORD, None)
    # The start and the end token and the words, of which the last one isn't read any more.
    assert ours.total == PREFILL + latent_steps * SLOT + 2 * WORD + 3 * WORD
    assert ours.sequences.shape == stock.sequences.shape
    slots = (ours.sequences == pair.ours.config.latent_token_id).sum()
    assert slots == latent_steps and (ours.sequences == pair.ours.config.latent_start_token_id).sum() == 1


def test_both_are_one_model(pair):
    theirs, own = pair.stock.state_dict(), pair.ours.state_dict()
    assert all(own[name].data_ptr() == weight.data_ptr() for name, weight in theirs.items())
    inputs = pair.prompts(2)
    with torch.no_grad():
        torch.testing.assert_close(pair.ours(**inputs).logits, pair.stock(**inputs).logits, rtol=0, atol=1e-5)


def test_prompts_are_the_same_whatever_the_batch(pair):
    one, three = pair.prompts(1), pair.prompts(3)
    assert torch.equal(one["input_ids"][0], three["input_ids"][0])
    assert torch.equal(one["pixel_values"], three["pixel_values"].chunk(3)[0])
    assert not torch.equal(three["input_ids"][0], three["input_ids"][1])
    words = three["input_ids"][three["mm_token_type_ids"] == 0]
    assert not torch.isin(words, torch.tensor(pair.ours.config.latent_token_ids)).any()


def test_the_figures(pair, result):
    modules = (pair.ours.model.bcm, pair.ours.model.dac)
    added = sum(weight.numel() for module in modules for weight in module.parameters())
    assert result["parameters"]["added"] == added and result["parameters"]["bf16_megabytes"] == added * 2 / 1e6
    assert list(result["steps"]) == ["eager, dynamic cache", "sdpa, dynamic cache", "sdpa, static cache"]
    for steps in result["steps"].values():
        ratio = steps["latent_step"]["ours"]["median"] / steps["text_step"]["stock"]["median"]
        assert steps["latent_step"]["ratio"]["median"] == pytest.approx(ratio)
    assert {size: told["same_as_alone"] for size, told in result["answers"].items()} == {"1": 1, "3": 3}
    assert result["peak_memory"]["stock"] > 0 and result["peak_memory"]["ratio_with_modules"] > 1
    assert result["not_run"] == ["sdpa, static cache, compiled", "flash_attention_2, dynamic cache"]
    assert not {"command", "source", "loading"} & set(result) and json.loads(json.dumps(result)) == result


def test_the_table_shows_them(result):
    text = render({"command": "the command", "source": "somewhere", "loading": None, **result})
    for name in (*result["steps"], *result["not_run"], "`the command`", "somewhere"):
        assert name in text
    assert f"{result['parameters']['added']:,} parameters" in text
    assert text.count("| met |") + text.count("| not met |") == len(result["goals"]) == 4


def test_goals_are_held_against_the_medians(result):
    def judged(**changes):
        told = json.loads(json.dumps(result))
        steps = told["steps"]["sdpa, dynamic cache"]
        for figure in ("prefill", "text_step", "latent_step"):
            steps[figure]["ratio"]["median"] = changes.get(figure, 1.0)
        told["peak_memory"]["ratio"] = changes.get("memory", 1.0)
        told["answers"] = {size: {"ours": {"median": rate}} for size, rate in changes.get("rates", {}).items()}
        told["machine"] |= {"gpu": "one"} if "rates" in changes else {}
        return {goal["goal"]: goal["met"] for goal in judge(told)}

    assert all(judged().values())
    assert not judged(prefill=1.03)["prefill"] and not judged(text_step=1.021)["text_step"]
    assert not judged(latent_step=1.001)["latent_step"]
    assert not judged(memory=1.02)["peak memory, inference only"]
    batch = "answers a second at batch size 8, batch size 1 = 1"
    assert batch not in judged()
    assert judged(rates={"1": 2.0, "8": 8.0})[batch] and not judged(rates={"1": 2.0, "8": 7.9})[batch]


def test_what_a_cpu_cannot_do_is_listed():
    chosen, left_out = ways(CPU)
    assert [way_name(*way) for way in chosen] == ["eager, dynamic cache", "sdpa, dynamic cache", "sdpa, static cache"]
    assert left_out == ["sdpa, static cache, compiled", "flash_attention_2, dynamic cache"]


def test_the_command(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- efficiency -->\n<!-- /efficiency -->\nb")
    arguments = ["efficiency", str(tiny_folder), "--rounds", "1", "--batch-sizes", "1", "--latent-steps", "2"]
    assert main([*arguments, "--picture-side", "4", "--document", "README.md"]) == 0
    table = capsys.readouterr().out.strip()
    report = json.loads((tmp_path / "efficiency.json").read_text())
    assert render(report) == table and table in document.read_text()
    weights = sum(weight.numel() * 4 for weight in load_file(tiny_folder / "model.safetensors").values())
    assert report["loading"]["weights_bytes"] == weights and report["loading"]["anonymous_bytes"] >= 0
    assert report["source"] == f"the checkpoint {tiny_folder.name}"
    assert str(tiny_folder.parent) not in json.dumps(report)
    assert report["command"].startswith(f"vreflection efficiency {tiny_folder.name} --rounds 1 --batch-sizes 1")


def test_loading_counts_what_is_held_beside_the_files(tmp_path):
    """Weights that have to be cast are held in memory, and seen; weights as they are stay in their file."""
    shape = replace(TINY, text={**TINY.text, "vocab_size": 100_331})
    model = random_model(shape, 0, CPU)
    model.save_pretrained(tmp_path / "same")
    model.config.dtype = torch.float64
    model.save_pretrained(tmp_path / "cast")
    config = json.loads((tmp_path / "cast" / "config.json").read_text()) | {"dtype": "float64"}
    (tmp_path / "cast" / "config.json").write_text(json.dumps(config))
    same, cast = (measure_loading(tmp_path / name) for name in ("same", "cast"))
    assert cast["weights_bytes"] == 2 * same["weights_bytes"] > 50e6
    assert same["anonymous_bytes"] < 0.5 * same["weights_bytes"]
    assert cast["anonymous_bytes"] > 0.9 * cast["weights_bytes"]
    with pytest.raises(InputError, match="can't be loaded"):
        measure_loading(tmp_path)


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        (["a", "--shape", "small"], "leave a out"),
        (["--output", "nowhere/file.json"], "can't be written"),
        (["--document", "nowhere.md"], "nowhere.md"),
        (["--document", "plain.md"], "<!-- efficiency -->"),
        (["nothing.here/at/all"], "no such folder"),
    ],
)
def test_mistakes(arguments, fragment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.md").write_text("words")
    assert main(["efficiency", *arguments]) == 2
    told = capsys.readouterr().err
    assert fragment in told and told.count("\n") == 1
    assert set(SHAPES) == {"small", "3b", "7b"}


def test_the_readme_quotes_the_committed_result():
    result = json.loads((ROOT / "hub_card" / "results" / "efficiency_small_cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert fill_block(readme, "efficiency", render(result)) == readme
