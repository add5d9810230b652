"""`reflect="uncertain"` against a plain loop that recomputes everything, decides by the entropy, and shares no code with it."""

import devices
import pytest
import torch
from reference import Row, attend, encode
from transformers import GenerationConfig, LogitsProcessor


NEW_TOKENS = 26


@pytest.fixture(scope="module")
def threshold(model, batch):
    """Between two entropies of the answers without reflections, some way above their median, far from both."""
    result = decode(model, batch, reflect=False, return_dict_in_generate=True, output_logits=True)
    values = torch.cat([entropies(logits, never_said(model)) for logits in result.logits])
    values = values.sort().values[len(values) // 2 :]
    widest = values.diff()[: len(values) // 4].argmax()
    return values[widest : widest + 2].mean().item()


def never_said(model):
    """Tokens of a reflection, ends, and the picture's token, which would ask the reference for a picture."""
    return [*model.config.latent_token_ids, *model.generation_config.eos_token_id, model.config.image_token_id]


def entropies(logits, banned):
    """In nats, (B,)."""
    logits = logits.double().index_fill(-1, torch.tensor(banned, device=logits.device), float("-inf"))
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs.masked_fill(logs == float("-inf"), 0)).sum(-1)


def decode(model, inputs, new_tokens=NEW_TOKENS, **kwargs):
    """New tokens (B, T) of a run that doesn't end early."""
    kwargs = {"do_sample": False, "suppress_tokens": [model.config.image_token_id], **kwargs}
    kwargs = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, **kwargs}
    result = model.generate(**inputs, **kwargs)
    return result[:, inputs["input_ids"].shape[1] :] if isinstance(result, torch.Tensor) else result


def uncertain(threshold, most=2, **kwargs):
    return {"reflect": "uncertain", "reflect_threshold": threshold, "max_reflections": most, **kwargs}


@torch.no_grad()
def decide_uncached(model, row, ids, threshold, most=2, feedback=None, given=None):
    """Tokens of a plain loop over full forward passes; `given` are followed where none is forced."""
    (start, slot, end), banned = ids, never_said(model)
    tokens, queue = [], []
    for step in range(NEW_TOKENS):
        state = row.run()[-1]
        logits = row.logits(state)
        if queue:
            token = queue.pop(0)
        elif tokens.count(start) < most and tokens[-1:] != [end] and entropies(logits, banned) > threshold:
            token, queue = start, [slot] * 8 + [end]
        else:
            allowed = logits.index_fill(0, torch.tensor(banned, device=logits.device), float("-inf"))
            token = given[step] if given else int(allowed.argmax())
        fed = row.stock.get_input_embeddings().weight[token]
        if token == slot:
            fed = state if feedback is None else feedback(state)
        row.extend(token, fed)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_it_reflects_where_the_next_token_is_uncertain(
    model, stock, processor, prompts, batch, ids, threshold, feedback
):
    """A row alone decides as in the batch; a row without a picture has nothing to look at."""
    options = uncertain(threshold, latent_feedback=feedback)
    result = decode(model, batch, **options, return_dict_in_generate=True, output_logits=True)
    length, opened = batch["input_ids"].shape[1], []
    for index, tokens in enumerate(result.sequences[:, length:].tolist()):
        row = Row(stock, batch, index)

        def look(state, images=row.features):
            return attend(model.model.dac, state[None, None], torch.cat(images)[None])[0][0, 0]

        if feedback == "hidden" or row.images:
            most, look = 2, None if feedback == "hidden" else look
        else:
            most, look = 0, None
        assert tokens == decide_uncached(model, row, ids, threshold, most, look)
        assert tokens == decode(model, encode(processor, prompts[index]), **options)[0].tolist()
        opened.append([step for step, token in enumerate(tokens) if token == ids[0]])
    assert len({tuple(steps) for steps in opened}) > 1, "all rows open at the same steps: the test shows little"
    assert any(steps and steps[0] > 0 for steps in opened) and any(len(steps) == 2 for steps in opened)
    costs = model.compute_transition_scores(result.sequences, result.logits, normalize_logits=True)
    assert (costs[torch.isin(result.sequences[:, length:], result.sequences.new_tensor(ids))] == 0).all(), (
        "what is forced is free"
    )


