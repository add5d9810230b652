"""BCM, DAC, region pooling and the projection of attention, against closed forms and torch's own attention."""

import random
from fractions import Fraction

import pytest
import torch
from randomise import randomise
from reference import attend, patches_inside

from modeling_vreflection import VReflectionConfig, regions_vreflection
from modeling_vreflection.compression_vreflection import (
    BoxGuidedCompression,
    DynamicAutoregressiveCompression,
    pad_features,
)
from modeling_vreflection.modeling_vreflection import VReflectionModel
from modeling_vreflection.regions_vreflection import (
    BOX_UNIT,
    box_patches,
    pool_region,
    project_attention,
    quantise_box,
)


D, STEPS, HEADS = 48, 5, 4
BOXES = [[0.1, 0.2, 0.55, 0.7], [0.0, 0.0, 1.0, 1.0], [0.41, 0.73, 0.43, 0.75], [0.5, 0.5, 1.0, 0.6]]
POOLINGS = ["patch", "roi_align"]


@pytest.fixture(scope="module")
def bcm():
    module = BoxGuidedCompression(D, HEADS, STEPS)
    randomise(module, 1)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def dac():
    module = DynamicAutoregressiveCompression(D, HEADS, STEPS)
    randomise(module, 2)
    return module.requires_grad_(False)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, D, generator=generator) for count in (7, 1, 12)]


def test_bcm_is_multi_head_attention_and_layer_norm(bcm, features):
    padded, mask = pad_features(features)
    latents, attention = bcm(padded, mask)
    queries = bcm.queries.expand(len(features), -1, -1)
    expected, weights = attend(bcm, queries, padded, key_padding_mask=~mask)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(attention, weights)
    assert attention.std() > 0.05, "even attention would show little"


def test_dac_is_multi_head_attention_and_layer_norm(dac, features):
    padded, mask = pad_features(features)
    states = torch.randn(len(features), STEPS + 2, D, generator=torch.Generator().manual_seed(1))
    latents, attention = dac(states, padded, mask)
    expected, weights = attend(dac, states, padded, key_padding_mask=~mask)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(attention, weights)


def test_padding_never_leaks(bcm, dac, features):
    padded, mask = pad_features(features)
    assert mask.sum(1).tolist() == [7, 1, 12]
    poisoned = torch.where(mask[..., None], padded, 1e4)
    states = torch.randn(len(features), STEPS, D, generator=torch.Generator().manual_seed(1))
    for module, inputs in ((bcm, ()), (dac, (states,))):
        latents, attention = module(*inputs, poisoned, mask)
        assert (attention.masked_select(~mask[:, None].expand_as(attention)) == 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, STEPS))
        for index, alone in enumerate(features):
            one = [each[index : index + 1] for each in inputs]
            latent, weights = module(*one, alone[None], torch.ones(1, len(alone), dtype=torch.bool))
            torch.testing.assert_close(latents[index], latent[0])
            torch.testing.assert_close(attention[index, :, : len(alone)], weights[0])


def test_softmax_runs_in_float32(bcm, features):
    """For bfloat16 modules: rows that sum to one far more exactly than bfloat16 can, and the mean kept in float32."""
    module = BoxGuidedCompression(D, HEADS, STEPS).to(torch.bfloat16)
    module.load_state_dict(bcm.state_dict())
    padded, mask = pad_features(features)
    latents, attention = module(padded.to(torch.bfloat16), mask)
    assert latents.dtype == torch.bfloat16 and attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, STEPS), atol=1e-6, rtol=0)
    assert (attention.to(torch.bfloat16).float() != attention).any()
    torch.testing.assert_close(latents.float(), bcm(padded, mask)[0], atol=0.15, rtol=0.1)


def test_static_and_random_queries_ignore_the_states(features):
    padded, mask = pad_features(features)
    states = torch.randn(len(features), STEPS, D)
    static = DynamicAutoregressiveCompression(D, HEADS, STEPS, "static")
    randomise(static, 3)
    expected, _ = attend(static, static.queries.expand(len(features), -1, -1), padded, key_padding_mask=~mask)
    torch.testing.assert_close(static(states, padded, mask)[0], expected)
    with pytest.raises(ValueError, match="5 static queries.*4 steps"):
        static(states[:, 1:], padded, mask)
    drawn = DynamicAutoregressiveCompression(D, HEADS, STEPS, "random")
    randomise(drawn, 3)
    torch.manual_seed(0)
    first = drawn(states, padded, mask)[0]
    assert not torch.allclose(first, drawn(states, padded, mask)[0])
    torch.manual_seed(0)
    torch.testing.assert_close(first, drawn(states + 1, padded, mask)[0])


