import time

import pytest
import torch

from vreflection_hub_card.efficiency.contenders import Contender
from vreflection_hub_card.efficiency.headroom import measure_forward_share, measure_projection
from vreflection_hub_card.efficiency.measure import DEFAULT
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
