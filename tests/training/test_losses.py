import math
from types import SimpleNamespace

import pytest
import torch

from vreflection_training.losses import (
    attention_distillation_loss,
    bcm_alignment_loss,
    dac_distillation_loss,
    feature_distillation_loss,
    latent_losses,
    loss_weights,
    target_attention,
)
from vreflection_training.stages import SFT_STAGES, STAGES


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_alignment_gradient_of_eq_2_reaches_one_side_only():
    h, z = latents(2, 3, 4), latents(2, 3, 4, seed=1)
    sign = (h - z).sign() / (3 * 4 * 2)  # d mean|H - Z| / dH, mean over S and D and over two segments
    for states_learn, learner, frozen, expected in ((True, h, z, sign), (False, z, h, -sign)):
        learner.grad = frozen.grad = None
        loss = bcm_alignment_loss(h, z, states_learn=states_learn)
        assert loss.item() == pytest.approx((h - z).abs().mean().item())
        loss.backward()
        torch.testing.assert_close(learner.grad, expected)
        assert frozen.grad is None


@pytest.mark.parametrize("alignment, factor", [("joint", 1.0), ("symmetric", 0.5)])
def test_alignment_ablations_reach_both_sides(alignment, factor):
    h, z = latents(2, 3, 4), latents(2, 3, 4, seed=1)
    loss = bcm_alignment_loss(h, z, alignment=alignment)
    loss.backward()
    assert loss.item() == pytest.approx((h - z).abs().mean().item())
    torch.testing.assert_close(h.grad, factor * (h - z).sign() / 24)
    torch.testing.assert_close(z.grad, -factor * (h - z).sign() / 24)


def test_mse_gradient_is_twice_the_difference():
    s, t = latents(1, 2, 5), latents(1, 2, 5, seed=1)
    feature_distillation_loss(s, t, distance="mse").backward()
    torch.testing.assert_close(s.grad, 2 * (s - t).detach() / 10)
    assert t.grad is None


def test_feature_loss_of_a_constant_offset_is_the_offset():
    t = latents(3, 8, 6)
    assert feature_distillation_loss(t + 0.25, t).item() == pytest.approx(0.25, rel=1e-5)
    assert feature_distillation_loss(t + 0.25, t, distance="mse").item() == pytest.approx(0.0625, rel=1e-5)


def test_losses_are_summed_over_segments_and_divided_by_the_steps_segments():
    h, z = latents(3, 2, 4), latents(3, 2, 4, seed=1)
    each = [bcm_alignment_loss(h[i : i + 1], z[i : i + 1], num_segments=7) for i in range(3)]
    assert bcm_alignment_loss(h, z, num_segments=7).item() == pytest.approx(sum(each).item())
    assert bcm_alignment_loss(h, z).item() == pytest.approx(7 / 3 * sum(each).item())


def test_alignment_clamps_values_and_computes_in_float32():
    h = torch.full((1, 1, 2), 3e4, dtype=torch.bfloat16)
    loss = bcm_alignment_loss(h, torch.zeros(1, 1, 2, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32 and loss.item() == 1e4


def test_attention_loss_of_uniform_teacher_in_half_of_the_patches_is_log_2_a_step():
    teacher = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(1, 8, 4)
    student = torch.full((1, 8, 4), 0.25)
    assert attention_distillation_loss(student, teacher).item() == pytest.approx(8 * math.log(2), rel=1e-6)
    assert attention_distillation_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


def test_attention_loss_gradient_of_eq_4():
    teacher = torch.tensor([[[0.7, 0.2, 0.1]]], requires_grad=True)
    student = torch.tensor([[[0.2, 0.5, 0.3]]], requires_grad=True)
    attention_distillation_loss(student, teacher, epsilon=1e-3).backward()
    torch.testing.assert_close(student.grad, -teacher.detach() / (student.detach() + 1e-3))
    assert teacher.grad is None


def test_temperature_acts_as_softmax_of_the_divided_logits_and_leaves_padding_out():
    logits = torch.randn(2, 3, 5)
    teacher = torch.randn(2, 3, 5).softmax(-1)
    expected = attention_distillation_loss((logits / 2).softmax(-1), teacher)
    got = attention_distillation_loss(logits.softmax(-1), teacher, temperature=2.0)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    pad = torch.nn.functional.pad
    student = pad(logits.softmax(-1), (0, 3)).requires_grad_()
    padded = attention_distillation_loss(student, pad(teacher, (0, 3)), temperature=2.0)
    padded.backward()
    assert padded.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: bcm_alignment_loss(x, x, alignment="both"),
        lambda x: bcm_alignment_loss(x, x, distance="l2"),
        lambda x: attention_distillation_loss(x, x[:, :, :2]),
        lambda x: feature_distillation_loss(x, x[:, :1]),
    ],
)
def test_wrong_settings_raise(call):
    with pytest.raises(ValueError):
        call(torch.rand(1, 2, 4))