def test_a_module_is_trained_once_an_optimiser_stepped(bcm):
    module = DynamicAutoregressiveCompression(D, HEADS, STEPS)
    assert not module.is_trained
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5)
    latents, _ = module(torch.randn(1, STEPS, D), torch.randn(1, 3, D), torch.ones(1, 3, dtype=torch.bool))
    latents.square().sum().backward()
    optimiser.step()
    assert module.is_trained and bcm.is_trained


def test_both_modules_hold_the_papers_parameters():
    """102.83 M at the size of the 7B, Tab. 3 (e)."""
    config = VReflectionConfig(
        text_config={"hidden_size": 3584, "num_hidden_layers": 1, "num_attention_heads": 28, "num_key_value_heads": 4},
        vision_config={"depth": 1, "out_hidden_size": 3584, "fullatt_block_indexes": [0]},
    )
    with torch.device("meta"):
        model = VReflectionModel(config)
    count = sum(parameter.numel() for module in (model.bcm, model.dac) for parameter in module.parameters())
    assert count == pytest.approx(102.83e6, rel=1e-3)
    assert count == 2 * (4 * (3584**2 + 3584) + 2 * 3584) + 8 * 3584


# Boxes


@pytest.mark.parametrize("grid", [(3, 3), (6, 6), (7, 7), (3, 7), (6, 4), (1, 5)])
def test_a_box_on_the_grid_selects_its_patches_and_no_others(grid):
    height, width = grid
    for top in range(height):
        for bottom in range(top + 1, height + 1):
            for left in range(width):
                for right in range(left + 1, width + 1):
                    box = quantise_box([left / width, top / height, right / width, bottom / height])
                    expected = [row * width + column for row in range(top, bottom) for column in range(left, right)]
                    assert box_patches(box, grid).tolist() == expected


def test_any_box_selects_what_it_overlaps():
    """Tried patch by patch, in exact arithmetic."""
    rng = random.Random(0)
    for _ in range(500):
        grid = (rng.randint(1, 9), rng.randint(1, 9))
        (x0, x1), (y0, y1) = (sorted(rng.sample(range(BOX_UNIT + 1), 2)) for _ in "xy")
        exact = [Fraction(corner, BOX_UNIT) for corner in (x0, y0, x1, y1)]
        assert box_patches([x0, y0, x1, y1], grid).tolist() == patches_inside(exact, grid)


def test_random_boxes_equal_floor_and_ceiling_of_floats():
    rng = random.Random(1)
    for _ in range(500):
        grid = (rng.randint(1, 9), rng.randint(1, 9))
        (x0, x1), (y0, y1) = (sorted((rng.random(), rng.random())) for _ in "xy")
        assert box_patches(quantise_box([x0, y0, x1, y1]), grid).tolist() == patches_inside([x0, y0, x1, y1], grid)


@pytest.mark.parametrize(
    ("box", "patch"),
    [
        ([0.4, 0.4, 0.41, 0.41], 4),
        ([0.0, 0.0, 1e-9, 1e-9], 0),
        ([1 - 1e-9, 1 - 1e-9, 1.0, 1.0], 8),
        ([0.5, 1 - 1e-9, 0.5 + 1e-9, 1.0], 7),
    ],
)
def test_a_box_smaller_than_a_patch_selects_one(box, patch):
    assert box_patches(quantise_box(box), (3, 3)).tolist() == [patch]


def test_the_whole_image_selects_every_patch():
    assert box_patches(quantise_box([0, 0, 1, 1]), (5, 7)).tolist() == list(range(35))


def test_patch_pooling_takes_features_as_they_are():
    features = torch.randn(12, D)
    pooled = pool_region(features, quantise_box([0.25, 1 / 3, 0.75, 1.0]), (3, 4), "patch")
    assert torch.equal(pooled, features[[5, 6, 9, 10]])


