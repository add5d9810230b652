"""What is said about attention and latents: against definitions computed the long way."""

import re
from dataclasses import fields
from itertools import permutations

import pytest
import torch

from vreflection_training import VReflectionSFTConfig
from vreflection_training.run.latent_metrics import (
    COLLAPSE_THRESHOLD,
    LatentSpread,
    attention_inside,
    collapse_message,
)


def spread(*batches):
    gathered = LatentSpread(*batches[0].shape[1:])
    for batch in batches:
        gathered.add(batch)
    return gathered.value()


def spread_by_pairs(latents):
    """The definition: one minus the mean inner product of all pairs over the mean square, averaged over the steps."""
    latents = latents.double()
    shares = []
    for step in range(latents.shape[1]):
        h = latents[:, step]
        products = [float(h[i] @ h[j]) for i, j in permutations(range(len(h)), 2)]
        shares.append(1 - sum(products) / len(products) / float(h.square().sum(1).mean()))
    return (sum(shares) / len(shares)) ** 0.5


def test_attention_inside_is_each_steps_share_on_its_own_box():
    torch.manual_seed(0)
    attention = torch.rand(3, 4, 10)
    inside = torch.rand(3, 4, 10) < 0.4
    inside[2] = False
    expected = [
        sum(attention[g, s, patch].item() for s in range(4) for patch in range(10) if inside[g, s, patch]) / 4
        for g in range(3)
    ]
    assert attention_inside(attention, inside).tolist() == pytest.approx(expected)
    assert expected[2] == 0 < expected[0]


def test_even_attention_falls_inside_by_area():
    attention = torch.full((1, 3, 48), 1 / 48)
    half = torch.zeros(1, 3, 48, dtype=torch.bool)
    half[..., :24] = True
    assert attention_inside(attention, half).item() == pytest.approx(0.5)
    inside = attention_inside(attention.bfloat16().requires_grad_(), torch.ones_like(half))
    assert inside.item() == pytest.approx(1, abs=2e-3)
    assert inside.dtype == torch.float32 and not inside.requires_grad


@pytest.mark.parametrize("count", [2, 3, 12])
def test_spread_is_what_its_definition_says(count):
    torch.manual_seed(0)
    latents = torch.randn(count, 3, 5) + 2 * torch.randn(3, 5)
    latents[:, 0] *= 1000  # a step with large latents counts like any other
    assert spread(latents) == pytest.approx(spread_by_pairs(latents), rel=1e-9)


def test_the_ends_of_the_scale():
    torch.manual_seed(0)
    one = torch.randn(1, 8, 192)
    assert spread(one.expand(9, -1, -1)) == pytest.approx(0, abs=1e-7)
    assert spread(torch.zeros(9, 8, 192)) == 0
    for count in (2, 50):  # unrelated latents: one, not one by the number of samples
        values = [spread(torch.randn(count, 8, 192)) for _ in range(10)]
        assert sum(values) / 10 == pytest.approx(1, abs=0.01)


def test_differences_between_the_steps_of_a_sample_are_no_spread():
    steps = torch.randn(8, 16)
    assert spread(torch.stack([steps] * 4)) == pytest.approx(0, abs=1e-7)


def test_scale_and_batches_do_not_matter():
    torch.manual_seed(0)
    latents = torch.randn(12, 8, 32) + 1
    whole = spread(latents)
    assert spread(latents * 1e-3) == pytest.approx(whole, rel=1e-6)
    assert spread(*latents.split(1)) == pytest.approx(whole, rel=1e-12)
    assert spread(latents[:0], *latents.split([4, 3, 5])) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 512])
def test_tiny_differences_of_large_latents_are_seen(batch):
    torch.manual_seed(0)
    latents = (1e3 + 1e-3 * torch.randn(512, 2, 64, dtype=torch.float64)).float()
    exact = latents.double()
    deviations = exact - exact.mean(0)  # in two passes, which cancel nothing
    shares = deviations.square().sum((0, 2)) / 511 / exact.square().sum(2).mean(0)
    assert spread(*latents.split(batch)) == pytest.approx(shares.mean().sqrt().item(), rel=2e-3)


def test_ranks_add_up():
    torch.manual_seed(0)
    latents = torch.randn(6, 2, 4) + 1
    ranks = [LatentSpread(2, 4) for _ in range(3)]
    ranks[0].add(latents[:1])
    ranks[1].add(latents[1:])  # the third rank saw no reflection
    sums = [rank.sums for rank in ranks]
    assert {(each.dtype, each.shape) for each in sums} == {(torch.float64, sums[0].shape)}
    assert sums[0].ndim == 1
    for rank in ranks:
        assert rank.value(sum(sums)) == pytest.approx(spread(latents), rel=1e-12)


def test_one_sample_has_no_spread():
    assert LatentSpread(2, 4).value() is None
    assert spread(torch.randn(1, 2, 4)) is None
    assert spread(torch.randn(1, 2, 4), torch.randn(1, 2, 4)) is not None


def test_latents_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(G, 2, 4\)"):
        LatentSpread(2, 4).add(torch.zeros(3, 1, 4))


def test_latents_keep_no_graph():
    latents = torch.randn(3, 2, 4, requires_grad=True)
    gathered = LatentSpread(2, 4)
    gathered.add(latents)
    assert not gathered.sums.requires_grad


def test_collapse_is_told_with_its_number_and_options_that_exist():
    assert collapse_message(None, 3) is None
    assert collapse_message(COLLAPSE_THRESHOLD, 3) is None
    message = collapse_message(0.0123, 1234)
    assert "1234" in message and "0.012" in message
    options = {name for quoted in re.findall("`(.*?)`", message) for name in [quoted.split("=")[0]]}
    assert len(options) >= 3
    assert options <= {field.name for field in fields(VReflectionSFTConfig)}
