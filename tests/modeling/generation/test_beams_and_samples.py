"""Beams and sampled answers, each with its own states; what warpers keep."""

import pytest
import torch
from generation_helpers import NEW_TOKENS, STARTS, decode
from reference import OpenReflections, Row, attend, decode_uncached, encode
from transformers import LogitsProcessor, TopKLogitsWarper


WARPERS = (
    {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.01}, {"top_h": 0.01}, {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.9}, {"top_k": 2, "num_beams": 2},
)  # fmt: skip


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {"reflect": False}, {}])
@pytest.mark.parametrize("warper", WARPERS, ids=lambda warper: next(iter(warper)))
def test_sampling_never_keeps_banned_tokens_alone(model, batch, ids, warper, plain):
    """The likeliest tokens are all banned: what `top_k=1` keeps must be one that may be said."""

    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids[1:] if plain == {} else ids] += 100.0
            return scores

    options = {"do_sample": True, "max_new_tokens": 3, "temperature": 0.7, "top_k": 0, "top_p": 1.0, **warper, **plain}
    tokens = model.generate(**batch, logits_processor=[WantReflections()], **options)[:, batch["input_ids"].shape[1] :]
    assert tokens.shape[1] >= 1
    assert not torch.isin(tokens, tokens.new_tensor(ids[1:] if plain == {} else ids)).any()


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {}])
def test_top_k_leaves_as_many_tokens_as_it_says(model, batch, ids, plain):
    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids[1:]] += 100.0
            return scores

    options = {
        "do_sample": True,
        "top_k": 50,
        "max_new_tokens": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    scores = model.generate(**batch, **options, logits_processor=[WantReflections()], **plain).scores[0]
    assert scores.isfinite().sum(1).tolist() == [50] * len(scores)
    assert not scores[:, ids[1:]].isfinite().any()


def test_a_warper_of_the_users_keeps_what_may_be_said(model, batch, ids):
    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, input_ids.new_tensor(ids), 100.0)

    # The model's own favourites: bans come before the list that the user gave, and once more after it.
    bias = {(token,): 100.0 for token in ids}
    options = {"do_sample": True, "max_new_tokens": 2, "reflect": False}
    for given in ([TopKLogitsWarper(1)], [WantReflections()]):
        extra = {"sequence_bias": bias} if isinstance(given[0], TopKLogitsWarper) else {}
        tokens = model.generate(**batch, **options, **extra, logits_processor=given)
        assert not torch.isin(tokens[:, batch["input_ids"].shape[1] :], tokens.new_tensor(ids)).any()


