"""Other latents than the model's own: what is fed is what was asked for, and decoding is the same otherwise."""

import pytest
import torch

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS, first_latents, replace_latents
from vreflection_hub_card.inference.attention_maps import RecordedStep, recorded_steps


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


def generate_and_record(model, inputs, **options):
    """The sequences, and the latents that were fed, by row."""
    with recorded_steps(model) as steps:
        sequences = generate(model, inputs, **options)
    return sequences, first_latents(steps, sequences[:, inputs["input_ids"].shape[1] :], model.config)


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_fed_back_its_own_latents_change_nothing_and_others_arrive(tiny, inputs, latent_feedback):
    model, _ = tiny
    usual, latents = generate_and_record(model, inputs, latent_feedback=latent_feedback)
    latents = torch.stack([latents[row] for row in range(3)])
    assert latents.shape == (3, 8, model.config.text_config.hidden_size)
    with model.feeding(latents):
        assert torch.equal(generate(model, inputs, latent_feedback=latent_feedback), usual)
    others = latents.roll(1, 0)
    with recorded_steps(model) as steps, model.feeding(others):
        changed = generate(model, inputs, latent_feedback=latent_feedback)
    # Step 0 is the prompt, step 1 the opening token, then eight slots.
    assert torch.equal(torch.cat([step.embeds for step in steps[2:10]], 1), others)
    assert not torch.equal(changed, usual)
    assert torch.equal(generate(model, inputs, latent_feedback=latent_feedback), usual)


def test_only_rows_in_a_reflection_are_recorded_and_fed(tiny, inputs):
    model, _ = tiny

    def open_in(*rows):
        def processor(input_ids, scores):
            if input_ids.shape[1] == inputs["input_ids"].shape[1]:
                scores[list(rows)] = float("-inf")
                scores[list(rows), model.config.latent_start_token_id] = 0
            return scores

        return {"logits_processor": [processor], "reflect": None}

    usual, latents = generate_and_record(model, inputs, **open_in(0, 2))
    assert {row: len(one) for row, one in latents.items()} == {0: 8, 2: 8}
    with model.feeding(torch.zeros(3, *latents[0].shape)):
        zeroed = generate(model, inputs, **open_in(0, 2))
    assert torch.equal(zeroed[1], usual[1])


def test_only_the_first_complete_reflection_counts(tiny):
    config = tiny[0].config
    start, slot, end = config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id
    tokens = torch.tensor([[start, slot, slot, end, 0, start, slot, end], [0, 0, 0, 0, 0, start, slot, slot]])
    # Step i is fed token i - 1; here each is the number of its step.
    steps = [RecordedStep(torch.full((2, 1, 4), float(index)), None, None) for index in range(9)]
    latents = first_latents(steps, tokens, config)
    assert list(latents) == [0] and latents[0][:, 0].tolist() == [2, 3]


def test_an_error_ends_the_feeding_too(tiny, inputs):
    model, _ = tiny
    usual = generate(model, inputs)
    with pytest.raises(ValueError), model.feeding(torch.zeros(3, 8, usual.shape[0])):
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
