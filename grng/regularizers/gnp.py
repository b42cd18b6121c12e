r"""GNP: penalising the gradient norm, by the gradient at weights moved uphill; SAM is its alpha = 1.

    u = g_1 / \|g_1\|,   g_2 = grad L(w + r u),   G = (1 - alpha) g_1 + alpha g_2  ~  grad (L + lambda \|grad L\|)

with lambda = alpha r; the error is linear in r.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grng.errors import invalid, unknown
from grng.regularizers.base import Gradients, Parameters, Passes, Regularizer, by_value
from grng.regularizers.clip import ClipNorm
from grng.regularizers.schedule import check_number

TINY = 1e-12  # beside the norm, as in SAM's common implementation: a zero gradient displaces nothing


@dataclass(frozen=True)
class GNP(Passes):
    r"""Gradient norm penalty: G = (1 - alpha) g_1 + alpha g_2, g_2 at w + r g_1/\|g_1\|; two gradients a step.

    Published: Zhao, Zhang, Hu 2022 (arXiv 2202.03599); the warm-ups in arXiv 2406.09723. Derived here: settings per
    group, exclusions (the penalty is then on the gradient of the others; all parameters feel it).

    Args:
        r: the distance; a param group's {"regularizer": {"r": ...}} overrides it.
        alpha: weight of the second gradient, lambda / r; 0.8 if neither it nor lam is given. 1 is SAM.
        lam: lambda, the strength of the penalty, instead of alpha.
        first: "raw", the formula above and of the paper; "unit", g_1/\|g_1\| in place of its first g_1, as the authors'
            code computes by default: with alpha < 1 that part keeps its length where the gradient vanishes.
        warmup, warmup_steps, probability, interval, ...: see :class:`Schedule`.
        exclude: see :class:`Regularizer`.
        same_rng, sync, precision: see :class:`Passes`.

    Raises:
        ValueError: a value out of range, or both alpha and lam.

    >>> GNP(r=0.1, lam=0.05).weight
    0.5
    >>> import torch
    >>> from grng.regularizers import Regularized
    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Regularized(torch.optim.SGD([w], lr=1.0), GNP(r=0.1, alpha=1.0))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> round(optimizer.step(closure).item(), 4), round(w.item(), 4)  # the gradient 2 w at w = 1.1
    (1.0, -1.2)
    """

    r: float = 0.05
    alpha: float | None = None
    lam: float | None = None
    first: str = "raw"
    per_group: ClassVar[tuple[str, ...]] = ("r", "alpha", "lam")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("r", self.r)
        if self.alpha is not None and self.lam is not None:
            raise invalid("lam", self.lam, f"None where alpha is given ({self.alpha})", "lam = alpha * r.")
        for name in ("alpha", "lam"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.lam and not self.r:
            raise invalid("r", self.r, "> 0 where lam is given")
        if self.first not in ("raw", "unit"):
            raise unknown("first", self.first, ("raw", "unit"))

    @property
    def weight(self) -> float:
        """alpha."""
        return self._weight(self.r, self.alpha, self.lam)

    @staticmethod
    def _weight(r: float, alpha: float | None, lam: float | None) -> float:
        if lam is not None:
            return lam / r if r else 0.0
        return 0.8 if alpha is None else alpha

    def check_overrides(self, own: dict[str, Any]) -> None:
        if "alpha" in own and "lam" not in own and self.lam is not None:
            raise invalid("a param group's 'regularizer'", own, "with lam, not alpha, as the regularizer itself")
        if "lam" in own and "alpha" not in own and self.alpha is not None:
            raise invalid("a param group's 'regularizer'", own, "with alpha, not lam, as the regularizer itself")
        super().check_overrides(own)

    @property
    def needs_scale(self) -> bool:
        return self.first == "unit"  # also where alpha = 1: a warm-up or a param group may have another

    def signs(self, t: int) -> tuple[float, ...]:
        # At distance or weight zero the second gradient is the first one, or does not count.
        return (1.0,) if self.radius_ramp(t) and self.strength_ramp(t) else ()

    def displacement(self, parameters: Parameters, first: Gradients, t: int) -> list[Tensor]:
        return scaled(self.direction(parameters, first), self._radii(parameters, t), first.norm)

    def direction(self, parameters: Parameters, first: Gradients) -> list[Tensor]:
        return first.values

    def _radii(self, parameters: Parameters, t: int) -> list[float]:
        return [self.setting("r", own) * self.radius_ramp(t) for own in parameters.overrides]

    def combine(
        self, parameters: Parameters, first: Gradients, further: list[list[Tensor]], t: int
    ) -> tuple[list[Tensor], dict[str, Any]]:
        weights = [
            self._weight(*(self.setting(name, own) for name in ("r", "alpha", "lam"))) * self.strength_ramp(t)
            for own in parameters.overrides
        ]
        report = {"alpha": weights[0] if weights else 0.0, "r": self.r * self.radius_ramp(t)}
        if not further and self.first == "raw":
            return first.values, report
        if self.first == "raw" and len(set(weights)) == 1:
            report["share"] = weights[0]
        start = first.values
        if self.first == "unit":
            scale = 1.0 if first.scale is None else first.scale
            start = list(torch._foreach_mul(start, scale / (first.norm + TINY)))
        (moved,) = further or [first.values]
        return mixed(start, moved, weights), report


@dataclass(frozen=True)
class SAM(GNP):
    r"""Sharpness-aware minimisation: the gradient at w + r g/\|g\|; GNP with alpha = 1.

    Published: Foret et al. 2021 (arXiv 2010.01412). Arguments as GNP's, without alpha and lam.

    >>> SAM(r=0.1).weight
    1.0
    """

    alpha: float | None = 1.0
    per_group: ClassVar[tuple[str, ...]] = ("r",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != 1 or self.lam is not None:
            raise invalid("alpha and lam", (self.alpha, self.lam), "left alone for SAM", "GNP(alpha=...) has them.")


def gnp_repository(r: float = 0.1, alpha: float = 0.8, max_norm: float = 5.0, **settings: Any) -> list[Regularizer]:
    """GNP as the authors' code computes it by default: unit first term, then clipping to norm 5.

    Its weight decay stands in the differentiated loss: use SGD's `weight_decay` for the same gradient, or add it to the
    loss for the same displacement.

    >>> [type(part).__name__ for part in gnp_repository()]
    ['GNP', 'ClipNorm']
    """
    return [GNP(r, alpha, first="unit", **settings), ClipNorm(max_norm)]


def scaled(direction: list[Tensor], radii: list[float], norm: Tensor) -> list[Tensor]:
    """r direction / norm, zero where the norm is zero or not finite.

    >>> scaled([torch.tensor([3.0, 4.0])], [0.5], torch.tensor(5.0))[0].tolist()
    [0.30000001192092896, 0.4000000059604645]
    """
    out = list(direction)
    for values in by_value(radii):
        factor = torch.where(torch.isfinite(norm), values.number / (norm + TINY), 0.0)
        members = [direction[i] for i in values.indices]
        for i, e in zip(values.indices, torch._foreach_mul(members, factor), strict=True):
            out[i] = torch.where(torch.isfinite(norm), e, 0.0)  # nan * 0 is nan
    return out


def mixed(first: list[Tensor], moved: list[Tensor], weights: list[float]) -> list[Tensor]:
    """(1 - weight) first + weight moved; weight 1 gives `moved` itself, to the bit.

    >>> mixed([torch.tensor(1.0)], [torch.tensor(3.0)], [0.5])
    [tensor(2.)]
    """
    out = list(moved)
    for values in by_value(weights):
        if values.number == 1:
            continue
        i = values.indices
        ours = torch._foreach_mul([first[k] for k in i], 1 - values.number)
        torch._foreach_add_(ours, [moved[k] for k in i], alpha=values.number)
        for k, value in zip(i, ours, strict=True):
            out[k] = value
    return out
