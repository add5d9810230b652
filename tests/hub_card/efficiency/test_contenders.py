import pytest
import torch

from vreflection_hub_card.efficiency.contenders import Contender, PhaseClock, Variant
from vreflection_hub_card.efficiency.questions import draw_conversations, make_inputs


@pytest.fixture(scope="module")
def inputs(subject, cpu):
    return make_inputs(subject.processor, draw_conversations(0, 2, 4), cpu)


@pytest.fixture
def make(subject, cpu):
    def make(ours: bool, cache: str = "dynamic") -> Contender:
        return Contender(subject.weights, subject.config, ours, Variant("sdpa", cache), cpu)

    return make


class Counter:
    """A clock that counts something instead of seconds."""

    def __init__(self):
        self.count = 0

    def now(self):
        return self.count

    def add(self, count: int = 1):
        self.count += count


def count_in(model, slot: int) -> dict[str, Counter]:
    """Counters of forward passes, of those that read a slot, and of projections onto the vocabulary."""
    counters = {name: Counter() for name in ("passes", "slots", "projections")}

    def begins(module, args, kwargs):
        counters["passes"].add()
        counters["slots"].add(int((kwargs["input_ids"] == slot).any()))

    model.model.register_forward_pre_hook(begins, with_kwargs=True)
    model.lm_head.register_forward_hook(lambda *_: counters["projections"].add())
    return counters


def test_both_classes_have_the_same_weights_in_memory_once(make, subject):
    stock, ours = (dict(make(which).model.named_parameters()) for which in (False, True))
    extra = {name for name in ours if name.startswith(("model.bcm.", "model.dac."))}
    assert set(ours) - set(stock) == extra and extra
    assert all(ours[name].data_ptr() == stock[name].data_ptr() == subject.weights[name].data_ptr() for name in stock)


def test_every_contender_keeps_its_attention(subject, cpu):
    asked = [(ours, attention) for attention in ("sdpa", "eager") for ours in (False, True)]
    models = [
        Contender(subject.weights, subject.config, ours, Variant(name, "dynamic"), cpu).model for ours, name in asked
    ]
    for model, (_, attention) in zip(models, asked):
        parts = (model.config, model.model.visual.config, model.model.language_model.config)
        assert {part._attn_implementation for part in parts} == {attention}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_phases_hold_the_steps_that_they_are_named_after(make, inputs, subject, cache):
    slot = subject.config.latent_token_id
    for ours in (False, True):
        contender = make(ours, cache)
        found = {}
        for name, counter in count_in(contender.model, slot).items():
            contender.clock = counter
            found[name] = contender.answer(inputs, 3)[1]
        for phase in ("prefill", "text_step", "latent_step"):
            assert found["passes"][phase] == 1
            assert found["slots"][phase] == (1 if ours and phase == "latent_step" else 0)
            assert found["projections"][phase] == (0 if ours and phase == "latent_step" else 1)
        assert found["passes"]["whole"] == 8 + 2 + 3  # the last token is chosen without another pass


def test_the_clock_is_read_at_its_moments_and_no_reflection_begins():
    counter = Counter()
    clock = PhaseClock(counter, (0, 2), 1)
    for _ in range(4):
        scores = clock(torch.zeros(2, 1, dtype=torch.long), torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, -1.0]]))
        counter.add()
    assert clock.readings == [0, 2]
    assert scores.argmax(1).tolist() == [2, 0]


def test_both_produce_as_many_tokens_and_ours_reflects_once(make, inputs, subject):
    config = subject.config
    stock, ours = (make(which).answer(inputs, 5)[0] for which in (False, True))
    assert stock.shape == ours.shape == (2, 8 + 2 + 5)
    segment = [config.latent_start_token_id, *[config.latent_token_id] * 8, config.latent_end_token_id]
    assert ours[:, :10].tolist() == [segment, segment]
    assert not torch.isin(ours[:, 10:], torch.tensor(segment)).any()


def test_stock_decodes_greedily_but_for_the_token_that_would_reflect(make, inputs, subject):
    contender = make(False)
    answered = contender.answer(inputs, 1)[0]
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    ids, types, mask = inputs["input_ids"], inputs["mm_token_type_ids"], inputs["attention_mask"]
    for column in answered.T:
        with torch.no_grad():
            logits = contender.model(
                input_ids=ids, mm_token_type_ids=types, attention_mask=mask, use_cache=False, **given
            ).logits[:, -1]
        logits[:, subject.config.latent_start_token_id] = float("-inf")
        assert torch.equal(logits.argmax(1), column)
        ids = torch.cat([ids, column[:, None]], 1)
        types, mask = torch.nn.functional.pad(types, (0, 1)), torch.nn.functional.pad(mask, (0, 1), value=1)
