"""`generate` against uncached re-computation, over batches, beams, caches and streamers; and what it refuses."""

import copy
import warnings

import pytest
import torch
from reference import (
    END,
    SLOT,
    START,
    OpenReflections,
    Row,
    answer,
    ask,
    attend,
    decode_uncached,
    encode,
    picture,
    with_positions,
)
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessor,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from modeling_vreflection.decoding_vreflection import ReflectionOptions, ReflectionProgress
from modeling_vreflection.generation_vreflection import CACHE


NEW_TOKENS = 26
# Rows enter and leave at different steps; the first row reflects twice, in the last one a reflection ends with the text.
STARTS = ({0, 13}, {3}, {6}, {15})


@pytest.fixture(scope="module")
def eos(model):
    return model.generation_config.eos_token_id


def decode(model, inputs, starts=None, new_tokens=NEW_TOKENS, **kwargs):
    """New tokens (B, T) of a run that doesn't end early; `starts` opens reflections as `OpenReflections` does."""
    length = inputs["input_ids"].shape[1]
    processors = [] if starts is None else [OpenReflections(model.config.latent_start_token_id, length, *starts)]
    kwargs = {"do_sample": False, "min_new_tokens": new_tokens, **kwargs}
    result = model.generate(**inputs, max_new_tokens=new_tokens, logits_processor=processors, **kwargs)
    return result[:, length:] if isinstance(result, torch.Tensor) else result


@pytest.fixture(scope="module")
def words_only(processor, ids):
    """Keeps the model from writing other special tokens, so that all that it writes can be seen in the text."""
    return {"suppress_tokens": [token for token in processor.tokenizer.added_tokens_decoder if token not in ids]}


@pytest.fixture(scope="module")
def greedy(model, batch):
    """The batch of prompts, greedy, reflections opened by `STARTS`."""
    return decode(model, batch, STARTS, return_dict_in_generate=True, output_logits=True)


@pytest.fixture(scope="module")
def uncached(stock, batch, ids, eos):
    """The same from scratch at every step: a list of (tokens, logits)."""
    return [
        decode_uncached(Row(stock, batch, row), ids, NEW_TOKENS, STARTS[row], banned=eos) for row in range(len(STARTS))
    ]


def new_tokens_of(result, inputs):
    return result.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def test_greedy_batch_equals_uncached_decoding(batch, greedy, uncached):
    assert new_tokens_of(greedy, batch) == [tokens for tokens, _ in uncached]


def test_logits_equal_uncached_decoding(greedy, uncached):
    logits = torch.stack(greedy.logits, 1)
    for row, (_, expected) in enumerate(uncached):
        computed = logits[row].isfinite().all(1)  # forced steps have no logits but that of their token
        assert computed.sum() >= NEW_TOKENS - 2 * 9
        torch.testing.assert_close(logits[row][computed], expected[computed], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reflect", [None, False])
def test_returned_logits_are_the_models_own(model, stock, batch, reflect):
    """With no processor before ours: what is banned is banned in a copy."""
    options = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        expected = stock(**batch).logits[:, -1]
    (logits,) = model.generate(**batch, **options, reflect=reflect).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_greedy_batch_equals_single_runs(model, processor, prompts, batch, greedy):
    for row, prompt in enumerate(prompts):
        single = decode(model, encode(processor, prompt), STARTS[row : row + 1])
        assert single[0].tolist() == new_tokens_of(greedy, batch)[row]


def test_latents_change_what_is_decoded(stock, batch, ids, uncached):
    """The tests above would not notice lost latents if latents made no difference."""
    for row, (tokens, logits) in enumerate(uncached):
        after = min(STARTS[row]) + 10
        options = {"feedback": torch.zeros_like, "given": tokens[: after + 1]}
        _, zeroed = decode_uncached(Row(stock, batch, row), ids, after + 1, **options)
        assert (zeroed[after] - logits[after]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_other_numbers_of_latent_steps_equal_uncached_decoding(model, stock, processor, prompts, ids, eos, steps):
    inputs = encode(processor, prompts[0])
    expected, _ = decode_uncached(Row(stock, inputs), ids, 20, {2}, steps, banned=eos)
    tokens = decode(model, inputs, [{2}], 20, latent_steps=steps)[0].tolist()
    assert tokens == expected
    assert tokens[2 : steps + 4] == [ids[0], *[ids[1]] * steps, ids[2]]


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {"latent_steps": 0, "use_cache": False}, {"reflect": False}])
def test_without_latents_it_is_the_stock_model(model, stock, batch, plain):
    ours = decode(model, batch, new_tokens=8, **plain)
    assert torch.equal(ours, stock_tokens(stock, batch, 8))


def stock_tokens(stock, inputs, new_tokens):
    sequences = stock.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {"reflect": False}])
def test_without_latents_no_reflection_token_appears(model, batch, ids, plain):
    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids] += 100.0
            return scores

    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[WantReflections()], **plain)
    assert not torch.isin(tokens, torch.tensor(ids)).any()


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
    assert not torch.isin(tokens, torch.tensor(ids[1:] if plain == {} else ids)).any()


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
            return scores.index_fill(1, torch.tensor(ids), 100.0)

    # The model's own favourites: bans come before the list that the user gave, and once more after it.
    bias = {(token,): 100.0 for token in ids}
    options = {"do_sample": True, "max_new_tokens": 2, "reflect": False}
    for given in ([TopKLogitsWarper(1)], [WantReflections()]):
        extra = {"sequence_bias": bias} if isinstance(given[0], TopKLogitsWarper) else {}
        tokens = model.generate(**batch, **options, **extra, logits_processor=given)
        assert not torch.isin(tokens[:, batch["input_ids"].shape[1] :], torch.tensor(ids)).any()


