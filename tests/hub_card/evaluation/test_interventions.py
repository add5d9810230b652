"""Other latents than the model's own: what is fed is what was asked for, and decoding is the same otherwise."""

import pytest
import torch

from vreflection_hub_card.evaluation.interventions import INTERVENTIONS, first_latents, replace_latents


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


def test_only_the_first_complete_reflection_counts(tiny):
    config = tiny[0].config
    start, slot, end = config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id
    tokens = torch.tensor([[start, slot, slot, end, 0, start, slot, end], [0, 0, 0, 0, 0, start, slot, slot]])
    latents = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 4)
    first = first_latents(latents, tokens, config)
    assert list(first) == [0] and first[0][:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("latent_feedback", ["hidden", "dac"])
def test_latents_of_another_row_change_answers(tiny, inputs, latent_feedback):
    model, _ = tiny
    options = {
        "reflect": True,
        "max_new_tokens": 14,
        "latent_feedback": latent_feedback,
        "return_dict_in_generate": True,
    }
    usual = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    own = torch.stack(list(first_latents(usual.latents, usual.sequences[:, length:], model.config).values()))
    assert own.shape == (3, 8, model.config.text_config.hidden_size)
    others = own.roll(1, 0)
    changed = model.generate(**inputs, **options, latents=others)
    assert torch.equal(changed.latents, others)
    assert not torch.equal(changed.sequences, usual.sequences)


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
        "shuffled": others,
        "other_picture": others,
        "filler": slot.detach(),
        "first_look": torch.stack([latents[:, 0]] * 8, 1),
        "reversed": latents[:, [7, 6, 5, 4, 3, 2, 1, 0]],
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