def test_dac_feedback_with_beams_and_several_sequences(model, processor, prompts):
    inputs = encode(processor, *prompts[:3])
    kwargs = {"latent_feedback": "dac", "reflect": True, "new_tokens": 13}
    greedy = decode(model, inputs, **kwargs)
    copies = decode(model, inputs, **kwargs, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(copies, greedy.repeat_interleave(2, 0))
    assert decode(model, inputs, **kwargs, num_beams=3).shape == greedy.shape


def test_sampling_follows_the_seed_and_several_sequences_differ(model, processor, prompts, ids):
    inputs = encode(processor, *prompts[:2])

    def sample(seed):
        torch.manual_seed(seed)
        return decode(model, inputs, STARTS[:2], do_sample=True, temperature=1.5, top_k=0, num_return_sequences=3)

    tokens = sample(0)
    assert torch.equal(tokens, sample(0)) and not torch.equal(tokens, sample(1))
    assert tokens.shape == (6, NEW_TOKENS) and len(tokens.unique(dim=0)) == 6
    for found in tokens.tolist():
        assert ids[0] in found
        for start in range(NEW_TOKENS - 10):
            if found[start] == ids[0]:
                assert found[start + 1 : start + 10] == [*[ids[1]] * 8, ids[2]]


def test_sampled_sequences_carry_their_own_states(model, stock, processor, prompts, ids):
    """Two samples of one prompt reflect at different steps: the logits of each follow from its own words."""
    inputs = encode(processor, prompts[0])
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    starts = OpenReflections(ids[0], length, {2}, {5})
    result = model.generate(
        **inputs,
        max_new_tokens=18,
        min_new_tokens=18,
        do_sample=True,
        temperature=2.0,
        top_k=0,
        num_return_sequences=2,
        logits_processor=[starts],
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack(result.logits, 1)
    for row, tokens in enumerate(result.sequences[:, length:].tolist()):
        _, expected = decode_uncached(Row(stock, inputs), ids, 18, given=tokens)
        computed = logits[row].isfinite().all(1)
        torch.testing.assert_close(logits[row][computed], expected[computed], atol=1e-4, rtol=1e-4)


class Conductor(LogitsProcessor):
    """Makes beams enter at different steps, and move while they are in latents.

    After two free words every beam goes on with its best word alone, at a bonus in even steps and a fine in odd ones,
    and reflects at some step for a fixed price: it falls behind there, and overtakes in the next step, which is free.
    """

    bonus, price = 6.0, -3.0

    def __init__(self, ids, prompt_length, beams):
        self.ids, self.prompt_length, self.beams = ids, prompt_length, beams

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        scores[:, self.ids] = float("-inf")
        if step < 2:
            return scores
        best = scores.max(1)
        scores = torch.full_like(scores, float("-inf"))
        for row, new in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.ids[0] not in new and {2: row % self.beams == 2, 4: row % self.beams == 0, 6: True}.get(step):
                scores[row, self.ids[0]] = self.price
            else:
                scores[row, best.indices[row]] = best.values[row] + self.extra(step)
        return scores

    def extra(self, step):
        return 0.0 if step < 2 else -self.bonus if step % 2 else self.bonus


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_every_beam_has_the_score_of_its_sequence(model, stock, processor, prompts, ids, feedback, do_sample):
    """Teacher-forced, uncached re-scoring; what a reflection forces costs nothing."""
    new_tokens, beams = 18, 4
    inputs = encode(processor, *prompts[1:3])  # one picture, two pictures
    length = inputs["input_ids"].shape[1]
    conductor = Conductor(ids, length, beams)
    torch.manual_seed(0)
    result = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=do_sample,
        top_k=0,
        suppress_tokens=[stock.config.image_token_id],  # a sampled one would ask the reference for a picture
        length_penalty=0.0,
        latent_feedback=feedback,
        logits_processor=[conductor],
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = result.sequences[:, length:].tolist()
    starts = [tokens.index(ids[0]) for tokens in sequences]
    assert len(set(starts)) > 1, "all beams enter at one step: the test shows nothing"
    places = [moves[start + 1 : start + 9] for moves, start in zip(result.beam_indices.tolist(), starts)]
    assert any(len(set(place)) > 1 for place in places), "no beam moves within its reflection: the test shows nothing"
    for number, (tokens, start) in enumerate(zip(sequences, starts)):
        row = Row(stock, inputs, number // beams)
        images = torch.cat(row.features)[None]

        def query(state, images=images):
            return attend(model.model.dac, state[None, None], images)[0][0, 0]

        _, logits = decode_uncached(row, ids, new_tokens, given=tokens, feedback=query if feedback == "dac" else None)
        costs = logits.log_softmax(-1)[range(new_tokens), tokens]
        costs += costs.new_tensor([conductor.extra(step) for step in range(new_tokens)])
        costs[start : start + 10] = 0.0
        costs[start] = conductor.price
        assert result.sequences_scores[number].item() == pytest.approx(costs.sum().item(), abs=5e-4)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("reflect", [None, True])
def test_an_answers_log_probability_is_that_of_its_free_tokens(model, batch, ids, reflect, beams):
    """Forced tokens count 0, by scores and by logits; free ones what they count in the logits."""
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "num_beams": beams}
    starts = None if reflect else STARTS
    result = decode(model, batch, starts, reflect=reflect, **options)
    length, beam_indices = batch["input_ids"].shape[1], getattr(result, "beam_indices", None)
    tokens = result.sequences[:, length:]
    forced = torch.isin(tokens, tokens.new_tensor(ids[1:]))
    forced[:, 0] |= bool(reflect)
    assert forced.sum(1).min() > 8
    by_logits = model.compute_transition_scores(result.sequences, result.logits, beam_indices, normalize_logits=True)
    assert (by_logits[forced] == 0).all() and (by_logits[~forced] < 0).all()
    if beams == 1:
        by_scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        assert (by_scores[forced] == 0).all()