@pytest.mark.parametrize(
    "name", ["boxes", "latent_inputs", "bcm_receives_ce", "latent_state", "skip_logits", "labels"]
)
def test_arguments_of_forward_alone_are_refused(model, batch, name):
    with pytest.raises(ValueError, match=f"no use for `{name}`"):
        model.generate(**batch, max_new_tokens=2, **{name: torch.zeros(1, 5, dtype=torch.long)})


def test_dac_feedback_refuses_videos(model, batch):
    videos = {"pixel_values_videos": torch.zeros(4, 4), "video_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(ValueError, match="pass `images`, not `videos`"):
        model.generate(**batch, **videos, max_new_tokens=12, latent_feedback="dac")


def test_slots_and_end_appear_only_in_a_reflection(model, batch, ids):
    class WantSlots(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids[1:]] += 100.0
            return scores

    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[WantSlots()])
    assert not torch.isin(tokens, torch.tensor(ids[1:])).any()


def test_a_user_processor_cannot_break_a_reflection(model, processor, prompts, ids):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids] = float("-inf")
            return scores

    inputs = encode(processor, prompts[0])
    sequences = model.generate(**inputs, max_new_tokens=12, reflect=True, logits_processor=[Forbid()])
    new = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert new[:10] == [ids[0], *[ids[1]] * 8, ids[2]]


def test_reflect_true_begins_with_one_reflection(model, stock, batch, ids, eos):
    tokens = decode(model, batch, new_tokens=14, reflect=True).tolist()
    for row in range(len(tokens)):
        assert tokens[row] == decode_uncached(Row(stock, batch, row), ids, 14, {0}, banned=eos)[0]


def test_a_row_that_ends_leaves_the_others_alone(model, processor, prompts, batch, eos, greedy):
    """Row 0 says its last word while row 1 reflects."""

    class End(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == length + 5:
                scores = scores.clone()
                scores[0] = float("-inf")
                scores[0, eos[0]] = 0.0
            return scores

    length = batch["input_ids"].shape[1]
    starts = OpenReflections(model.config.latent_start_token_id, length, set(), {3}, {2}, {9})
    tokens = model.generate(**batch, max_new_tokens=20, do_sample=False, logits_processor=[starts, End()])[:, length:]
    assert tokens[0, 5] == eos[0] and (tokens[0, 6:] == model.generation_config.pad_token_id).all()
    alone = decode(model, encode(processor, prompts[1]), [{3}], 20)
    assert tokens[1].tolist() == alone[0].tolist()


def test_dac_feedback_equals_uncached_decoding(model, stock, processor, prompts, ids, eos):
    """Latents are what the states query from all images of the row, padding excluded."""
    inputs = encode(processor, *prompts[:3])
    tokens = decode(model, inputs, STARTS[:3], latent_feedback="dac").tolist()
    hidden = decode(model, inputs, STARTS[:3]).tolist()
    for row in range(3):
        reference = Row(stock, inputs, row)
        expected, _ = decode_uncached(
            reference, ids, NEW_TOKENS, STARTS[row], feedback=looker(model, reference)[0], banned=eos
        )
        assert tokens[row] == expected
        assert tokens[row] != hidden[row]


def looker(model, row):
    """What a state sees in all images of a row, and where it looks: functions of (D,)."""
    sincos = model.config.patch_positions == "sincos"
    read = [with_positions(*image) if sincos else image[0] for image in zip(row.features, row.grids)]

    def ask_dac(state):
        return attend(model.model.dac, state[None, None], torch.cat(read)[None])

    return lambda state: ask_dac(state)[0][0, 0], lambda state: ask_dac(state)[1][0, 0]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("positions", ["none", "sincos"])
def test_looks_reach_the_pictures_wherever_they_are_kept(
    make_model, stock, processor, prompts, ids, eos, positions, options
):
    """Rows with one, no and two pictures; what was fed and where each step looked is returned as it was."""
    model = make_model(patch_positions=positions)
    inputs = encode(processor, prompts[0], prompts[3], prompts[2])
    starts = (STARTS[0], set(), STARTS[2])
    result = decode(model, inputs, starts, latent_feedback="dac", return_dict_in_generate=True, **options)
    assert result.latent_counts.tolist() == [16, 0, 8] and result.latents.shape == (3, 16, 192)
    for index, tokens in enumerate(new_tokens_of(result, inputs)):
        row = Row(stock, inputs, index)
        feedback, look = looker(model, row) if row.images else (None, None)
        expected, _ = decode_uncached(row, ids, NEW_TOKENS, starts[index], feedback=feedback, banned=eos)
        assert tokens == expected
        count = len(row.fed)
        assert count == result.latent_counts[index]
        if count:
            torch.testing.assert_close(result.latents[index, :count], torch.stack(row.fed), atol=5e-3, rtol=5e-3)
        assert not result.latents[index, count:].any() and not result.latent_attention[index, count:].any()
        patches = sum(map(len, row.features))
        seen = result.latent_attention[index, :count]
        torch.testing.assert_close(seen.sum(1), torch.ones(count))
        assert not seen[:, patches:].any()


def test_keys_and_values_of_the_pictures_are_made_once_an_answer(model, processor, prompts):
    calls = []
    dac = model.model.dac
    hooks = [getattr(dac, name).register_forward_hook(lambda *_: calls.append(1)) for name in ("k_proj", "v_proj")]
    hooks.append(model.model.visual.register_forward_hook(lambda *_: calls.append(1)))
    try:
        decode(model, encode(processor, *prompts[:3]), STARTS[:3], latent_feedback="dac", num_beams=2)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_recorded_latents_replay_to_the_same_log_probabilities(model, processor, prompts, ids, feedback):
    """With slot and end token banned, as they are outside of reflections; reflections that were cut, too.

    In float64: rounding in float32 alone takes log-probabilities of 6 to 2e-6 from each other.
    """
    model = copy.deepcopy(model).double()
    inputs = encode(processor, *prompts[:3])
    length = inputs["input_ids"].shape[1]
    starts = ({0, 12}, {3, 22}, {15})  # the second row's last reflection is cut
    options = {"return_dict_in_generate": True, "output_logits": True, "latent_feedback": feedback}
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="rows \\[1\\]"):
        result = decode(model, inputs, starts, do_sample=True, top_k=0, **options)
    assert (result.latent_attention is None) == (feedback == "hidden")
    assert result.latent_counts.tolist() == [16, 10, 8]
    replayed = {
        **inputs,
        "input_ids": result.sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, NEW_TOKENS)),
    }
    with torch.no_grad():
        logits = model(**replayed, latents=result.latents).logits[:, length - 1 : -1].clone()
    sampled = torch.stack(result.logits, 1).double()  # which `generate` gives in float32
    computed = sampled.abs().amax(2) > 0
    for values in (sampled, logits):
        values[..., ids[1:]] = float("-inf")
    tokens = result.sequences[:, length:, None]
    first, second = (values.log_softmax(-1).gather(2, tokens)[..., 0][computed] for values in (sampled, logits))
    free = first > float("-inf")
    assert free.sum() > 30
    torch.testing.assert_close(second[free], first[free], atol=5e-6, rtol=0)


