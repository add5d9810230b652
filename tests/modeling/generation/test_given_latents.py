"""Latents that `generate` returned, or is given: replayed by `forward`, fed instead of the model's own, with noise."""

import copy

import devices
import pytest
import torch
from generation_helpers import NEW_TOKENS, decode, looker, new_tokens_of
from reference import Row, answer, ask, decode_uncached, encode, picture


def zeros(rows: int, count: int) -> torch.Tensor:
    return torch.zeros(rows, count, 192, device=devices.DEVICE)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 5e-6), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_recorded_latents_replay_to_the_same_log_probabilities(
    model, processor, prompts, ids, feedback, dtype, rounding
):
    """With slot and end token banned, as they are outside of reflections; reflections that were cut, too.

    In float64: rounding in float32 alone takes log-probabilities of 6 to 2e-6 from each other. Latents of zeros would
    take them 0.6 from each other.
    """
    model = copy.deepcopy(model).to(dtype)
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
        logits = model(**replayed, latents=result.latents).logits[:, length - 1 : -1].double()
    sampled = torch.stack(result.logits, 1).double()  # which `generate` gives in float32
    computed = sampled.abs().amax(2) > 0
    for values in (sampled, logits):
        values[..., ids[1:]] = float("-inf")
    tokens = result.sequences[:, length:, None]
    first, second = (values.log_softmax(-1).gather(2, tokens)[..., 0][computed] for values in (sampled, logits))
    free = first > float("-inf")
    assert free.sum() > 30
    torch.testing.assert_close(second[free], first[free], atol=rounding, rtol=0)


def test_latents_replay_with_a_gradient_in_any_place(model, stock, processor):
    """Segments of other lengths, of several in a row, of packed rows: the n-th slot holds the n-th latent."""
    conversations = [ask("Which?", picture(1)) + answer("A", [0.1, 0.1, 0.5, 0.5], "N"), ask("What?") + answer("Z")]
    inputs = encode(processor, *conversations)
    inputs.pop("boxes")
    slot = model.config.latent_token_id
    inputs["input_ids"][0, -2] = slot  # one more, anywhere
    torch.manual_seed(0)
    latents = torch.randn(2, 10, 192, device=devices.DEVICE, requires_grad=True)
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
        model(**inputs, latents=zeros(1, 7))
    with pytest.raises(ValueError, match=r"`latents` must be \(1, latents, 192\)"):
        model(**inputs, latents=zeros(2, 8))
    for wrong in ({"latent_inputs": "bcm"}, {"boxes": boxes}):
        with pytest.raises(ValueError, match="neither `boxes` nor `latent_inputs='bcm'`"):
            model(**inputs, latents=zeros(1, 8), **wrong)
    cut = int((inputs["input_ids"][0] == ids[1]).nonzero()[3]) + 1
    last = {name: inputs[name][:, :cut] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        model(**last, **pictures, latents=zeros(1, 3))  # nothing was fed to the last token


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_given_latents_take_the_place_of_the_models_own(model, stock, processor, prompts, ids, eos, feedback):
    inputs = encode(processor, prompts[0], prompts[2])
    starts, own = ({0, 12}, {3}), {"latent_feedback": feedback, "return_dict_in_generate": True}
    usual = decode(model, inputs, starts, **own)
    again = decode(model, inputs, starts, **own, latents=usual.latents)
    assert torch.equal(again.sequences, usual.sequences) and torch.equal(again.latents, usual.latents)
    zeroed = decode(model, inputs, starts, **own, latents=zeros(2, 8))
    assert not zeroed.latents[:, :8].any() and zeroed.latents[0, 8:].any(), "past the last, the model's own"
    row = Row(stock, inputs, 0)
    feed = looker(model, row)[0] if feedback == "dac" else (lambda state: state)
    fed = []

    def zeros_first(state):
        fed.append(torch.zeros_like(state) if len(fed) < 8 else feed(state))
        return fed[-1]

    expected, _ = decode_uncached(row, ids, NEW_TOKENS, starts[0], feedback=zeros_first, banned=eos)
    assert new_tokens_of(zeroed, inputs)[0] == expected != new_tokens_of(usual, inputs)[0]
    copies = decode(model, inputs, starts, **own, latents=zeros(2, 8), num_beams=2, num_return_sequences=2)
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
    assert noise.std().item() == pytest.approx(0.5, rel=0.05) and abs(noise.mean()) < 0.05
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
            model.generate(**one, max_new_tokens=16, latents=zeros(1, 8), **plain)


def test_given_latents_must_be_finite(model, one):
    latents = zeros(1, 8)
    latents[0, 3, 5] = float("nan")
    with pytest.raises(ValueError, match="`latents` hold values that aren't finite"):
        model.generate(**one, max_new_tokens=16, latents=latents)


def test_given_latents_fit_a_prompt_of_embeddings(model, processor):
    embeds = model.get_input_embeddings()(encode(processor, ask("Hello?"))["input_ids"]).detach()
    options = {"reflect": True, "max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    assert not model.generate(inputs_embeds=embeds, **options, latents=zeros(1, 8)).latents.any()
    with pytest.raises(ValueError, match=r"`latents` must be \(1, at least 1, 192\), got \(2, 8, 192\)"):
        model.generate(inputs_embeds=embeds, **options, latents=zeros(2, 8))
