"""The step itself: momentum, decoupled decay, and what parameters without a direction follow.

m <- mu m + D,   theta <- (1 - lr wd) theta + lr m

A parameter without a direction follows AdamW, its decay included: theta <- (1 - lr_f wd) theta + lr_f D with the
fallback's rate lr_f. AdamW's steps at 1e-3 would not hold against a decay at the rate of natural gradients, some
hundred times that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grng.fallback import adamw_directions, make_momentum
from grng.torch_optim import scalar

Gradients = dict[nn.Parameter, Tensor]


def update_(
    groups: list[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    gradients: Gradients,
    directions: Gradients,
    ok: Tensor,
    precision: Callable[[nn.Parameter], torch.dtype],
) -> None:
    """Move the parameters, param group by param group; on the device, nothing if not `ok`.

    Args:
        groups: of the optimizer, with "lr", "base_lr", "momentum", "weight_decay" and "fallback_lr".
        states: of the parameters; changed in place.
        gradients: of the parameters that take part.
        directions: of those of them that have one; the others follow AdamW's rule.
        ok: bool on the device.
        precision: in which the fallback of a parameter is computed.
    """
    gate = ok.to(torch.float64)  # not in float32, which would round the settings of float64 parameters
    for group in groups:
        members = [p for p in group["params"] if p in gradients]
        covered = [p for p in members if p in directions]
        others = [p for p in members if p not in directions]
        lr, decay = scalar(group["lr"]), group["weight_decay"]
        if covered:
            if decay:
                _decay_(covered, lr * decay * gate)
            own = [states[p] for p in covered]
            _add_(covered, _momentum(own, [directions[p] for p in covered], group["momentum"], gate), lr * gate)
        if others:
            rate = group["fallback_lr"] * (lr / group["base_lr"] if group["base_lr"] else lr != 0)
            if decay:
                _decay_(others, rate * decay * gate)
            clean = [torch.where(ok, gradients[p], 0).to(precision(p)) for p in others]
            found = adamw_directions(clean, [states[p] for p in others], ok)
            _add_(others, found, rate * gate)


def _decay_(params: list[nn.Parameter], part: Tensor) -> None:
    for dtype in {p.dtype for p in params}:  # a factor of less precision would round small decays away
        own: list[Tensor] = [p for p in params if p.dtype == dtype]
        torch._foreach_mul_(own, (1 - part).to(torch.promote_types(dtype, torch.float32)))


def _momentum(states: list[dict[str, Tensor]], directions: list[Tensor], mu: float, gate: Tensor) -> list[Tensor]:
    if mu == 0:
        return directions
    for state, D in zip(states, directions, strict=True):
        make_momentum(state, D)
    buffers = [state["momentum"] for state in states]
    torch._foreach_mul_(buffers, (1 - (1 - mu) * gate).to(buffers[0].dtype))
    torch._foreach_add_(buffers, directions)
    return buffers


def _add_(params: list[nn.Parameter], steps: list[Tensor], rate: Tensor) -> None:
    """p <- p + rate * step, in the parameters' own precision; `rate` is a scalar on the device."""
    scaled = torch._foreach_mul(steps, rate.to(steps[0].dtype))
    torch._foreach_add_(list[Tensor](params), [s.to(p.dtype) for p, s in zip(params, scaled, strict=True)])
