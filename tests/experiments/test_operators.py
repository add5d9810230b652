"""What is counted of a step, and the committed counts."""

import json

import torch

from experiments.benchmark import operators


def test_views_do_not_count():
    x = torch.ones(2, 3)
    with operators.OperatorCount() as count:
        y = x.t()[0].view(2)
        assert count.number == 0
        y.add_(1)
        assert (x + x).sum() == 16 and count.number == 5  # with the comparison, and reading what it gives


def test_what_a_step_costs_beyond_the_stock_class(monkeypatch):
    """A latent step of states doesn't project, and costs no more for all that it does; one of looks costs the look."""
    monkeypatch.setattr(
        operators, "count_graphs", lambda arm, prompts: []
    )  # takes long; tests of `generate` count them
    for arms in (operators.count_steps()["arms"], json.loads(operators.RESULT.read_text())["arms"]):
        stock, hidden, dac = (arms[name] for name in ("stock", "hidden", "dac"))
        assert stock["latent_step"] == stock["text_step"]
        assert 0 < hidden["text_step"] - stock["text_step"] == dac["text_step"] - stock["text_step"] <= 6
        assert hidden["latent_step"] <= stock["latent_step"] + 2 < dac["latent_step"] <= stock["latent_step"] + 21


def test_the_table():
    arm = {"title": "ours", "text_step": 10.0, "latent_step": 9.5, "graphs": [2, 2]}
    result = {"arms": {"a": arm}, "versions": {"torch": "2"}, "command": "c", "date": "2026-01-02T03"}
    table = operators.operators_table(result | {"prompt_tokens": [5, 6], "layers": 4})
    assert "| ours | 10 | 9.5 | 2, 2 |" in table and "prompts of 5, 6 tokens" in table
