"""`latent_feedback="dac"` against uncached re-computation: which pictures are looked at, and when a reflection ends."""

import devices
import pytest
import torch
from generation_helpers import NEW_TOKENS, STARTS, decode, looker, new_tokens_of, stock_tokens
from reference import Row, decode_uncached, encode
from transformers import LogitsProcessor, StaticCache

from modeling_vreflection import VReflectionForConditionalGeneration, VReflectionProcessor
from modeling_vreflection.generation_vreflection import CACHE
from vreflection_hub_card.inference.checkpoints import EMBEDDED


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
        torch.testing.assert_close(seen.sum(1), torch.ones(count, device=devices.DEVICE))
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
    assert not torch.isin(tokens[0], tokens.new_tensor(ids)).any() and tokens[1, 0] == ids[0]
    assert tokens[0].isfinite().all()
    text = encode(processor, prompts[3])
    assert torch.equal(decode(model, text, new_tokens=8, latent_feedback="dac"), stock_tokens(stock, text, 8))


def test_chunked_prefill_with_dac_feedback_equals_whole(model, processor, prompts):
    inputs = encode(processor, *prompts[:3])
    whole = decode(model, inputs, STARTS[:3], latent_feedback="dac")
    assert torch.equal(decode(model, inputs, STARTS[:3], latent_feedback="dac", prefill_chunk_size=16), whole)


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


@pytest.mark.parametrize("beams", [1, 2])
def test_latents_are_recorded_under_autocast(prompts, beams):
    """What DAC sees is bfloat16 there, and what is returned float32, as the embeddings are."""
    model = VReflectionForConditionalGeneration.from_pretrained(EMBEDDED, dtype=torch.float32).to(devices.DEVICE)
    one = encode(VReflectionProcessor.from_pretrained(EMBEDDED), prompts[0])
    options = {"do_sample": False, "max_new_tokens": 20, "num_beams": beams}
    with torch.autocast(devices.DEVICE.type, torch.bfloat16):
        result = model.generate(**one, **options, return_dict_in_generate=True)
    plain = model.generate(**one, **options, return_dict_in_generate=True)
    assert result.latents.dtype == torch.float32 and result.latents.shape == (1, 8, plain.latents.shape[2])
    torch.testing.assert_close(result.latents[:, 0], plain.latents[:, 0], atol=0.1, rtol=0.1)
