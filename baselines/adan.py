"""Adan: Adam with Nesterov momentum, whose look-ahead is the difference of consecutive gradients."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grng.damping import squared_norm
from grng.errors import check_nonnegative, invalid
from grng.torch_optim import StrictOptimizer, scalar

from .common import check_betas, evaluated, refuse_sparse

AVERAGES = ("exp_avg", "exp_avg_diff", "exp_avg_sq")  # m, v, n


class Adan(StrictOptimizer):
    r"""Adaptive Nesterov momentum.

    .. math::
        d &= g - g_{prev} \quad (0 \text{ at a parameter's first gradient}) \\
        m &\leftarrow b_1 m + (1-b_1)\,g, \qquad v \leftarrow b_2 v + (1-b_2)\,d, \qquad
        n \leftarrow b_3 n + (1-b_3)\,(g + b_2 d)^2 \\
        s &= \mathrm{lr}\,\Big(\frac{m}{1-b_1^t} + \frac{b_2 v}{1-b_2^t}\Big) \Big/
             \Big(\sqrt{n / (1-b_3^t)} + \epsilon\Big) \\
        \theta &\leftarrow (\theta - s) / (1 + \mathrm{lr}\,\mathrm{wd}) \quad\text{(proximal decay), or}\quad
        \theta \leftarrow (1 - \mathrm{lr}\,\mathrm{wd})\,\theta - s \quad\text{(no\_prox)}

    with g scaled by c = min(1, max_grad_norm / (\|g\| + eps)) first, the norm over all parameters.

    Published: Xie et al. 2022 (arXiv 2208.06677), whose betas are one minus those here; rule and defaults are those of
    the authors' code. They recommend five to ten times the learning rate of AdamW, and a weight decay of 0.02.

    The order published with AGR, in which c comes from the plain gradient, is that of the pipeline
    ``Regularized(Adan(...), [clip, agr])`` with max_grad_norm=0.

    Args:
        params: tensors, (name, tensor) pairs or param groups; real and floating-point.
        lr: learning rate, a number or a tensor.
        betas: b_1, b_2, b_3, each in [0, 1).
        eps: added to the denominator, and to the norm that is clipped by.
        weight_decay: wd.
        no_prox: decay as AdamW does.
        max_grad_norm: 0: no clipping. One for all param groups.

    Raises:
        ValueError: a setting is out of range, of the constructor or of a param group.
        RuntimeError: `step` meets a sparse gradient.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Adan([w], lr=0.1)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.9, -1.9]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        max_grad_norm: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, defaults | {"max_grad_norm": max_grad_norm})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_group(group, self.defaults["max_grad_norm"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        loss = evaluated(closure)
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        refuse_sparse("Adan", trained)
        factor = self._clip_factor([p.grad for p in trained])
        for group in self.param_groups:
            settings = {name: scalar(group[name]) for name in ("lr", "betas", "eps", "weight_decay", "no_prox")}
            members = [p for p in group["params"] if p.grad is not None]
            for device in dict.fromkeys(p.device for p in members):
                here = [p for p in members if p.device == device]
                gradients = [p.grad for p in here]
                if factor is not None:
                    gradients = [g.clone() for g in gradients]  # in place, since c would widen scalars in bfloat16
                    torch._foreach_mul_(gradients, factor.to(device))
                update(here, gradients, [self._state(p, g) for p, g in zip(here, gradients, strict=True)], **settings)
        return loss

    def _clip_factor(self, gradients: list[Tensor]) -> Tensor | None:
        """c, on the device; None where nothing is clipped."""
        first = self.param_groups[0]
        if not (first["max_grad_norm"] and gradients):
            return None
        devices = dict.fromkeys(g.device for g in gradients)
        parts = [squared_norm([g for g in gradients if g.device == device]) for device in devices]
        norm = torch.stack([part.to(gradients[0].device) for part in parts]).sum().sqrt()
        return (first["max_grad_norm"] / (norm + first["eps"])).clamp(max=1)

    def _state(self, p: Tensor, g: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, where it is read without waiting for a device
            state.update({name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in AVERAGES})
            state["previous_grad"] = g.clone(memory_format=torch.preserve_format)
        return state


def update(
    params: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    no_prox: bool,
) -> None:
    """One step of :class:`Adan` in place, on tensors of one device; `gradients` are left as they are."""
    b1, b2, b3 = betas
    m, v, n = ([state[name] for state in states] for name in AVERAGES)
    previous, counts = [state["previous_grad"] for state in states], [state["step"] for state in states]
    torch._foreach_add_(counts, 1.0)
    steps = [count.item() for count in counts]
    d = torch._foreach_sub(gradients, previous)
    torch._foreach_copy_(previous, gradients)
    torch._foreach_lerp_(m, gradients, 1 - b1)
    torch._foreach_lerp_(v, d, 1 - b2)
    ahead = torch._foreach_add(gradients, d, alpha=b2)
    torch._foreach_mul_(n, b3)
    torch._foreach_addcmul_(n, ahead, ahead, 1 - b3)
    root = torch._foreach_sqrt(n)
    torch._foreach_div_(root, [math.sqrt(1 - b3**t) for t in steps])
    torch._foreach_add_(root, eps)
    step = torch._foreach_div(m, [1 - b1**t for t in steps])
    torch._foreach_add_(step, torch._foreach_mul(v, [b2 / (1 - b2**t) for t in steps]))
    torch._foreach_div_(step, root)
    torch._foreach_mul_(step, lr)
    if weight_decay and no_prox:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_sub_(params, step)
    if weight_decay and not no_prox:
        torch._foreach_div_(params, 1 + lr * weight_decay)


def check_group(group: dict[str, Any], max_grad_norm: float) -> None:
    """Refuse Adan's own settings of a param group that are out of range."""
    for name in ("eps", "max_grad_norm"):
        check_nonnegative(name, group[name])
    check_betas(group["betas"], 3)
    if not isinstance(group["no_prox"], bool):
        raise invalid("no_prox", group["no_prox"], "True or False")
    if group["max_grad_norm"] != max_grad_norm:
        remedy = "Clipping is by the norm over all groups: give it to the constructor."
        raise invalid("max_grad_norm of a param group", group["max_grad_norm"], f"{max_grad_norm!r}, as of all", remedy)
