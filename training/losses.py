"""Eq. 2, 4 and 5 as pure functions of tensors: float32 inside, summed over segments, divided by `num_segments`.

Symbols in shapes: G segments, S latent steps, D hidden size, L merged patches.
"""

import torch


CLAMP = 1e4
ALIGNMENTS = ("stochastic", "symmetric", "joint")
DISTANCES = ("l1", "mse")


def latent_distance(prediction: torch.Tensor, target: torch.Tensor, distance: str, num_segments) -> torch.Tensor:
    """Mean distance over S and D, summed over segments, divided by `num_segments` (or by G, if `None`)."""
    difference = prediction.float() - target.float()
    if distance not in DISTANCES:
        raise ValueError(f"`distance` must be one of {', '.join(DISTANCES)}, got {distance!r}.")
    per_element = difference.abs() if distance == "l1" else difference.square()
    return per_element.mean((1, 2)).sum() / (len(prediction) if num_segments is None else num_segments)


def bcm_alignment_loss(
    latent_states: torch.Tensor,
    teacher_latents: torch.Tensor,
    *,
    states_learn: bool = True,
    alignment: str = "stochastic",
    distance: str = "l1",
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 2: pulls the states and the teacher's latents together, one side at a time.

    Args:
        latent_states (`torch.Tensor` of shape `(G, S, D)`): H.
        teacher_latents (`torch.Tensor` of shape `(G, S, D)`): Z_T.
        states_learn (`bool`): The indicator of `"stochastic"`: 1, |sg(Z_T) - H|; 0, |Z_T - sg(H)|.
        alignment (`str`): `"stochastic"`; `"symmetric"`, the mean of both sides; `"joint"`, without stop-gradient.
        distance (`str`): `"l1"` or `"mse"`.
        num_segments (`int` or `torch.Tensor`, *optional*): The divisor; G if left out.

    Returns:
        `torch.Tensor`: Scalar, float32.
    """
    states, latents = (x.float().clamp(-CLAMP, CLAMP) for x in (latent_states, teacher_latents))
    if alignment not in ALIGNMENTS:
        raise ValueError(f"`alignment` must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}.")
    if alignment == "joint":
        return latent_distance(states, latents, distance, num_segments)
    if alignment == "symmetric":
        sides = (states, latents.detach()), (latents, states.detach())
        return sum(latent_distance(*side, distance, num_segments) for side in sides) / 2
    side = (states, latents.detach()) if states_learn else (latents, states.detach())
    return latent_distance(*side, distance, num_segments)


def feature_distillation_loss(
    student_latents: torch.Tensor,
    teacher_latents: torch.Tensor,
    *,
    distance: str = "l1",
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The first term of Eq. 5, |Z_S - sg(Z_T)|, from latents (G, S, D)."""
    return latent_distance(student_latents, teacher_latents.detach(), distance, num_segments)


def attention_distillation_loss(
    student_attention: torch.Tensor,
    teacher_attention: torch.Tensor,
    *,
    temperature: float = 1.0,
    epsilon: float = 1e-9,
    num_segments: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 4: KL(Â_T || A_S), summed over S and L.

    Args:
        student_attention (`torch.FloatTensor` of shape `(G, S, L)`): A_S, zero on padding.
        teacher_attention (`torch.FloatTensor` of shape `(G, S, L)`): Â_T, on the same grid.
        temperature (`float`): τ; the student is softmax(log A_S / τ), so that 1 leaves it as it is.
        epsilon (`float`): ε of Eq. 4.
        num_segments (`int` or `torch.Tensor`, *optional*): The divisor; G if left out.

    Returns:
        `torch.Tensor`: Scalar, float32.
    """
    student, teacher = student_attention.float(), teacher_attention.detach().float()
    if student.shape != teacher.shape:
        raise ValueError(f"The student's map has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}.")
    if temperature != 1:
        seen = student > 0
        student = torch.where(seen, student, 1).log().div(temperature).masked_fill(~seen, float("-inf")).softmax(-1)
    divergence = teacher * ((teacher + epsilon) / (student + epsilon)).log()
    return divergence.sum() / (len(student) if num_segments is None else num_segments)