def test_latents_replay_with_a_gradient_in_any_place(model, stock, processor):
    """Segments of other lengths, of several in a row, of packed rows: the n-th slot holds the n-th latent."""
    conversations = [ask("Which?", picture(1)) + answer("A", [0.1, 0.1, 0.5, 0.5], "N"), ask("What?") + answer("Z")]
    inputs = encode(processor, *conversations)
    inputs.pop("boxes")
    slot = model.config.latent_token_id
    inputs["input_ids"][0, -2] = slot  # one more, anywhere
    torch.manual_seed(0)
    latents = torch.randn(2, 10, 192, requires_grad=True)
    logits = model(**inputs, latents=latents).logits
    row = Row(stock, inputs, 0)
    columns = (row.ids == slot).nonzero().flatten()
    assert len(columns) == 9
    row.fill(columns, latents[0, :9])
    expected = row.logits(row.run())
    torch.testing.assert_close(logits[0], expected, atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(logits[0, -1, :5].sum(), latents)
    assert gradient[0, :9].abs().sum(1).all() and not gradient[0, 9:].any() and not gradient[1].any()


def test_a_replay_needs_a_latent_for_each_slot(model, processor, ids):
    inputs = encode(processor, ask("Which?", picture(1)) + answer([0.1, 0.1, 0.5, 0.5], "N"))
    boxes = inputs.pop("boxes")
    with pytest.raises(ValueError, match=r"Rows hold \[8\] slots, and `latents` 7"):
        model(**inputs, latents=torch.zeros(1, 7, 192))
    with pytest.raises(ValueError, match=r"`latents` must be \(1, latents, 192\)"):
        model(**inputs, latents=torch.zeros(2, 8, 192))
    for wrong in ({"latent_inputs": "bcm"}, {"boxes": boxes}):
        with pytest.raises(ValueError, match="neither `boxes` nor `latent_inputs='bcm'`"):
            model(**inputs, latents=torch.zeros(1, 8, 192), **wrong)
    cut = int((inputs["input_ids"][0] == ids[1]).nonzero()[3]) + 1
    last = {name: inputs[name][:, :cut] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        model(**last, **pictures, latents=torch.zeros(1, 3, 192))  # nothing was fed to the last token


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_given_latents_take_the_place_of_the_models_own(model, stock, processor, prompts, ids, eos, feedback):
    inputs = encode(processor, prompts[0], prompts[2])
    starts, own = ({0, 12}, {3}), {"latent_feedback": feedback, "return_dict_in_generate": True}
    usual = decode(model, inputs, starts, **own)
    again = decode(model, inputs, starts, **own, latents=usual.latents)
    assert torch.equal(again.sequences, usual.sequences) and torch.equal(again.latents, usual.latents)
    zeroed = decode(model, inputs, starts, **own, latents=torch.zeros(2, 8, 192))
    assert not zeroed.latents[:, :8].any() and zeroed.latents[0, 8:].any(), "past the last, the model's own"
    row = Row(stock, inputs, 0)
    feed = looker(model, row)[0] if feedback == "dac" else (lambda state: state)
    fed = []

    def zeros_first(state):
        fed.append(torch.zeros_like(state) if len(fed) < 8 else feed(state))
        return fed[-1]

    expected, _ = decode_uncached(row, ids, NEW_TOKENS, starts[0], feedback=zeros_first, banned=eos)
    assert new_tokens_of(zeroed, inputs)[0] == expected != new_tokens_of(usual, inputs)[0]
    copies = decode(model, inputs, starts, **own, latents=torch.zeros(2, 8, 192), num_beams=2, num_return_sequences=2)
    assert not copies.latents[:, :8].any() and len(copies.latents) == 4


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_noise_is_added_to_what_is_fed(model, processor, prompts, feedback):
    """And recorded with it: a replay says what the states before the slots would feed without it."""
    inputs, options = encode(processor, *prompts[:2]), {"latent_feedback": feedback, "return_dict_in_generate": True}
    torch.manual_seed(0)
    result = decode(model, inputs, ({0}, {3}), **options, latent_noise=0.5)
    length = result.sequences.shape[1] - inputs["input_ids"].shape[1]
    replayed = {
        **inputs,
        "input_ids": result.sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, length), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, length)),
    }
    with torch.no_grad():
        outputs = model(**replayed, latents=result.latents)
    fed = {"hidden": outputs.latent_states, "dac": outputs.student_latents}[feedback]
    noise = (result.latents - fed)[:, :8]
    assert noise.std() == pytest.approx(0.5, rel=0.05) and abs(noise.mean()) < 0.05
    plain = decode(model, inputs, ({0}, {3}), **options)
    with torch.no_grad():
        outputs = model(**replayed | {"input_ids": plain.sequences}, latents=plain.latents, latent_inputs=feedback)
    fed = {"hidden": outputs.latent_states, "dac": outputs.student_latents}[feedback]
    torch.testing.assert_close(fed[:, :8], plain.latents[:, :8], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="`latent_noise` must be a finite number from 0 on, got -1"):
        decode(model, inputs, ({0}, {3}), **options, latent_noise=-1)


