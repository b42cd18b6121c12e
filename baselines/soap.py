"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's factors."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grng.errors import check_nonnegative, invalid
from grng.torch_optim import StrictOptimizer, scalar

from .common import check_betas, evaluated, refuse_sparse


class SOAP(StrictOptimizer):
    r"""Adam in the eigenbasis of Shampoo's factors.

    For a gradient G with one axis i after the other, G_i its matrix with axis i in front, and Q the bases of all axes:

    .. math::
        M &\leftarrow b_1 M + (1-b_1)\,G, \qquad V \leftarrow b_2 V + (1-b_2)\,(Q^T G)^2 \\
        \theta &\leftarrow \theta - \mathrm{lr}\,\frac{\sqrt{1-b_2^t}}{1-b_1^t}\;Q\,\frac{Q^T M}{\sqrt V + \epsilon},
            \qquad \theta \leftarrow (1 - \mathrm{lr}\,\mathrm{wd})\,\theta \\
        L_i &\leftarrow s L_i + (1-s)\,G_i G_i^T, \qquad
        Q_i \leftarrow \mathrm{qr}(L_i Q_i) \ \text{every interval-th step}

    where Q^T G multiplies every axis. The columns of Q_i are sorted by their Rayleigh quotients first, and V with them.
    The first call only sets L and, by eigh, Q. Axes longer than max_dim, and tensors of one axis, stay as they are.

    Published: Vyas et al. 2024 (arXiv 2409.11321); rule and defaults are those of the authors' code, which keeps M in
    the basis and turns it back and forth: the same numbers.

    Args:
        params: tensors, (name, tensor) pairs or param groups.
        lr: learning rate.
        betas: b_1, b_2.
        shampoo_beta: s; None: b_2.
        eps: added to the denominator.
        weight_decay: wd.
        interval: steps between refreshes of Q, precondition_frequency in the authors' code.
        max_dim: the longest axis that gets a factor.
        precondition_1d: whether tensors of one axis get one.
        normalize: scale every tensor's step to root mean square lr.
        correct_bias: whether the factor before Q is applied.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: `step` meets a sparse gradient.

    >>> w = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> optimizer = SOAP([w], lr=0.1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> bool(w.norm() < 5**0.5)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        interval: int = 10,
        max_dim: int = 10000,
        precondition_1d: bool = False,
        normalize: bool = False,
        correct_bias: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        shape = {"interval": interval, "max_dim": max_dim, "precondition_1d": precondition_1d}
        super().__init__(params, defaults | shape | {"normalize": normalize, "correct_bias": correct_bias})

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_nonnegative("eps", group["eps"])
        check_betas(group["betas"], 2)
        shampoo_beta = group["shampoo_beta"]
        if shampoo_beta is not None and not 0 <= shampoo_beta < 1:
            raise invalid("shampoo_beta", shampoo_beta, "in [0, 1), or None")
        for name in ("interval", "max_dim"):
            if type(group[name]) is not int or group[name] < 1:
                raise invalid(name, group[name], "a whole number, at least 1")

    def state_dtype(self, p: Tensor) -> torch.dtype:
        """At least float32: QR and eigh have no others."""
        return torch.promote_types(p.dtype, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        loss = evaluated(closure)
        for group in self.param_groups:
            refuse_sparse("SOAP", group["params"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                G = p.grad.to(self.state_dtype(p))
                state = self.state[p]
                if not state:
                    begin(state, G, group)
                else:
                    update(p, state, G, group)
        return loss


def begin(state: dict[str, Any], G: Tensor, group: dict[str, Any]) -> None:
    """Factors and bases from a first gradient, which moves nothing."""
    state["step"] = torch.zeros(())
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
    state["factors"] = [
        G.new_zeros(size, size)
        if size <= group["max_dim"] and (G.ndim > 1 or group["precondition_1d"])
        else G.new_empty(0)
        for size in G.shape
    ]
    accumulate(state["factors"], G, group)
    state["bases"] = [L if L.ndim == 1 else torch.linalg.eigh(L)[1].flip(1) for L in state["factors"]]


def update(p: Tensor, state: dict[str, Any], G: Tensor, group: dict[str, Any]) -> None:
    """One step of :class:`SOAP` in place."""
    (b1, b2), lr, bases = group["betas"], scalar(group["lr"]), state["bases"]
    state["step"] += 1
    t = int(state["step"])
    M, V = state["exp_avg"].lerp_(G, 1 - b1), state["exp_avg_sq"].lerp_(turned(G, bases).square(), 1 - b2)
    D = turned(turned(M, bases) / (V.sqrt() + group["eps"]), [Q.mT if Q.ndim == 2 else Q for Q in bases])
    rate = lr
    if group["correct_bias"]:
        rate = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
    if group["normalize"]:
        D = D / (D.square().mean().sqrt() + 1e-30)
    p.sub_((rate * D).to(p.dtype))
    p.mul_(1 - lr * group["weight_decay"])
    accumulate(state["factors"], G, group)
    if t % group["interval"] == 0:
        for axis, (L, Q) in enumerate(zip(state["factors"], bases, strict=True)):
            if L.ndim == 2:
                LQ = L @ Q
                order = (Q * LQ).sum(0).argsort(descending=True)
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
                bases[axis] = torch.linalg.qr(LQ[:, order])[0]


def accumulate(factors: list[Tensor], G: Tensor, group: dict[str, Any]) -> None:
    """L_i <- s L_i + (1-s) G_i G_i^T."""
    s = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
    for axis, L in enumerate(factors):
        if L.ndim == 2:
            rows = G.movedim(axis, 0).flatten(1) if G.ndim > 1 else G.unsqueeze(1)
            L.lerp_(rows @ rows.mT, 1 - s)


def turned(G: Tensor, bases: list[Tensor]) -> Tensor:
    """Q^T G: every axis that has a basis multiplied by its transpose.

    >>> turned(torch.tensor([[1.0, 2.0]]), [torch.empty(0), torch.tensor([[0.0, 1.0], [1.0, 0.0]])]).tolist()
    [[2.0, 1.0]]
    """
    for axis, Q in enumerate(bases):
        if Q.ndim == 2:
            G = torch.tensordot(G, Q, dims=([axis], [0])).movedim(-1, axis)
    return G
