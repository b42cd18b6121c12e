"""AdamW's rule for parameters that have no factors."""

import torch
from torch import Tensor


def adamw_directions(
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    ok: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> list[Tensor]:
    """Directions of Adam (Kingma & Ba 2015); the decoupled decay of AdamW is applied with the step.

        m <- b1 m + (1-b1) g,   v <- b2 v + (1-b2) g^2,   D = -(m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

    Args:
        gradients: finite where `ok`.
        states: per parameter `exp_avg`, `exp_avg_sq` and `step`, made where they are missing and updated in place.
        ok: bool on the device; where false, no state changes.

    >>> state = {}
    >>> round(adamw_directions([torch.tensor([3.0])], [state], torch.tensor(True))[0].item(), 4)
    -1.0
    """
    for g, state in zip(gradients, states, strict=True):
        make_averages(state, g)
    m, v, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    torch._foreach_add_(steps, [ok.to(steps[0].dtype)] * len(steps))
    # Weights in float64: 1 - b2 in float32 is wrong in its fifth digit.
    new = [((1 - b) * ok.to(torch.float64)) for b in betas]
    squares = torch._foreach_mul(gradients, gradients)
    for averages, values, weight in ((m, gradients, new[0]), (v, squares, new[1])):
        torch._foreach_mul_(averages, (1 - weight).to(averages[0].dtype))
        torch._foreach_add_(averages, torch._foreach_mul(values, weight.to(values[0].dtype)))
    directions = []
    for mean, square, step in zip(m, v, steps, strict=True):
        t = step.to(torch.float64).clamp(min=1)
        directions.append(-(mean / (1 - betas[0] ** t)) / ((square / (1 - betas[1] ** t)).sqrt() + eps))
    return directions


def make_averages(state: dict[str, Tensor], like: Tensor) -> None:
    """Adam's state of a parameter, in the shape and precision of its gradient, where it is missing."""
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        state["step"] = torch.zeros((), dtype=torch.float32, device=like.device)


def make_momentum(state: dict[str, Tensor], like: Tensor) -> None:
    """That of a parameter with a direction."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(like, memory_format=torch.contiguous_format)