@pytest.mark.parametrize(
    "latents", [torch.zeros(1, 8, 191), torch.zeros(2, 8, 192), torch.zeros(1, 0, 192), torch.zeros(8, 192)]
)
def test_given_latents_of_another_shape_are_refused(model, one, latents):
    with pytest.raises(ValueError, match=r"`latents` must be \(1, at least 1, 192\)"):
        model.generate(**one, max_new_tokens=16, latents=latents)


def test_given_latents_need_reflections(model, one):
    for plain in ({"latent_steps": 0}, {"reflect": False}):
        with pytest.raises(ValueError, match="`latents` are fed in reflections.*leave out.*`reflect=False`"):
            model.generate(**one, max_new_tokens=16, latents=torch.zeros(1, 8, 192), **plain)


def test_given_latents_must_be_finite(model, one):
    latents = torch.zeros(1, 8, 192)
    latents[0, 3, 5] = float("nan")
    with pytest.raises(ValueError, match="`latents` hold values that aren't finite"):
        model.generate(**one, max_new_tokens=16, latents=latents)


def test_given_latents_fit_a_prompt_of_embeddings(model, processor):
    embeds = model.get_input_embeddings()(encode(processor, ask("Hello?"))["input_ids"]).detach()
    options = {"reflect": True, "max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    assert not model.generate(inputs_embeds=embeds, **options, latents=torch.zeros(1, 8, 192)).latents.any()
    with pytest.raises(ValueError, match=r"`latents` must be \(1, at least 1, 192\), got \(2, 8, 192\)"):
        model.generate(inputs_embeds=embeds, **options, latents=torch.zeros(2, 8, 192))


@pytest.mark.parametrize("beams", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_reflection_ends_when_its_look_comes_to_rest(model, stock, processor, prompts, ids, eos, beams):
    inputs = encode(processor, *prompts[:3])
    options = {"latent_feedback": "dac", "return_dict_in_generate": True}
    looks = decode(model, inputs, STARTS[:3], **options).latent_attention
    steps = (looks[:, 1:8] - looks[:, :7]).abs().sum(2) / 2
    # Between two distances, since rounding could take one itself to either side.
    tolerance = steps.flatten().sort().values[steps.numel() // 2 :][:2].mean().item()
    result = decode(model, inputs, STARTS[:3], **options, latent_tolerance=tolerance, num_beams=beams)
    lengths = set()
    for index, tokens in enumerate(new_tokens_of(result, inputs)):
        row = Row(stock, inputs, index)
        feedback, look = looker(model, row)
        given = tokens if beams > 1 else None
        expected, _ = decode_uncached(
            row,
            ids,
            NEW_TOKENS,
            STARTS[index],
            feedback=feedback,
            banned=eos,
            given=given,
            look=look,
            tolerance=tolerance,
        )
        assert tokens == expected
        assert result.latent_counts[index] == len(row.fed)
        torch.testing.assert_close(result.latents[index, : len(row.fed)], torch.stack(row.fed), atol=1e-4, rtol=1e-4)
        lengths.add(tokens[min(STARTS[index]) :].index(ids[2]) - 1)
    assert min(lengths) < 8, "no reflection ended early: the test shows nothing"
    # Every pair of looks is nearer than 1: two steps at once.
    shortest = decode(model, inputs, STARTS[:3], **options, latent_tolerance=1.0)
    assert [tokens[tokens.index(ids[0]) :][:4] for tokens in new_tokens_of(shortest, inputs)] == [
        [ids[0], ids[1], ids[1], ids[2]]
    ] * 3
    assert torch.equal(
        decode(model, inputs, STARTS[:3], **options, latent_tolerance=0.0).sequences,
        decode(model, inputs, STARTS[:3], **options).sequences,
    )


def test_looks_are_not_compared_with_those_of_an_earlier_call(model, processor, prompts):
    """A static cache that is reset and used again, for pictures with other numbers of patches."""
    options = {"latent_feedback": "dac", "latent_tolerance": 0.5}
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    for prompt in (prompts[0], prompts[2]):
        inputs = encode(processor, prompt)
        cache.reset()
        again = decode(model, inputs, [{2}], **options, **{CACHE: cache})
        assert torch.equal(again, decode(model, inputs, [{2}], **options))


def test_rows_without_a_picture_do_not_reflect_by_looking(model, stock, processor, prompts, ids):
    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids[0]] += 100.0
            return scores

    want = {
        "logits_processor": [WantReflections()],
        "max_new_tokens": 12,
        "do_sample": False,
        "latent_feedback": "dac",
    }
    inputs = encode(processor, prompts[3], prompts[0])
    tokens = model.generate(**inputs, **want)[:, inputs["input_ids"].shape[1] :]
    assert not torch.isin(tokens[0], torch.tensor(ids)).any() and tokens[1, 0] == ids[0]
    assert tokens[0].isfinite().all()
    text = encode(processor, prompts[3])
    assert torch.equal(decode(model, text, new_tokens=8, latent_feedback="dac"), stock_tokens(stock, text, 8))


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
        costs += torch.tensor([conductor.extra(step) for step in range(new_tokens)])
        costs[start : start + 10] = 0.0
        costs[start] = conductor.price
        assert result.sequences_scores[number].item() == pytest.approx(costs.sum().item(), abs=5e-4)


def test_static_cache_equals_dynamic(model, batch, greedy):
    tokens = decode(model, batch, STARTS, cache_implementation="static")
    assert tokens.tolist() == new_tokens_of(greedy, batch)


@pytest.mark.slow
def test_compiled_forward_equals_eager(model, processor, prompts):
    """Full graph, static cache; the backend that only traces shows whatever a graph can't hold."""
    inputs = encode(processor, *prompts[:2])
    expected = decode(model, inputs, [{0}, {3}], 16)
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        tokens = decode(model, inputs, [{0}, {3}], 16, cache_implementation="static", compile_config=options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    finally:
        model.__dict__.pop("_compiled_call", None)
        torch._dynamo.reset()
    assert torch.equal(tokens, expected)


def test_a_prompt_of_embeddings_equals_one_of_ids(model, processor):
    inputs = encode(processor, ask("Hello, what do you know?"), ask("Well?"))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    options = {"reflect": True, "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    tokens = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)
    assert torch.equal(tokens, decode(model, inputs, new_tokens=16, reflect=True))


@pytest.mark.parametrize("chunk", [7, 16])
def test_chunked_prefill_equals_whole(model, batch, greedy, chunk):
    tokens = decode(model, batch, STARTS, prefill_chunk_size=chunk)
    assert tokens.tolist() == new_tokens_of(greedy, batch)


def test_chunked_prefill_with_dac_feedback_equals_whole(model, processor, prompts):
    inputs = encode(processor, *prompts[:3])
    whole = decode(model, inputs, STARTS[:3], latent_feedback="dac")
    assert torch.equal(decode(model, inputs, STARTS[:3], latent_feedback="dac", prefill_chunk_size=16), whole)


def test_a_step_that_is_forced_in_all_rows_does_not_project(model, processor, prompts):
    calls = []
    inputs = encode(processor, *prompts[:2])
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        decode(model, inputs, new_tokens=14, reflect=True)
        # Not after the start token, the slots but the last, and the last: 9 of 14.
        assert len(calls) == 14 - 9
        calls.clear()
        decode(model, inputs, new_tokens=14, reflect=False)
        assert len(calls) == 14
        calls.clear()
        decode(
            model, inputs, [{0}, {3}], new_tokens=14
        )  # steps 4 to 9 are forced in both, and from the 5th that is known
        assert len(calls) == 14 - 5
    finally:
        hook.remove()


def test_within_reflections_of_all_rows_nothing_is_asked_of_the_device(ids):
    """Tokens on the meta device have no values: whoever asks for one, and so would wait for a GPU, fails."""
    progress = ReflectionProgress(ReflectionOptions(3, "hidden"), ids)
    start, slot, _ = ids
    tokens = torch.tensor([[start, slot, slot], [5, start, slot]])
    for length, forced_steps in ((1, 0), (2, 0), (3, 2)):  # what the host knows, it knows from the tokens before
        progress.read(tokens[:, :length])
        assert progress.forced_steps == forced_steps and progress.in_slots == (length > 1)
    assert progress.left.tolist() == [2, 3]
    progress.read(torch.empty(2, 4, dtype=torch.long, device="meta"))
    assert progress.forced_steps == 1 and progress.in_slots
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        progress.read(torch.empty(2, 5, dtype=torch.long, device="meta"))  # the first row leaves: it must ask again


def test_a_reflection_of_every_row_is_known_before_its_first_token(ids):
    progress = ReflectionProgress(ReflectionOptions(3, "hidden", reflect=True), ids)
    for length, forced_steps in ((2, 4), (3, 3), (4, 2), (5, 1)):
        progress.read(torch.empty(2, length, dtype=torch.long, device="meta"))
        assert progress.forced_steps == forced_steps and progress.in_slots == (length > 2)


def test_the_host_waits_for_no_number_of_the_tokens_that_it_has_just_been_given(ids):
    """It asks at one step, and reads at the next."""

    class Late(torch.Tensor):
        """Raises where a value is read in the step in which it was made."""

        step = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            if function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__):
                assert args[0].made < cls.step
            if isinstance(result, cls):
                result.made = cls.step
            return result

    start, slot, end = ids
    progress = ReflectionProgress(ReflectionOptions(2, "hidden"), ids)
    tokens = torch.tensor([[5, start, slot, slot, end, 6, 7], [5, 5, 5, start, slot, slot, end]])
    for length in range(1, 8):
        Late.step = length
        given = tokens[:, :length].as_subclass(Late)
        progress.read(given)
        left = torch.Tensor(progress.left.as_subclass(torch.Tensor).float()).tolist()
        assert left == [[0, 3, 2, 1, 0, 0, 0][length - 1], [0, 0, 0, 3, 2, 1, 0][length - 1]]
        assert progress.in_slots == bool((given.as_subclass(torch.Tensor)[:, -1] == slot).any())


@pytest.mark.parametrize("tolerance", [None, 1e-9])
def test_dac_is_asked_only_at_steps_with_a_slot(model, processor, prompts, tolerance):
    calls = []
    inputs = encode(processor, *prompts[:2])
    hook = model.model.dac.q_proj.register_forward_hook(lambda *_: calls.append(1))
    try:
        # Both rows at once; one after the other with text between; overlapping.
        for starts, steps in (([{0}, {0}], 8), ([{0}, {12}], 16), ([{0}, {3}], 11)):
            calls.clear()
            decode(model, inputs, starts, latent_feedback="dac", latent_tolerance=tolerance)
            assert len(calls) == steps
    finally:
        hook.remove()


def test_a_text_step_gets_what_the_stock_class_gets(model, processor, prompts):
    given = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    try:
        decode(model, encode(processor, *prompts[:2]), [{1}, {4}], new_tokens=16)
    finally:
        hook.remove()
    # The prompt, then the tokens; those from the first row's first slot to the second row's last one feed back.
    feeds = ["latent_state" in names for names in given]
    assert feeds == [False] * 3 + [True] * 11 + [False] * 2
    assert all("skip_logits" in names for names, feeding in zip(given, feeds) if feeding)
    assert not any("skip_logits" in names for names, feeding in zip(given, feeds) if not feeding)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("reflect", [None, True])
def test_an_answers_log_probability_is_that_of_its_free_tokens(model, batch, ids, reflect, beams):
    """Forced tokens count 0, by scores and by logits; free ones what they count in the logits."""
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "num_beams": beams}
    starts = None if reflect else STARTS
    result = decode(model, batch, starts, reflect=reflect, **options)
    length, beam_indices = batch["input_ids"].shape[1], getattr(result, "beam_indices", None)
    tokens = result.sequences[:, length:]
    forced = torch.isin(tokens, torch.tensor(ids[1:]))
    forced[:, 0] |= bool(reflect)
    assert forced.sum(1).min() > 8
    by_logits = model.compute_transition_scores(result.sequences, result.logits, beam_indices, normalize_logits=True)
    assert (by_logits[forced] == 0).all() and (by_logits[~forced] < 0).all()
    if beams == 1:
        by_scores = model.compute_transition_scores(result.sequences, result.scores, normalize_logits=True)
        assert (by_scores[forced] == 0).all()


class Collect(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_the_words(model, processor, prompts, ids):
    inputs = encode(processor, prompts[0])
    streamer = Collect()
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer)[0].tolist()
    assert streamer.values[0] == inputs["input_ids"].tolist()
    assert [token for value in streamer.values[1:] for token in value] == [t for t in tokens if t not in ids]
    assert streamer.ended == 1


def test_a_streamer_that_counts_for_the_usage_counts_hidden_tokens_too(model, processor, prompts):
    inputs = encode(processor, prompts[0])

    class Counting(Collect):
        total_tokens = -1  # the prompt is no answer

        def put(self, value):
            self.total_tokens += 1

    streamer = Counting()
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer)[0]
    assert streamer.total_tokens == len(tokens)


def test_a_streamer_may_be_given_by_position(model, processor, prompts, ids):
    inputs = encode(processor, prompts[0])
    prompt, streamer = inputs.pop("input_ids"), Collect()
    options = {"max_new_tokens": 12, "reflect": True, "do_sample": False}
    tokens = model.generate(prompt, None, None, None, None, None, None, streamer, **inputs, **options)
    assert streamer.values[1:] == [[token] for token in tokens[0, prompt.shape[1] :].tolist() if token not in ids]


def test_text_streamer_never_shows_placeholders(model, processor, prompts, ids, words_only, capsys):
    inputs = encode(processor, prompts[0])
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)  # doesn't skip special tokens by itself
    tokens = decode(model, inputs, STARTS[:1], streamer=streamer, **words_only)[0].tolist()
    shown = capsys.readouterr().out
    assert ids[0] in tokens and not any(name in shown for name in (START, SLOT, END))
    assert shown.strip() == processor.decode(tokens, skip_special_tokens=True).strip()


