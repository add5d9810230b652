"""The parts of the chains' evaluation that need no model."""

from types import SimpleNamespace

import pytest
import torch

from experiments.chains.evaluate import REPLACEMENTS, Evaluation, replace_all


LATENTS = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4) + 1


def replaced(name: str, latents: torch.Tensor = LATENTS) -> torch.Tensor:
    before = latents.clone()
    found = replace_all(name, latents, torch.Generator().manual_seed(0))
    assert found.shape == latents.shape and torch.equal(latents, before)
    return found


def test_replacements():
    assert not replaced("zeroed").any()
    assert replaced("shuffled")[0].tolist() == LATENTS[1].tolist()
    assert replaced("shuffled")[1].tolist() == LATENTS[0].tolist()
    for row, own in zip(replaced("first_look"), LATENTS):
        assert row.tolist() == 3 * [own[0].tolist()]
    for row, own in zip(replaced("reversed"), LATENTS):
        assert row.tolist() == [own[2].tolist(), own[1].tolist(), own[0].tolist()]


def test_noise_has_the_latents_norms_and_no_more():
    latents = LATENTS.repeat(1, 1, 64)
    noise = replaced("noise", latents)
    torch.testing.assert_close(noise.norm(dim=-1), latents.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(noise, latents, dim=-1).abs().max() < 0.3
    assert torch.equal(noise, replaced("noise", latents))


def test_shuffled_latents_are_another_scenes(chains):
    """Rows of one scene stand together: half of all rows further on is another scene."""
    scenes = torch.tensor([example.scene for group in chains.examples for example in group])
    fed = replaced("shuffled", scenes[:, None, None].expand(-1, 8, 4).float())
    assert (fed[:, 0, 0] != scenes).all()


def test_unknown_replacement():
    with pytest.raises(ValueError, match="'ones'.*" + ", ".join(REPLACEMENTS)):
        replace_all("ones", LATENTS, torch.Generator())


def test_counts_by_kind_and_hops():
    evaluation = SimpleNamespace(
        examples=[
            SimpleNamespace(kind=kind, hops=hops)
            for kind, hops in (("kinship", 0), ("kinship", 3), ("attribute", 0), ("kinship", 3))
        ]
    )
    assert Evaluation.by_kind(evaluation, [True, False, 12, True]) == {
        "kinship": {"0": [1, 1], "3": [1, 2]},
        "attribute": {"0": [12, 1]},
    }
    with pytest.raises(ValueError, match="shorter"):
        Evaluation.by_kind(evaluation, [True])
