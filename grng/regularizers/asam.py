r"""ASAM: the displacement measured in units of the weights, so that it does not depend on their scale.

T = |w| + eta,   e = r T^2 g / \|T g\|,   g_2 = grad L(w + e)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grng.errors import unknown
from grng.regularizers.base import Gradients, Parameters, global_norm
from grng.regularizers.gnp import GNP, scaled
from grng.regularizers.schedule import check_number


@dataclass(frozen=True)
class ASAM(GNP):
    r"""Adaptive SAM: the gradient at w + r T^2 g/\|T g\|; two gradients a step.

    Published: Kwon et al. 2021 (arXiv 2102.11600). `alpha` below 1 mixes as GNP does (derived here).

    Args:
        r: the distance in units of the weights; 0.5 for CIFAR-10 in the authors' code, 2.0 in the common variant.
        eta: added to |w| under rule "official".
        rule: "official": T = |w| + eta for parameters whose name contains "weight", 1 for the others (needs names: the
            model, or an optimizer over named parameters); "common": T = |w| for all, eta unused, as in the adaptive
            variant that most people run.
        and those of :class:`GNP`.

    >>> ASAM().rule
    'official'
    """

    r: float = 0.5
    alpha: float | None = 1.0
    eta: float = 0.01
    rule: str = "official"
    per_group: ClassVar[tuple[str, ...]] = ("r", "alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eta", self.eta)
        if self.rule not in ("official", "common"):
            raise unknown("rule", self.rule, ("official", "common"))

    @property
    def needs_names(self) -> bool:
        return self.rule == "official" or super().needs_names

    def displacement(self, parameters: Parameters, first: Gradients, t: int) -> list[Tensor]:
        lengths = [self._length(p, name) for p, name in zip(parameters.tensors, parameters.names, strict=True)]
        reduced = [g if T is None else T * g for T, g in zip(lengths, first.values, strict=True)]
        norm = global_norm(reduced)
        direction = [g if T is None else T * g for T, g in zip(lengths, reduced, strict=True)]
        return scaled(direction, self._radii(parameters, t), norm)

    def _length(self, p: Tensor, name: str) -> Tensor | None:
        w = p.detach().to(torch.promote_types(p.dtype, torch.float32)).abs()
        if self.rule == "common":
            return w
        return w + self.eta if "weight" in name else None
