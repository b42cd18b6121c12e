"""How the rows of a layer stand to the samples of a batch: asked of the graph, as shapes cannot tell.

(samples, positions, n) and (positions, samples, n) look alike, and so do rows that were sorted by expert. But what the
model puts out for one sample depends on the rows of that sample alone: the gradients of the first and of the last
sample's outputs show whose rows are whose.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from grng.curvature.geometry import samples_of

FIRST = "first"  # samples are the leading dimension, or neighbouring parts of it
SECOND = "second"  # positions come first
ROWS = "rows"  # in no such order: every row counts as a sample
UNKNOWN = "unknown"  # taken for FIRST
ORDERS = (UNKNOWN, FIRST, SECOND, ROWS)  # each prevails over those before it
EITHER = "first or second"  # positions do not look at each other; it is as with the other layers
MIXED = "mixed"  # a sample depends on rows of others, as in BatchNorm
SHARED = "shared"  # the same, where there are no positions within a row: the layer may be called once for all samples
PATIENCE = 4  # passes of the model


class RowOrder:
    """Finds the order of every layer, and the axis of the model's output along which the samples lie.

    Args:
        coupled: whether the model may couple the samples of a batch, as BatchNorm does.

    Attributes:
        axis: 0; or 1, where that keeps samples apart in more of the layers.
    """

    def __init__(self, coupled: bool) -> None:
        self.coupled, self.axis, self._asked = coupled, 0, 0

    def samples(self, f: Tensor) -> int:
        """How many samples the model's output is of."""
        return f.shape[self.axis if f.ndim > self.axis else 0] if f.ndim else 1

    def ask(
        self, layers: Sequence[Any], f: Tensor, pairs: Callable[[Tensor], Iterable[tuple[Any, Tensor, Tensor]]]
    ) -> None:
        """Settle layers whose order is not known yet, at the cost of two backward passes, or four.

        Args:
            layers: all layers.
            f: the model's output.
            pairs: a layer, its input and the gradient at its output, for every use, given a gradient at f.
        """
        if not f.ndim or self._asked == PATIENCE:
            return
        if self.samples(f) < 2 or all(layer.order != UNKNOWN or not layer.active for layer in layers):
            return
        self._asked += 1
        before: set[Any] | None = None  # layers in which the samples along the first axis are mixed
        for axis in (0, 1)[: 1 + (f.ndim > 2)]:
            try:
                orders = _orders(f, axis, pairs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # no nested pass goes through this graph
                return
            mixed = {layer for layer, order in orders.items() if order in (MIXED, SHARED)}
            swapped = SECOND in orders.values()
            if before is None or (swapped and mixed < before):
                self.axis = axis
                of_all = ROWS if not self.coupled and len(mixed) < len(orders) else FIRST  # as embeddings of places
                meant = {MIXED: FIRST, SHARED: of_all, EITHER: SECOND if swapped else FIRST}
                for layer, order in orders.items():
                    layer.order = meant.get(order, order)
            if not mixed:
                return
            before = mixed


def _orders(f: Tensor, axis: int, pairs: Callable[[Tensor], Iterable[tuple[Any, Tensor, Tensor]]]) -> dict[Any, str]:
    batch, ends = f.shape[axis], list[list[tuple[Any, Tensor]]]()
    for sample in (0, batch - 1):
        cotangent = torch.zeros_like(f)
        part = cotangent.select(axis, sample)
        part.copy_(torch.linspace(1, 2, part.numel()).view(part.shape))  # not all ones, which a softmax would hide
        ends.append([(layer, seen_rows(e, layer.geometry.swaps)) for layer, _, e in pairs(cotangent)])
    found: dict[Any, set[str]] = {}
    for (layer, first), (_, last) in zip(*ends, strict=True):
        found.setdefault(layer, set()).add(order_of(first, last, batch))
    return {layer: _joint(orders) for layer, orders in found.items()}


def seen_rows(e: Tensor, swaps: bool) -> Tensor:
    """Which rows have a gradient: one bool a row where any dimensions may come before the last, else (samples, 1).
    None has, where one is not finite."""
    seen = (e != 0).any(-1) if swaps or e.ndim < 2 else (e != 0).flatten(1).any(1, keepdim=True)
    return seen & e.isfinite().all()


def _joint(orders: set[str]) -> str:
    """That of all uses of a layer."""
    for order in (MIXED, SHARED):
        if order in orders:
            return order
    telling = orders - {UNKNOWN, EITHER} or orders - {UNKNOWN} or orders
    return ROWS if len(telling) > 1 else telling.pop()


def order_of(first: Tensor, last: Tensor, batch: int) -> str:
    """The order of a layer's rows in one use.

    Args:
        first, last: the rows that the first and the last sample depend on, as `seen_rows` gives them.
        batch: samples in the batch.

    >>> first, last = torch.zeros(2, 4, 3, dtype=torch.bool)  # three samples of four positions
    >>> first[:, 0], last[:, 2] = True, True
    >>> order_of(first, last, batch=3)
    'second'
    """
    if batch < 2 or not first.ndim:
        return FIRST
    if not (bool(first.any()) and bool(last.any())):
        return UNKNOWN
    count = samples_of(len(first), len(first), batch)
    leading = _apart(first.reshape(count, -1), last.reshape(count, -1), batch)
    second = first.ndim > 1 and _apart(first.transpose(0, 1).flatten(1), last.transpose(0, 1).flatten(1), batch)
    if leading or second:
        return EITHER if leading and second else FIRST if leading else SECOND
    if not bool((first & last).any()):
        return ROWS
    return SHARED if first.ndim == 1 else MIXED


def _apart(first: Tensor, last: Tensor, batch: int) -> bool:
    """Whether each of the two lies in one row, and not in the same; where rows are samples, in the first and last."""
    i, j = (rows.any(1).nonzero().flatten().tolist() for rows in (first, last))
    if (len(i), len(j)) != (1, 1):
        return False
    return i != j if len(first) != batch else (i, j) == ([0], [batch - 1])
