"""Identity: D = -g, a first-order method under GRNG's front end."""

from torch import Tensor

from grng.curvature import Batch, Layer, Statistics
from grng.preconditioners.base import Preconditioner
from grng.preconditioners.registry import register_preconditioner


@register_preconditioner("identity")
class Identity(Preconditioner):
    """D = -g.

    >>> import torch
    >>> [d.tolist() for d in Identity().precondition([torch.ones(1, 1, 2)], [torch.zeros(1, 1, 1)])]
    [[[[-1.0, -1.0]]]]
    """

    elementwise = True

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        pass

    def refresh(self, batch: Batch, decompose: bool) -> None:
        pass

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [-g for g in gradients]
