import time

import pytest
import torch
from transformers import CompileConfig, StaticCache

from vreflection_hub_card.efficiency import contenders
from vreflection_hub_card.efficiency.contenders import Contender
from vreflection_hub_card.efficiency.headroom import (
    feed_back,
    measure_forward_share,
    measure_one_graph,
    measure_projection,
)
from vreflection_hub_card.efficiency.measure import COMPILED, DEFAULT
from vreflection_hub_card.efficiency.observers import Clock
from vreflection_hub_card.efficiency.questions import draw_conversations, make_inputs


def test_half_of_the_rows_are_projected(cpu):
    """A projection that takes as long as it has rows."""

    class Slow(torch.nn.Linear):
        def forward(self, states):
            self.rows.append(len(states))
            began = time.process_time()
            while time.process_time() - began < 0.004 * len(states):
                pass
            return super().forward(states)

    head = Slow(4, 5, bias=False)
    head.rows = []
    found = measure_projection(head, 4, Clock(cpu), 3)
    assert sorted(set(head.rows)) == [2, 4] and head.rows.count(2) == head.rows.count(4)
    assert found["median"] == pytest.approx(0.5, abs=0.2) and len(found["values"]) == 3


@pytest.mark.parametrize("slow", ["latent_step", "text_step"])
def test_what_is_done_between_forward_passes_is_not_their_share(subject, cpu, monkeypatch, slow):
    ours = Contender(subject.weights, subject.config, True, DEFAULT, cpu)
    prompt = make_inputs(subject.processor, draw_conversations(0, 1, 4), cpu)
    usual = measure_forward_share(ours, prompt, 4, 2)
    assert len(usual["latent_step"]["values"]) == 2 * 8 and len(usual["text_step"]["values"]) == 2 * 4
    update = ours.model._update_model_kwargs_for_generation

    def slowly(outputs, model_kwargs, *args, **kwargs):
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        in_reflection = model_kwargs["reflection"].forced_steps > 0
        if in_reflection == (slow == "latent_step"):
            time.sleep(0.05)
            began = time.process_time()
            while time.process_time() - began < 0.05:
                pass
        return model_kwargs

    monkeypatch.setattr(ours.model, "_update_model_kwargs_for_generation", slowly)
    found = measure_forward_share(ours, prompt, 4, 2)
    other = {"latent_step": "text_step", "text_step": "latent_step"}[slow]
    assert found[slow]["median"] < 0.5 * usual[slow]["median"]
    assert found[other]["median"] > 0.5 * usual[other]["median"]


@torch.no_grad()
def test_states_are_fed_back(subject, cpu):
    """Against a pass without a cache over everything that was fed."""
    model = Contender(subject.weights, subject.config, True, DEFAULT, cpu).model
    language_model, text = model.model.language_model, subject.config.text_config
    first, positions = torch.randn(1, 1, text.hidden_size), torch.zeros(3, 1, 1, dtype=torch.long)
    states = feed_back(language_model, first, positions, StaticCache(config=text, max_cache_len=8), 5)
    fed = torch.cat([first, states[:, :-1]], 1)
    whole = language_model(inputs_embeds=fed, position_ids=torch.arange(5).expand(3, 1, 5), use_cache=False)
    torch.testing.assert_close(states, whole.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_one_graph_computes_what_single_steps_do(subject, cpu, monkeypatch):
    monkeypatch.setattr(contenders, "CompileConfig", lambda: CompileConfig(backend="eager", mode=None))
    ours = Contender(subject.weights, subject.config, True, COMPILED, cpu)
    found = measure_one_graph(ours, 4, 2)
    torch.compiler.reset()
    assert found["largest_difference"] < 1e-5
    for name in ("singly", "one_graph"):
        assert len(found[name]["values"]) == 2 and found["first_call_seconds"][name] > 0
    assert found["ratio"]["values"] == pytest.approx(
        [one / single for one, single in zip(found["one_graph"]["values"], found["singly"]["values"])]
    )