def test_text_iterator_streamer_gives_the_decoded_text(model, processor, prompts, words_only):
    inputs = encode(processor, prompts[1])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=10)
    tokens = decode(model, inputs, STARTS[1:2], streamer=streamer, **words_only)[0].tolist()
    assert "".join(streamer) == processor.decode(tokens, skip_special_tokens=True)


def test_a_streamer_of_several_rows_can_tell_them_apart(model, processor, prompts):
    inputs = encode(processor, *prompts[:2])
    streamer = Collect()
    tokens = decode(model, inputs, STARTS[:2], streamer=streamer)
    assert torch.tensor(streamer.values[1:]).T.tolist() == tokens.tolist()


def test_options_of_the_generation_config_are_honoured(model, processor, prompts, ids, monkeypatch):
    inputs = encode(processor, prompts[0])

    def slots(**kwargs):
        return int((decode(model, inputs, reflect=True, **kwargs) == ids[1]).sum())

    dac = decode(model, inputs, reflect=True, latent_feedback="dac")
    assert slots() == 8
    own = {"max_new_tokens": NEW_TOKENS, "eos_token_id": 0, "pad_token_id": 0}
    assert slots(generation_config=GenerationConfig(**own, latent_steps=2)) == 2
    assert slots(generation_config=GenerationConfig(**own, latent_steps=2), latent_steps=3) == 3
    with monkeypatch.context() as patch:
        patch.setattr(model.generation_config, "latent_steps", 5)
        patch.setattr(model.generation_config, "latent_feedback", "dac")
        assert slots() == 5
        assert slots(generation_config=GenerationConfig(**own)) == 5, "what a call's config leaves out is the model's"
        assert torch.equal(decode(model, inputs, reflect=True, latent_steps=8), dac)
        patch.setattr(model.generation_config, "reflect", True, raising=False)
        patch.setattr(model.generation_config, "latent_tolerance", 1.0, raising=False)
        assert torch.equal(decode(model, inputs), decode(model, inputs, reflect=True, latent_steps=2))
        assert int((decode(model, inputs, latent_feedback="hidden") == ids[1]).sum()) == 5
        assert int((decode(model, inputs, reflect=False) == ids[0]).sum()) == 0
        assert int((decode(model, inputs, latent_steps=0) == ids[0]).sum()) == 0


