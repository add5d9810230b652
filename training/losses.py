"""Eq. 2, 4 and 5 as functions of tensors: float32 inside, summed over segments, divided by `num_segments`.

Symbols in shapes: G segments, S latent steps, D hidden size, L merged patches.
"""

import math
import random

import torch

from .stages import LOSS_WEIGHTS, STAGES


CLAMP = 1e4
ALIGNMENTS = ("stochastic", "symmetric", "joint")
DISTANCES = ("l1", "mse")
ATTENTION_TARGETS = ("teacher", "box")


def latent_distance(
    prediction: torch.Tensor,
    target: torch.Tensor,
    distance: str = "l1",
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance over S and D, summed over segments, divided by `num_segments` (or by G, if `None`)."""
    if distance not in DISTANCES:
        raise ValueError(f"`distance` must be one of {', '.join(DISTANCES)}, got {distance!r}.")
    if prediction.shape != target.shape:
        raise ValueError(f"Latents of shapes {tuple(prediction.shape)} and {tuple(target.shape)} can't be compared.")
    difference = prediction.float() - target.float()
    per_element = difference.abs() if distance == "l1" else difference.square()
    return per_element.mean((1, 2)).sum() / (len(prediction) if num_segments is None else num_segments)


def states_learn(seed: int, global_step: int, probability: float) -> bool:
    """The Bernoulli draw of Eq. 2: the same on every rank, for every micro-batch of a step, and after a resume."""
    return random.Random(f"{seed} {global_step}").random() < probability


def bcm_alignment_loss(
    latent_states: torch.Tensor,
    teacher_latents: torch.Tensor,
    *,
    states_learn: bool = True,
    alignment: str = "stochastic",
    distance: str = "l1",
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 2, L_BCM: pulls the states and the teacher's latents together, one side at a time.

    Args:
        latent_states (`torch.Tensor` of shape `(G, S, D)`): H.
        teacher_latents (`torch.Tensor` of shape `(G, S, D)`): Z_T.
        states_learn (`bool`): The draw of `"stochastic"`: `True`, |sg(Z_T) - H|; `False`, |Z_T - sg(H)|.
        alignment (`str`): `"stochastic"`; `"symmetric"`, the mean of both sides; `"joint"`, without stop-gradient.
        distance (`str`): `"l1"` or `"mse"`.
        num_segments (`int` or `torch.Tensor`, *optional*): The divisor; G if left out.

    Returns:
        `torch.Tensor`: Scalar, float32.

    Raises:
        ValueError: Latents of different shapes, another `alignment` or `distance`.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"`alignment` must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}.")
    states, latents = (x.float().clamp(-CLAMP, CLAMP) for x in (latent_states, teacher_latents))
    if alignment == "joint":
        return latent_distance(states, latents, distance, num_segments)
    sides = [(states, latents.detach()), (latents, states.detach())]
    if alignment == "stochastic":
        sides = sides[:1] if states_learn else sides[1:]
    return sum(latent_distance(*side, distance, num_segments) for side in sides) / len(sides)


def attention_distillation_loss(
    student_attention: torch.Tensor,
    teacher_attention: torch.Tensor,
    *,
    temperature: float = 1.0,
    epsilon: float = 1e-9,
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 4, L_attn: KL(Â_T || A_S), summed over S and L.

    Args:
        student_attention (`torch.FloatTensor` of shape `(G, S, L)`): A_S, zero on padding.
        teacher_attention (`torch.FloatTensor` of shape `(G, S, L)`): Â_T, or another target, on the same grid.
        temperature (`float`): τ; the student is softmax(log A_S / τ), so that 1 leaves it as it is.
        epsilon (`float`): ε of Eq. 4.
        num_segments (`int` or `torch.Tensor`, *optional*): The divisor; G if left out.

    Returns:
        `torch.Tensor`: Scalar, float32.

    Raises:
        ValueError: Maps of different shapes.
    """
    student, teacher = student_attention.float(), teacher_attention.detach().float()
    if student.shape != teacher.shape:
        raise ValueError(f"The student's map has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.")
    if temperature != 1:
        seen = student > 0
        student = torch.where(seen, student, 1).log().div(temperature).masked_fill(~seen, float("-inf")).softmax(-1)
    divergence = teacher * ((teacher + epsilon) / (student + epsilon)).log()
    return divergence.sum() / (len(student) if num_segments is None else num_segments)


def target_attention(outputs, target: str = "teacher") -> torch.Tensor:
    """What L_attn aims at, a map for each step.

    Args:
        outputs (`VReflectionCausalLMOutputWithPast`): The model's outputs, with boxes.
        target (`str`): `"teacher"`, Â_T (Eq. 4); `"box"`, uniform over the merged patches that the step's box overlaps.

    Returns:
        `torch.FloatTensor` of shape `(G, S, L)`: For `"box"` float32; each step sums to one.

    Raises:
        ValueError: Another `target`.
    """
    if target not in ATTENTION_TARGETS:
        raise ValueError(f"`target` must be one of {', '.join(ATTENTION_TARGETS)}, got {target!r}.")
    if target == "teacher":
        return outputs.teacher_attention
    inside = outputs.inside_box.float()
    return inside / inside.sum(-1, keepdim=True)


def feature_distillation_loss(
    student_latents: torch.Tensor,
    teacher_latents: torch.Tensor,
    *,
    distance: str = "l1",
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The first term of Eq. 5, L_feat: |Z_S - sg(Z_T)|, from latents (G, S, D)."""
    return latent_distance(student_latents, teacher_latents.detach(), distance, num_segments)


def dac_distillation_loss(
    student_latents: torch.Tensor,
    teacher_latents: torch.Tensor | None,
    student_attention: torch.Tensor,
    teacher_attention: torch.Tensor,
    *,
    lambda_feat: float = 1.0,
    lambda_attn: float = 1.0,
    distance: str = "l1",
    temperature: float = 1.0,
    epsilon: float = 1e-9,
    num_segments: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 5, L_DAC = λ_feat |Z_S - sg(Z_T)| + λ_attn L_attn. Without BCM there is no Z_T, and no L_feat.

    The arguments are those of its terms, see [`feature_distillation_loss`] and [`attention_distillation_loss`].

    Returns:
        `tuple`: L_DAC, a scalar, float32; and its terms `L_feat` and `L_attn`, unweighted.
    """
    terms = {}
    if teacher_latents is not None:
        terms["L_feat"] = feature_distillation_loss(
            student_latents, teacher_latents, distance=distance, num_segments=num_segments
        )
    terms["L_attn"] = attention_distillation_loss(
        student_attention, teacher_attention, temperature=temperature, epsilon=epsilon, num_segments=num_segments
    )
    return lambda_feat * terms.get("L_feat", 0.0) + lambda_attn * terms["L_attn"], terms


def latent_losses(
    outputs, args, *, global_step: int, num_segments: int | torch.Tensor | None = None
) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
    """What a stage's latents add to the cross-entropy: λ_BCM L_BCM + λ_DAC L_DAC, as far as the stage has them.

    Args:
        outputs (`VReflectionCausalLMOutputWithPast`): The model's outputs, with latents.
        args (`VReflectionSFTConfig`): The stage, its weights and options.
        global_step (`int`): The optimiser step, for the draw of Eq. 2.
        num_segments (`int` or `torch.Tensor`, *optional*): The divisor; G if left out.

    Returns:
        `tuple`: The weighted sum, and its terms `L_BCM`, `L_feat` and `L_attn`, unweighted.
    """
    names, total, terms = STAGES[args.stage].losses, 0.0, {}
    shared = {"distance": args.latent_loss, "num_segments": num_segments}
    if "L_BCM" in names:
        terms["L_BCM"] = bcm_alignment_loss(
            outputs.latent_states,
            outputs.teacher_latents,
            states_learn=states_learn(args.seed, global_step, args.bernoulli_p),
            alignment=args.alignment,
            **shared,
        )
        total = total + args.lambda_bcm * terms["L_BCM"]
    if "L_attn" in names:
        l_dac, terms_of_dac = dac_distillation_loss(
            outputs.student_latents,
            outputs.teacher_latents,
            outputs.student_attention,
            target_attention(outputs, args.attention_target),
            lambda_feat=args.lambda_feat,
            lambda_attn=args.lambda_attn,
            temperature=args.attention_temperature,
            epsilon=args.attention_epsilon,
            **shared,
        )
        total = total + args.lambda_dac * l_dac
        terms |= terms_of_dac
    return total, terms


def loss_weights(args) -> dict[str, float]:
    """The weights that [`latent_losses`] gives to the stage's losses, by name."""
    losses = STAGES[args.stage].losses
    return {loss: math.prod(getattr(args, name) for name in LOSS_WEIGHTS[loss]) for loss in losses}
