"""What `generate` refuses, and what it warns of."""

import warnings

import pytest
import torch
from generation_helpers import decode
from reference import answer, ask, encode
from transformers import GenerationConfig

from modeling_vreflection.generation_vreflection import CACHE


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


def test_code_of_a_repository_is_refused(model, one):
    with pytest.raises(ValueError, match="`custom_generate` of a repository"):
        model.generate(**one, custom_generate="a/repository")


@pytest.mark.parametrize("stops", ["|", ["no", "vrt"], "><", "\n<"])
def test_stop_strings_that_end_a_reflection_are_refused(model, processor, one, stops):
    names = processor.tokenizer.convert_ids_to_tokens(model.config.latent_token_ids)
    stops = [names[0][2:5], "no"] if isinstance(stops, list) else stops
    options = {"stop_strings": stops, "tokenizer": processor.tokenizer, "max_new_tokens": 12}
    for given in (options, {**options, "stop_strings": None, "generation_config": GenerationConfig(**options)}):
        with pytest.raises(ValueError, match="ends within a reflection's tokens"):
            model.generate(**one, **given)
    model.generation_config.stop_strings = stops
    try:
        with pytest.raises(ValueError, match="ends within a reflection's tokens"):
            model.generate(**one, **{**options, "stop_strings": None}, generation_config=GenerationConfig())
    finally:
        model.generation_config.stop_strings = None
    model.generate(**one, **options, latent_steps=0)
    model.generate(**one, **{**options, "stop_strings": "zzz"})


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
    assert [warning.filename for warning in caught] == [decode.__code__.co_filename], "points at the caller's line"


def test_a_whole_reflection_does_not_warn(model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        decode(model, batch, [{0}, {2}, {1}, set()], 12)


def test_a_model_without_latent_tokens_says_so(make_model, processor):
    model = make_model()
    model.config.latent_token_id = None
    with pytest.raises(ValueError, match="no latent tokens: make it with `from_backbone`"):
        model.generate(**encode(processor, ask("Q")))