def test_decoding_drops_the_reflection_from_the_text(model, processor, prompts, ids):
    tokens = decode(model, encode(processor, prompts[0]), STARTS[:1])[0].tolist()
    words = [token for token in tokens if token not in ids]
    assert processor.decode(tokens, skip_special_tokens=True) == processor.decode(words, skip_special_tokens=True)


def test_scores_and_states_of_an_earlier_call_do_not_matter(model, batch, processor, prompts, greedy):
    decode(model, encode(processor, prompts[1]), STARTS[1:2])
    model(**encode(processor, prompts[0]))
    assert decode(model, batch, STARTS).tolist() == new_tokens_of(greedy, batch)


# What is refused


@pytest.fixture(scope="module")
def one(processor, prompts):
    return encode(processor, prompts[0])


def test_assisted_decoding_is_refused(model, stock, one):
    with pytest.raises(ValueError, match=r"(?s)assistant_model.*latent_steps=0"):
        model.generate(**one, max_new_tokens=16, assistant_model=stock)
    others = {name: value for name, value in one.items() if name != "input_ids"}
    with pytest.raises(ValueError, match=r"(?s)assistant_model.*latent_steps=0"):
        model.generate(one["input_ids"], None, None, None, None, None, stock, **others, max_new_tokens=16)


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {"reflect": False}])
def test_an_assistant_helps_where_nothing_is_reflected(model, stock, one, plain):
    options = {"do_sample": False, "max_new_tokens": 8, **plain}
    assert torch.equal(model.generate(**one, **options, assistant_model=stock), model.generate(**one, **options))