@pytest.mark.parametrize("box", BOXES)
def test_roi_align_of_a_constant_map_is_that_constant(box):
    pooled = pool_region(torch.full((30, 2), 3.5), quantise_box(box), (5, 6), "roi_align")
    assert pooled.shape == (49, 2)
    torch.testing.assert_close(pooled, torch.full((49, 2), 3.5))


def test_roi_align_of_a_ramp_is_its_value_at_the_bins_centres():
    """Away from the border, bilinear sampling of a linear map is exact; patch centres lie at (i + 1/2) / w."""
    height, width = 8, 10
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = torch.stack([(column + 0.5) / width, (row + 0.5) / height], -1).flatten(0, 1)
    box = [0.125, 0.25, 0.625, 0.75]
    pooled = pool_region(ramp, quantise_box(box), (height, width), "roi_align").view(7, 7, 2)
    centres = (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(pooled[..., 0], (box[0] + centres * (box[2] - box[0])).expand(7, 7))
    torch.testing.assert_close(pooled[..., 1], (box[1] + centres * (box[3] - box[1]))[:, None].expand(7, 7))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("box", BOXES)
def test_projected_attention_sums_to_one(box, pooling):
    box, grid = quantise_box(box), (5, 6)
    count = len(box_patches(box, grid)) if pooling == "patch" else 49
    attention = torch.randn(STEPS, count, requires_grad=True).softmax(-1)
    projected = project_attention(attention, box, grid, pooling)
    assert projected.shape == (STEPS, 30) and not projected.requires_grad
    torch.testing.assert_close(projected.sum(-1), torch.ones(STEPS))
    assert (projected >= 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_projection_works_without_gradients(pooling):
    box, grid = quantise_box(BOXES[0]), (5, 6)
    count = len(box_patches(box, grid)) if pooling == "patch" else 49
    with torch.no_grad():
        projected = project_attention(torch.full((STEPS, count), 1 / count), box, grid, pooling)
    torch.testing.assert_close(projected.sum(-1), torch.ones(STEPS))


def test_patch_projection_is_a_scatter():
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    projected = project_attention(attention, quantise_box([0.25, 1 / 3, 0.75, 1.0]), (3, 4), "patch")
    expected = torch.zeros(2, 12)
    expected[:, [5, 6, 9, 10]] = attention
    assert torch.equal(projected, expected)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("box", BOXES)
def test_projection_is_the_adjoint_of_pooling(box, pooling):
    """<R x, a> = <x, R' a> for every map x and attention a."""
    box, grid = quantise_box(box), (5, 6)
    features = torch.randn(30, 3)
    pooled = pool_region(features, box, grid, pooling)
    attention = torch.randn(STEPS, len(pooled))
    projected = project_attention(attention, box, grid, pooling)
    torch.testing.assert_close(attention @ pooled, projected @ features, atol=1e-4, rtol=1e-4)


def test_roi_align_keeps_the_dtype_and_carries_gradients():
    features = torch.randn(30, 3, dtype=torch.bfloat16, requires_grad=True)
    pooled = pool_region(features, quantise_box(BOXES[0]), (5, 6), "roi_align")
    assert pooled.dtype == torch.bfloat16
    pooled.float().sum().backward()
    assert features.grad.float().sum().item() == pytest.approx(49 * 3, rel=0.02)


def test_missing_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setattr(regions_vreflection, "roi_align", None)
    with pytest.raises(ImportError, match="region_pooling.*pip install torchvision"):
        pool_region(torch.randn(30, 3), quantise_box(BOXES[0]), (5, 6), "roi_align")
    assert len(pool_region(torch.randn(30, 3), quantise_box(BOXES[1]), (5, 6), "patch")) == 30


def test_scores_of_large_states_stay_finite_in_half_precision():
    """Heads as wide as the 7B's."""
    torch.manual_seed(0)
    dac = DynamicAutoregressiveCompression(3584, 8, 1)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(dac, name).weight.copy_(0.02 * torch.randn(3584, 3584))
        dac.k_proj.weight.copy_(dac.q_proj.weight)
    features = 10 * torch.randn(1, 2, 3584)
    latents, attention = dac.half()(1.1 * features[:, :1].half(), features.half(), torch.ones(1, 2, dtype=torch.bool))
    assert latents.isfinite().all() and attention.isfinite().all()
