"""The maps are those of the decoding itself, by two independent ways of computing them."""

import pytest
import torch

from vreflection_hub_card.errors import InputError
from vreflection_hub_card.inference.attention_maps import generate_and_look, recorded_steps
from vreflection_hub_card.inference.checkpoints import load_checkpoint
from vreflection_hub_card.inference.encoding import encode_prompts
from vreflection_hub_card.inference.look import look


def flat(maps):
    return torch.cat([one.flatten(1) for one in maps], 1)


@pytest.mark.parametrize("index", [0, 1])
def test_states_and_dac_maps_are_those_of_one_pass_over_the_sequence(tiny, conversations, index):
    model, processor = tiny
    inputs = encode_prompts(processor, [conversations[index]], "cpu")
    with recorded_steps(model) as steps:
        tokens, _, reflections = generate_and_look(model, inputs, ("dac",), reflect=True, max_new_tokens=12)
    extra = torch.zeros_like(tokens)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], extra + 1], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], extra], 1)
    with torch.no_grad():
        outputs = model(**inputs, latent_inputs="hidden")
    torch.testing.assert_close(torch.cat([step.state for step in steps[1:9]], 1), outputs.latent_states)
    maps = reflections[0][0].maps["dac"]
    torch.testing.assert_close(flat(maps), outputs.student_attention[0])
    torch.testing.assert_close(flat(maps).sum(1), torch.ones(8))


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_llm_maps_are_the_attention_of_an_eager_decoding(tiny, tiny_folder, conversations, latent_feedback):
    model, processor = tiny
    inputs = encode_prompts(processor, conversations, "cpu")
    options = {"reflect": True, "latent_feedback": latent_feedback, "max_new_tokens": 12}
    tokens, _, reflections = generate_and_look(model, inputs, ("llm",), **options)

    eager, _ = load_checkpoint(tiny_folder, "cpu")
    eager.set_attn_implementation("eager")
    output = eager.generate(**inputs, **options, output_attentions=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, length:], tokens)
    for row, is_image in enumerate(inputs["input_ids"] == model.config.image_token_id):
        # The first slot is the second new token, so it is the input of the third step.
        expected = [
            torch.stack([layer[row, :, -1, :length][:, is_image] for layer in step]).mean((0, 1))
            for step in output.attentions[2:10]
        ]
        torch.testing.assert_close(flat(reflections[row][0].maps["llm"]), torch.stack(expected))
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_a_batch_gives_the_maps_of_single_runs(tiny, conversations, latent_feedback):
    model, processor = tiny
    options = {"reflect": True, "latent_feedback": latent_feedback, "latent_steps": 5, "max_new_tokens": 9}
    *_, batch = generate_and_look(model, encode_prompts(processor, conversations, "cpu"), **options)
    for conversation, (together,) in zip(conversations, batch):
        (alone,) = look(model, processor, conversation, **options).reflections
        assert alone.steps == together.steps == 5
        for source in ("dac", "llm"):
            for a, b in zip(alone.maps[source], together.maps[source], strict=True):
                torch.testing.assert_close(a, b)


def test_every_reflection_of_an_answer_is_found_in_its_order(tiny, conversations):
    """A row that reflects twice, beside one that reflects once and later."""
    model, processor = tiny
    inputs = encode_prompts(processor, conversations[:2], "cpu")
    length, start = inputs["input_ids"].shape[1], model.config.latent_start_token_id

    def open_reflections(input_ids, scores):
        for row, when in ((0, length), (0, length + 7), (1, length + 4)):
            if input_ids.shape[1] == when:
                scores[row] = torch.full_like(scores[row], float("-inf"))
                scores[row, start] = 0
        return scores

    options = {"latent_steps": 3, "max_new_tokens": 16, "logits_processor": [open_reflections]}
    *_, reflections = generate_and_look(model, inputs, **options)
    assert [len(row) for row in reflections] == [2, 1]

    eager = model.__class__.generate
    model.set_attn_implementation("eager")
    try:
        output = eager(model, **inputs, **options, output_attentions=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation("sdpa")
    is_image = inputs["input_ids"] == model.config.image_token_id
    for row, number, first_step in ((0, 0, 2), (0, 1, 9), (1, 0, 6)):
        expected = [
            torch.stack([layer[row, :, -1, :length][:, is_image[row]] for layer in step]).mean((0, 1))
            for step in output.attentions[first_step : first_step + 3]
        ]
        torch.testing.assert_close(flat(reflections[row][number].maps["llm"]), torch.stack(expected))


def test_maps_have_the_shape_of_each_pictures_grid(tiny, conversations):
    (reflection,) = look(*tiny, conversations[1], reflect=True, max_new_tokens=12).reflections
    for source in ("dac", "llm"):
        assert [tuple(one.shape) for one in reflection.maps[source]] == [(8, 6, 6), (8, 3, 5)]
    assert 0 < flat(reflection.maps["llm"]).sum(1).max() < 1


@pytest.mark.parametrize("positions", ["none", "sincos"])
def test_a_reflection_without_a_picture_has_no_maps(tiny, monkeypatch, positions):
    monkeypatch.setattr(tiny[0].config, "patch_positions", positions)
    question = [{"role": "user", "content": [{"type": "text", "text": "Which glyph?"}]}]
    (reflection,) = look(*tiny, question, reflect=True, max_new_tokens=12).reflections
    assert reflection.steps == 8 and reflection.maps == {"dac": [], "llm": []}


def test_without_a_reflection_there_are_no_maps(tiny, conversations):
    assert look(*tiny, conversations[0], reflect=False, max_new_tokens=4).reflections == []


def test_a_cut_reflection_is_left_out(tiny, conversations):
    inputs = encode_prompts(tiny[1], conversations[:1], "cpu")
    length, start = inputs["input_ids"].shape[1], tiny[0].config.latent_start_token_id

    def open_late(input_ids, scores):
        if input_ids.shape[1] == length + 2:
            scores[:] = float("-inf")
            scores[:, start] = 0
        return scores

    with pytest.warns(UserWarning, match="ended within the reflection"):
        *_, reflections = generate_and_look(tiny[0], inputs, logits_processor=[open_late], max_new_tokens=8)
    assert reflections == [[]]


def test_states_at_the_slots_query_dac_where_the_checkpoint_says_so(tiny, conversations, monkeypatch):
    model, processor = tiny
    before = look(model, processor, conversations[0], ("dac",), reflect=True, max_new_tokens=12).reflections[0]
    monkeypatch.setattr(model.config, "query_position", "at")
    at = look(model, processor, conversations[0], ("dac",), reflect=True, max_new_tokens=12).reflections[0]
    torch.testing.assert_close(at.maps["dac"][0][:-1], before.maps["dac"][0][1:])


def test_without_dac_its_attention_is_refused(no_dac_folder, conversations):
    model, processor = load_checkpoint(no_dac_folder, "cpu")
    with pytest.raises(InputError, match="no DAC"):
        look(model, processor, conversations[0], reflect=True)
    (reflection,) = look(model, processor, conversations[0], ("llm",), reflect=True, max_new_tokens=12).reflections
    assert list(reflection.maps) == ["llm"]