def test_prompt_lookup_is_refused(model, one):
    with pytest.raises(ValueError, match=r"(?s)prompt lookup.*latent_steps=0"):
        model.generate(**one, max_new_tokens=16, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"(?s)prompt lookup.*latent_steps=0"):
        model.generate(**one, generation_config=GenerationConfig(max_new_tokens=16, prompt_lookup_num_tokens=2))


def test_no_cache_is_refused(model, one):
    with pytest.raises(ValueError, match=r"(?s)use_cache=False.*latent_steps=0"):
        model.generate(**one, max_new_tokens=16, use_cache=False)
    with pytest.raises(ValueError, match=r"(?s)use_cache=False.*latent_steps=0"):
        model.generate(**one, generation_config=GenerationConfig(max_new_tokens=16, use_cache=False))


def test_guidance_is_refused(model, one):
    """Its second, unconditional run would not get the states."""
    with pytest.raises(ValueError, match=r"(?s)guidance_scale.*latent_steps=0"):
        model.generate(**one, max_new_tokens=16, guidance_scale=1.5)


def test_continuous_batching_is_refused(model, one):
    with pytest.raises(ValueError, match="Continuous batching.*call `generate` without"):
        model.generate_batch(inputs=one["input_ids"].tolist())
    with pytest.raises(ValueError, match="Continuous batching.*call `generate` without"):
        model.generate(**one, max_new_tokens=16, cache_implementation="paged")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_tokens_of_a_reflection_in_the_prompt_are_refused(model, processor, prompts, batch, ids, which):
    inputs = dict(batch)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][2, -3] = ids[which]
    with pytest.raises(ValueError, match=r"prompts \[2\] hold tokens of a reflection.*reflect=True"):
        model.generate(**inputs, max_new_tokens=16)
    with pytest.raises(ValueError, match=r"prompts \[2\] hold tokens of a reflection"):
        model.generate(None, **inputs, max_new_tokens=16)
    with pytest.raises(ValueError, match=r"prompts \[2\] hold tokens of a reflection"):
        model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=16, latent_steps=0)


