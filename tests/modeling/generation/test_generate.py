"""`generate` against uncached re-computation, over batches and caches, and beside the stock class."""

import pytest
import torch
from generation_helpers import NEW_TOKENS, STARTS, decode, new_tokens_of, stock_tokens
from reference import OpenReflections, Row, ask, decode_uncached, encode, picture
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, pipeline


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


@pytest.mark.parametrize("plain", [{"latent_steps": 0}, {"reflect": False}])
def test_without_latents_no_reflection_token_appears(model, batch, ids, plain):
    class WantReflections(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids] += 100.0
            return scores

    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[WantReflections()], **plain)
    assert not torch.isin(tokens, tokens.new_tensor(ids)).any()


def test_slots_and_end_appear_only_in_a_reflection(model, batch, ids):
    class WantSlots(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, ids[1:]] += 100.0
            return scores

    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False, logits_processor=[WantSlots()])
    assert not torch.isin(tokens, tokens.new_tensor(ids[1:])).any()


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


def test_static_cache_equals_dynamic(model, batch, greedy):
    tokens = decode(model, batch, STARTS, cache_implementation="static")
    assert tokens.tolist() == new_tokens_of(greedy, batch)


@pytest.fixture
def compiled(model):
    """Options of `generate` that compile its steps, by a backend that only traces: it shows whatever a graph can't hold."""
    options = CompileConfig(fullgraph=True, backend="eager", mode=None)
    options._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield {"cache_implementation": "static", "compile_config": options}
    model.__dict__.pop("_compiled_call", None)
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_forward_equals_eager(model, processor, prompts, compiled):
    inputs = encode(processor, *prompts[:2])
    expected = decode(model, inputs, [{0}, {3}], 16)
    tokens = decode(model, inputs, [{0}, {3}], 16, **compiled)
    assert graphs() >= 1, "nothing was compiled"
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("feedback", ["hidden", "dac"])
def test_text_steps_are_compiled_once_and_latent_steps_are(model, processor, prompts, compiled, feedback):
    """Whatever the prompts' lengths: the graphs are those of the first answer."""
    for prompt in prompts[:3]:
        decode(model, encode(processor, prompt), new_tokens=14, reflect=True, latent_feedback=feedback, **compiled)
        assert graphs() == 2


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


def test_pipeline_answers_in_text(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device=model.device)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What?"}]
    kwargs = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "reflect": True}
    text = pipe(text=[{"role": "user", "content": content}], return_full_text=False, generate_kwargs=kwargs)
    inputs = encode(processor, ask("What?", picture(1)))
    expected = processor.batch_decode(decode(model, inputs, new_tokens=14, reflect=True), skip_special_tokens=True)
    assert text[0]["generated_text"] == expected[0]