def test_samples_decide_by_the_distribution_before_it_is_warped(model, stock, batch, ids, threshold):
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 3.0, "top_k": 5, "num_return_sequences": 2}
    tokens = decode(model, batch, **uncertain(threshold), **options)
    assert len(tokens.unique(dim=0)) > 6 and (tokens == ids[0]).any(1).sum() > 1
    for number, found in enumerate(tokens.tolist()):
        assert found == decide_uncached(model, Row(stock, batch, number // 2), ids, threshold, given=found)


def test_the_ends_of_the_scale_are_never_and_always(model, batch, ids):
    never = decode(model, batch, **uncertain(float("inf")))
    assert torch.equal(never, decode(model, batch, reflect=False))
    always = decode(model, batch, **uncertain(0, None))
    assert torch.equal(always, decode(model, batch, reflect=True))
    assert (always == ids[0]).sum(1).tolist() == [1] * 4


def test_it_reflects_again_only_behind_a_token_of_text(model, batch, ids):
    for most in (1, 2, 3):
        starts = decode(model, batch, 36, **uncertain(0, most)) == ids[0]
        assert starts.sum(1).tolist() == [most] * 4
        assert starts[0].nonzero().flatten().tolist() == [0, 11, 22][:most]


class Wish(LogitsProcessor):
    """Raises some tokens' scores, or all others'."""

    def __init__(self, wished):
        self.wished = torch.as_tensor(wished, device=devices.DEVICE)

    def __call__(self, input_ids, scores):
        return scores.index_add(1, self.wished, scores.new_full((len(scores), len(self.wished)), 100.0))


def test_what_may_not_be_said_counts_nothing(model, batch, ids, threshold):
    """The start token, even if it is the model's favourite; whatever other processors leave no choice about."""
    usual = decode(model, batch, **uncertain(threshold))
    assert torch.equal(decode(model, batch, **uncertain(threshold), logits_processor=[Wish(ids)]), usual)
    alone = [token for token in range(model.config.get_text_config().vocab_size) if token != 5]
    assert (decode(model, batch, 12, **uncertain(0), suppress_tokens=alone) == 5).all(), "one token is no question"


def test_options_come_from_the_generation_config(model, batch, ids, threshold, monkeypatch):
    expected = decode(model, batch, **uncertain(threshold, 1))
    own = {"max_new_tokens": NEW_TOKENS, "eos_token_id": 0, "pad_token_id": 0}
    config = GenerationConfig(**own, reflect="uncertain", reflect_threshold=0, max_reflections=2)
    assert ((decode(model, batch, generation_config=config) == ids[0]).sum(1) == 2).all()
    assert not (decode(model, batch, generation_config=config, reflect=False) == ids[0]).any()
    for name, value in {"reflect": "uncertain", "reflect_threshold": threshold}.items():
        monkeypatch.setattr(model.generation_config, name, value, raising=False)
    assert torch.equal(decode(model, batch), expected)
    assert ((decode(model, batch, reflect_threshold=0, max_reflections=2) == ids[0]).sum(1) == 2).all()
    assert ((decode(model, batch, reflect=True) == ids[0]).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (uncertain(None), "needs a `reflect_threshold` from 0 on, in nats, got None; `vreflection evaluate --thresholds`"),
        (uncertain(-0.5), "from 0 on, in nats, got -0.5"),
        (uncertain(float("nan")), "from 0 on, in nats, got nan"),
        (uncertain(True), "from 0 on, in nats, got True"),
        (uncertain("1"), "from 0 on, in nats, got '1'"),
        (uncertain(1, 0), "`max_reflections` must be a whole number from 1 on, got 0"),
        (uncertain(1, 1.5), "`max_reflections` must be a whole number from 1 on, got 1.5"),
        (uncertain(1, reflect=True), "go with `reflect='uncertain'` only"),
        ({"max_reflections": 2}, "go with `reflect='uncertain'` only"),
        (uncertain(1, latent_steps=0), "`reflect='uncertain'` and `latent_steps=0` contradict each other"),
        (uncertain(1, num_beams=2), "`reflect='uncertain'` doesn't go with beams.*leave `num_beams` out"),
        (uncertain(1, max_new_tokens=10), "`reflect='uncertain'` with 8 latent steps takes 10 tokens.*max_new_tokens"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(model, batch, options, message):
    with pytest.raises(ValueError, match=message) as error:
        model.generate(**batch, **{"max_new_tokens": 16, **options})
    assert "\n" not in str(error.value)
