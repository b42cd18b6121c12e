"""A layer: one module's parameters as stacked matrices, and where its stacks lie."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from grng.curvature.geometry import PLAIN, Geometry, find_geometry
from grng.curvature.order import ROWS, SECOND, UNKNOWN
from grng.curvature.statistics import Statistics

STATUS = ("pending", "verified", "failed")  # the order in which one prevails over the others


@dataclass(eq=False)
class Layer:
    """One module with curvature: its parameters and its k = `blocks` matrices of shape (n_out, n_in).

    `group` and `slots` say which stack of same-shape matrices holds it and at which indices. `status` is "pending"
    until the captured pair has reproduced the gradient, then "verified" or "failed". `host` is the module whose
    forward pass uses the weights, where that is not `module`. `order` is one of `grng.curvature.order.ORDERS`, once it
    is known.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    geometry: Geometry
    blocks: int
    n_out: int
    n_in: int
    host: nn.Module | None = None
    group: int = -1
    slots: slice = field(default_factory=lambda: slice(0, 0))
    status: str = "pending"
    reason: str = ""
    order: str = UNKNOWN

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def owner(self) -> nn.Parameter:
        """The parameter that carries the layer's state."""
        return self.parameters[0]

    @property
    def active(self) -> bool:
        return self.status != "failed"

    @property
    def trained(self) -> bool:
        """Whether one of its parameters is trainable by now."""
        return any(p.requires_grad for p in self.parameters)

    @property
    def pending(self) -> bool:
        return self.status == "pending"

    @property
    def indexed(self) -> bool:
        """Whether its inputs are one-hot."""
        return self.geometry.indexed

    @property
    def sides(self) -> tuple[int, int]:
        """n_out and n_in of its factors that are full matrices."""
        return self.n_out, 1 if self.indexed else self.n_in

    @property
    def plain(self) -> bool:
        """Whether it is a parameter alone, seen as one row; only its gradient summed over the batch is known then."""
        return self.geometry is PLAIN

    def views(self, stack: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parts of this layer's matrices (blocks, n_out, n_in) that belong to each parameter, in its shape."""
        columns = self.n_in - (self.bias is not None)
        if self.weight is not None:
            yield self.weight, self.geometry.view(stack[..., :columns], self.weight)
        if self.bias is not None:
            yield self.bias, stack[..., columns].view(self.bias.shape)

    def put(self, stack: Tensor, values: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Write one tensor per parameter into this layer's matrices (blocks, n_out, n_in); None is written as zero."""
        for parameter, view in self.views(stack):
            value = values(parameter)
            view.zero_() if value is None else view.copy_(value)

    def statistics(self, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype) -> Statistics:
        """Rows of one use of the module: see `Geometry.statistics`."""
        if self.order == SECOND:
            x, e = x.transpose(0, 1), e.transpose(0, 1)
        elif self.order == ROWS:
            batch = None
            if self.geometry.swaps:
                e = e.flatten(0, -2)
                x = x.flatten() if self.indexed else x.flatten(0, -2)
        parts = self.weight is not None, self.bias is not None
        return self.geometry.statistics(self.module, x, e, batch, dtype, parts)


def plain_layer(name: str, module: nn.Module, parameter: nn.Parameter) -> Layer:
    """A parameter without factors, as a matrix of one row."""
    return Layer(name, module, parameter, None, PLAIN, 1, 1, parameter.numel())


def make_layer(name: str, module: nn.Module, trainable: set[nn.Parameter]) -> Layer | None:
    """The layer of a supported module, or None where the module has no trainable parameter or is of another kind."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return None
    geometry = find_geometry(module)
    weight, bias = (module._parameters.get(part) for part in ("weight", "bias"))
    weight = weight if weight in trainable else None
    bias = bias if bias in trainable else None
    if geometry is None or (weight is None and bias is None):
        return None
    blocks, n_out, columns = geometry.shape(module)
    return Layer(
        name, module, weight, bias, geometry, blocks, n_out, (weight is not None) * columns + (bias is not None)
    )