def test_eq_5_is_the_weighted_sum_of_its_terms():
    t = latents(2, 8, 6)
    teacher, student = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(2, 8, 4), torch.full((2, 8, 4), 0.25)
    weights = {"lambda_feat": 0.5, "lambda_attn": 2.0}
    loss, terms = dac_distillation_loss(t + 0.25, t, student, teacher, **weights)
    assert terms["L_feat"].item() == pytest.approx(0.25) and terms["L_attn"].item() == pytest.approx(8 * math.log(2))
    assert loss.item() == pytest.approx(0.5 * 0.25 + 2 * 8 * math.log(2))
    loss, terms = dac_distillation_loss(t, None, student, teacher, **weights)  # no BCM
    assert set(terms) == {"L_attn"} and loss.item() == pytest.approx(2 * 8 * math.log(2))


def test_the_target_box_is_uniform_over_the_patches_of_each_steps_box():
    inside = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]], dtype=torch.bool)
    teacher = torch.rand(1, 2, 5)
    outputs = SimpleNamespace(inside_box=inside, teacher_attention=teacher)
    expected = torch.tensor([[[0.5, 0.5, 0, 0, 0], [0, 0, 0, 1.0, 0]]])
    assert torch.equal(target_attention(outputs, "box"), expected) and target_attention(outputs) is teacher
    with pytest.raises(ValueError, match="must be one of teacher, box, got 'boxes'"):
        target_attention(outputs, "boxes")
    # A box of one patch weighs as much as one of two: the mean over the box of -log A_S, but for a constant.
    student = torch.tensor([[[0.2, 0.3, 0.5, 0, 0], [0.1, 0.1, 0.1, 0.4, 0.3]]])
    loss = attention_distillation_loss(student, expected, epsilon=1e-12)
    by_hand = -(math.log(0.2) + math.log(0.3)) / 2 + math.log(0.5) - math.log(0.4)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("stage", SFT_STAGES)
def test_a_stage_has_the_losses_of_its_line_in_the_table(stage):
    outputs = SimpleNamespace(
        latent_states=latents(2, 3, 4),
        teacher_latents=latents(2, 3, 4, seed=1),
        student_latents=latents(2, 3, 4, seed=2),
        teacher_attention=latents(2, 3, 5).softmax(-1),
        student_attention=latents(2, 3, 5, seed=1).softmax(-1),
    )
    lambdas = {"lambda_bcm": 0.3, "lambda_dac": 0.2, "lambda_feat": 0.7, "lambda_attn": 1.3}
    options = {"alignment": "stochastic", "bernoulli_p": 0.5, "latent_loss": "l1", "seed": 0}
    options |= {"attention_temperature": 1.0, "attention_epsilon": 1e-9, "attention_target": "teacher"}
    args = SimpleNamespace(stage=stage, **lambdas, **options)
    total, terms = latent_losses(outputs, args, global_step=0)
    assert tuple(terms) == STAGES[stage].losses == tuple(loss_weights(args))
    expected = sum(weight * terms[name].item() for name, weight in loss_weights(args).items())
    assert float(total) == pytest.approx(expected)
    assert loss_weights(args) == {
        name: pytest.approx({"L_BCM": 0.3, "L_feat": 0.14, "L_attn": 0.26}[name]) for name in STAGES[stage].losses
    }
