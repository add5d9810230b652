"""The committed counts of parameters are those of the models, and what can be worked out by hand."""

import json

import pytest

from experiments.benchmark.backbones import BACKBONES, PUBLISHED, count, meta_model
from experiments.benchmark.sizes import RESULT, sizes_table


SIZES = json.loads(RESULT.read_text())["sizes"]


def test_every_published_size_is_counted():
    assert list(SIZES) == PUBLISHED
    assert [size["source"] for size in SIZES.values()] == [BACKBONES[name].source for name in PUBLISHED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_bcm_and_dac_by_hand(name):
    width = BACKBONES[name].text["hidden_size"]
    # Query, key, value and output projection with biases, and the norm; BCM has 8 queries besides.
    dac = 4 * (width**2 + width) + 2 * width
    assert (SIZES[name]["parameters"]["dac"], SIZES[name]["parameters"]["bcm"]) == (dac, dac + 8 * width)


def test_a_language_model_by_hand():
    text = BACKBONES["qwen3_vl_30b_a3b"].text
    width, experts, inner = (text[name] for name in ("hidden_size", "num_experts", "moe_intermediate_size"))
    heads, key_heads = text["num_attention_heads"] * 128, text["num_key_value_heads"] * 128
    attention = 2 * width * (heads + key_heads) + 2 * 128  # with the norms of queries and keys
    layer = attention + experts * (3 * width * inner + width) + 2 * width
    counts = SIZES["qwen3_vl_30b_a3b"]["parameters"]
    assert counts["stock"] - counts["visual"] == 48 * layer + width + 2 * text["vocab_size"] * width


@pytest.mark.parametrize("name", ["qwen3_vl_2b", "3b"])
def test_the_committed_counts_are_the_models(name):
    model, counts = meta_model(BACKBONES[name]), SIZES[name]["parameters"]
    assert count(model) == counts["stock"] + counts["bcm"] + counts["dac"]
    assert count(model.model.visual) == counts["visual"]


def test_the_table():
    counts = {"stock": 2_000_000_000, "visual": 400_000_000, "bcm": 16_000_000, "dac": 4_000_000}
    result = {"command": "c", "date": "2026-01-02T03", "versions": {"torch": "2"}, "sizes": {}}
    table = sizes_table(result | {"sizes": {"x": {"note": "X", "parameters": counts}}})
    assert "| X | 2,000.0 | 400.0 | 16.0 | 4.0 | 1.00 % |" in table
    assert table.endswith("Counted by `c` on 2026-01-02; torch 2.")