def test_a_conversation_with_a_past_reflection_can_go_on(model, processor, prompts):
    conversation = prompts[0] + answer([0.1, 0.1, 0.9, 0.9], "Z") + ask("Sure?")
    tokens = decode(model, encode(processor, conversation), new_tokens=4)
    assert tokens.shape == (1, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reflect": True, "latent_steps": 0}, "reflect=True.*latent_steps=0.*above 0"),
        ({"latent_steps": -1}, "latent_steps.*negative.*-1"),
        ({"latent_feedback": "tokens"}, "latent_feedback.*hidden, dac.*'tokens'"),
        ({"reflect": True, "max_new_tokens": 10}, "8 latent steps takes 10 tokens.*max_new_tokens"),
        ({"reflect": True, "max_new_tokens": 4, "latent_steps": 3}, "3 latent steps takes 5 tokens.*max_new_tokens"),
    ],
)
def test_contradictions_are_refused(model, one, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**one, **{"max_new_tokens": 16, **kwargs})


def test_one_token_after_the_reflection_is_room_enough(model, one):
    assert decode(model, one, new_tokens=11, reflect=True).shape == (1, 11)


def test_dac_feedback_needs_dac(make_model, one):
    model = make_model(has_dac=False)
    with pytest.raises(ValueError, match="needs a checkpoint with DAC.*hidden"):
        model.generate(**one, max_new_tokens=16, latent_feedback="dac")
    assert decode(model, one, new_tokens=12, reflect=True).shape == (1, 12)


@pytest.mark.parametrize("config", [{"dac_queries": "static"}, {"query_position": "at"}])
def test_dac_feedback_needs_queries_that_decoding_has(make_model, one, config):
    with pytest.raises(ValueError, match="dac_queries='states'.*hidden"):
        make_model(**config).generate(**one, max_new_tokens=16, latent_feedback="dac")


def test_dac_feedback_names_the_row_that_must_reflect_without_a_picture(model, batch):
    with pytest.raises(ValueError, match="row 3 has no picture"):
        model.generate(**batch, max_new_tokens=16, latent_feedback="dac", reflect=True)


def test_dac_feedback_needs_the_pictures(model, processor, one):
    options = {"max_new_tokens": 12, "latent_feedback": "dac"}
    partly = {name: value for name, value in one.items() if name not in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match="doesn't hold them all.*pixel_values"):
        model.generate(**partly, **options)
    cache = model.generate(**one, **options, reflect=False, return_dict_in_generate=True)[CACHE]
    longer = {name: torch.cat([partly[name], partly[name][:, -3:]], 1) for name in partly}
    with pytest.raises(ValueError, match="no cache of an earlier call"):
        model.generate(**longer, **{CACHE: cache}, **options)
    embeds = model.get_input_embeddings()(partly["input_ids"]).detach()
    with pytest.raises(ValueError, match="as `input_ids`"):
        model.generate(inputs_embeds=embeds, attention_mask=partly["attention_mask"], **options)


@pytest.mark.parametrize("tolerance", [-0.1, 1.5])
def test_a_tolerance_is_a_share_and_of_looks(model, one, tolerance):
    with pytest.raises(ValueError, match=f"number in \\[0, 1\\], got {tolerance}"):
        model.generate(**one, max_new_tokens=16, latent_feedback="dac", latent_tolerance=tolerance)
    with pytest.raises(ValueError, match="compares DAC's looks"):
        model.generate(**one, max_new_tokens=16, latent_feedback="hidden", latent_tolerance=0.1)


def test_a_cut_reflection_warns_and_names_the_rows(model, batch):
    with pytest.warns(UserWarning, match=r"within the reflection of rows \[1, 3\].*max_new_tokens") as caught:
        decode(model, batch, [{0}, {3}, {2}, {8}], 12)
    assert [warning.filename for warning in caught] == [__file__], "points at the caller's line"


def test_a_whole_reflection_does_not_warn(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        decode(model, batch, [{0}, {2}, {1}, set()], 12)


def test_pipeline_answers_in_text(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What?"}]
    kwargs = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "reflect": True}
    text = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=kwargs)
    inputs = encode(processor, ask("What?", picture(1)))
    expected = processor.batch_decode(decode(model, inputs, new_tokens=14, reflect=True), skip_special_tokens=True)
    assert text[0]["generated_text"] == expected[0]


def test_a_model_without_latent_tokens_says_so(make_model, processor):
    model = make_model()
    model.config.latent_token_id = None
    with pytest.raises(ValueError, match="no latent tokens: make it with `from_backbone`"):
        model.generate(**encode(processor, ask("Q")))
