"""Other latents than the model's own: what is fed is what was asked for, and decoding is the same otherwise."""

import pytest
import torch

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS, replace_latents
from vreflection_hub_card.inference.attention_maps import recorded_steps


@pytest.fixture
def inputs(tiny, conversations):
    return tiny[1].apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"reflect": True, "max_new_tokens": 14} | options)


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_latents_are_recorded_as_they_are_fed(tiny, inputs, latent_feedback):
    model, _ = tiny
    with recorded_steps(model) as steps, model.recording() as record:
        generate(model, inputs, latent_feedback=latent_feedback)
    assert record.steps.tolist() == [8] * 3
    # Step 0 is the prompt, step 1 the opening token, then eight slots.
    fed = torch.cat([step.embeds for step in steps[2:10]], 1)
    torch.testing.assert_close(record.latents, fed, rtol=0, atol=0)


def test_fed_back_its_own_latents_change_nothing_and_others_arrive(tiny, inputs):
    model, _ = tiny
    with model.recording() as record:
        usual = generate(model, inputs)
    with model.feeding(record.latents):
        assert torch.equal(generate(model, inputs), usual)
    others = record.latents.roll(1, 0)
    with recorded_steps(model) as steps, model.feeding(others):
        changed = generate(model, inputs)
    assert torch.equal(torch.cat([step.embeds for step in steps[2:10]], 1), others)
    assert not torch.equal(changed, usual)
    assert torch.equal(generate(model, inputs), usual)


def test_only_rows_in_a_reflection_are_recorded_and_fed(tiny, inputs):
    model, _ = tiny

    def open_in(*rows):
        def processor(input_ids, scores):
            if input_ids.shape[1] == inputs["input_ids"].shape[1]:
                scores[list(rows)] = float("-inf")
                scores[list(rows), model.config.latent_start_token_id] = 0
            return scores

        return {"logits_processor": [processor], "reflect": None}

    with model.recording() as record:
        usual = generate(model, inputs, **open_in(0, 2))
    assert record.steps.tolist() == [8, 0, 8] and not record.latents[1].any()
    with model.feeding(torch.zeros_like(record.latents)):
        zeroed = generate(model, inputs, **open_in(0, 2))
    assert torch.equal(zeroed[1], usual[1])


def test_an_error_ends_them_too(tiny, inputs):
    model, _ = tiny
    usual = generate(model, inputs)
    with pytest.raises(ValueError), model.feeding(torch.zeros(3, 8, usual.shape[0])), model.recording():
        generate(model, inputs, latent_steps=0)
    assert torch.equal(generate(model, inputs), usual)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_what_is_fed_instead(tiny, name):
    model, _ = tiny
    size = model.config.text_config.hidden_size
    latents, others = torch.randn(2, 3, 8, size, generator=torch.Generator().manual_seed(1))
    replaced = replace_latents(name, latents, model, others, torch.Generator().manual_seed(2))
    assert replaced.shape == latents.shape
    slot = model.get_input_embeddings().weight[model.config.latent_token_id]
    expected = {
        "zeroed": torch.zeros(()),
        "shuffled": latents[[2, 0, 1]],
        "other_picture": others,
        "filler": slot.detach(),
    }
    if name in expected:
        assert torch.equal(replaced, expected[name].expand_as(latents))
    else:
        torch.testing.assert_close(replaced.norm(dim=-1), latents.norm(dim=-1))
        cosine = torch.nn.functional.cosine_similarity(replaced, latents, dim=-1)
        assert cosine.abs().max() < 0.7


def test_an_unknown_intervention(tiny):
    with pytest.raises(ValueError, match="'erased'; choose one of zeroed"):
        replace_latents("erased", torch.zeros(1, 1, 1), tiny[0], torch.zeros(1, 1, 1), torch.Generator())
