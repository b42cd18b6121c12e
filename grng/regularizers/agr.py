r"""AGR: every element of the gradient is shrunk by its share of the gradient's absolute sum.

alpha_i = |g_i| / sum_k |g_k|,   Psi(g)_i = (1 - alpha_i) g_i
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grng.errors import invalid, unknown
from grng.regularizers.base import Parameters, Transform, at_least_float32
from grng.regularizers.schedule import check_number

SCOPES = ("tensor", "row", "group", "global")


@dataclass(frozen=True)
class AGR(Transform):
    r"""Adaptive gradient regularization: g <- (1 - strength |g| / sum |g|) g.

    Published: Jiang et al. 2024 (arXiv 2407.16944), with scope "tensor", strength 1 and neither eps nor exemptions.
    The relative change of a tensor of N elements is about 2.17 / N: 18 % of ten, 0.44 % of 512, 3e-5 of 65,536. As
    published the rule is nearly a no-op on large matrices; scope "row" (derived here) is not.

    It keeps every sign, commutes with a positive factor (a loss scale), and not with averaging: it acts on the
    gradient that all micro-batches and processes have contributed to.

    Args:
        scope: over what the share is taken: the whole "tensor", each "row" (an output channel; a vector is one row),
            the tensors of a param "group", or "global".
        strength: in [0, 1]; a param group's {"regularizer": {"strength": ...}} overrides it. warmup="lambda" ramps it.
        eps: added to the sum. 0 is safe: a gradient of zeros stays zero.
        min_numel: a scope of fewer elements is left alone. At 1 a single element's gradient is exactly zero for ever,
            as published.
        exclude: see :class:`Regularizer`.

    >>> agr(torch.tensor([1.0, -3.0])).tolist()
    [0.75, -0.75]
    """

    scope: str = "tensor"
    strength: float = 1.0
    eps: float = 0.0
    min_numel: int = 2
    per_group: ClassVar[tuple[str, ...]] = ("strength",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)
        if self.warmup == "r":
            raise invalid("warmup", self.warmup, '"none", "lambda" or "zero" for AGR, which has no distance r')
        check_number("strength", self.strength, high=1.0)
        check_number("eps", self.eps)
        if type(self.min_numel) is not int or self.min_numel < 1:
            raise invalid("min_numel", self.min_numel, "a whole number >= 1")

    def transform(self, parameters: Parameters, gradients: list[Tensor], t: int) -> list[Tensor]:
        ramp = self.strength_ramp(t)
        strengths = [self.setting("strength", own) * ramp for own in parameters.overrides]
        if self.scope in ("tensor", "row"):
            found = zip(gradients, strengths, strict=True)
            return [agr(g, s, self.scope, self.eps, self.min_numel) for g, s in found]
        scopes = parameters.groups if self.scope == "group" else [0] * len(gradients)
        wide = at_least_float32(gradients)
        norms = [n.to(torch.promote_types(n.dtype, torch.float32)) for n in torch._foreach_norm(wide, 1)]
        out = list(gradients)
        for scope in set(scopes):
            members = [i for i, own in enumerate(scopes) if own == scope]
            if sum(gradients[i].numel() for i in members) < self.min_numel:
                continue
            total = torch.stack([norms[i] for i in members]).sum()
            for i in members:
                out[i] = shrunk(wide[i], total, strengths[i], self.eps).to(gradients[i].dtype)
        return out


def agr(g: Tensor, strength: float = 1.0, scope: str = "tensor", eps: float = 0.0, min_numel: int = 1) -> Tensor:
    """(1 - strength |g| / (sum |g| + eps)) g, the sum over the tensor, or over each index of its first dimension.

    Args:
        g: a gradient of any shape.
        scope: "tensor" or "row"; a vector is one row.
        min_numel: sums of fewer elements leave g as it is.

    >>> agr(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), scope="row").tolist()
    [[0.5, 0.5], [0.0, 0.0]]
    """
    rows = scope == "row" and g.ndim > 1
    if (g[0].numel() if rows and len(g) else g.numel()) < min_numel:
        return g
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    total = wide.abs().sum(dim=tuple(range(1, g.ndim)), keepdim=True) if rows else wide.abs().sum()
    return shrunk(wide, total, strength, eps).to(g.dtype)


def shrunk(g: Tensor, total: Tensor, strength: float, eps: float) -> Tensor:
    """(1 - strength |g| / (total + eps)) g; g itself where the total is zero.

    >>> shrunk(torch.tensor([2.0]), torch.tensor(4.0), 1.0, 0.0).tolist()
    [1.0]
    """
    total = total + eps
    share = g.abs() / torch.where(total > 0, total, 1.0)  # exactly 1 for an only element
    return g - g * (strength * share)
