"""Diagonal Fisher: D = -g / (diag F + lam)."""

from torch import Tensor

from grng.curvature import Batch, Layer, Statistics
from grng.preconditioners.base import Preconditioner
from grng.preconditioners.registry import register_preconditioner


@register_preconditioner("diagonal")
class Diagonal(Preconditioner):
    """The diagonal of the Fisher from per-sample gradients.

        h <- EMA of (1/N) sum_i (grad l_i)^2,      D = -g / (h + lam)

    The square is that of each sample's gradient, not of their mean. `lam` is the damping of the optimizer.
    """

    elementwise = True

    def allocate(self) -> None:
        self.fisher = self.moment("fisher", lambda group: (group.n_out, group.n_in))

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        self.fisher.add(layer, statistics.squared_gradients())

    def refresh(self, batch: Batch, decompose: bool) -> None:
        self.fisher.update(batch)

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [-g / (h + d) for g, h, d in zip(gradients, self.fisher.values, damping, strict=True)]

    def scales(self) -> list[Tensor]:
        return [h.amax((1, 2), keepdim=True) for h in self.fisher.values]
