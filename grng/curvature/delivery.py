"""From the pairs of a layer, input and output gradient, to statistics: one a layer and pass, handed to the sink."""

from collections.abc import Callable

import torch
from torch import Tensor

from grng.curvature.check import SelfCheck, warn
from grng.curvature.config import Curvature
from grng.curvature.engines import Pair
from grng.curvature.fisher import FisherReader
from grng.curvature.layers import Layer
from grng.curvature.order import ROWS
from grng.curvature.passes import Context
from grng.curvature.statistics import Statistics, SummedStatistics
from grng.kernels import full_precision


class Delivery:
    """Makes statistics of pairs.

    Args:
        config: the settings.
        fisher: whose labels the gradients are of.
        check: is told of calls that cannot be read.
        sink: called with every layer and its statistics.

    Attributes:
        layers: those that something was delivered of in the step.
    """

    def __init__(
        self, config: Curvature, fisher: FisherReader, check: SelfCheck, sink: Callable[[Layer, Statistics], None]
    ) -> None:
        self.config, self.fisher, self.check, self.sink = config, fisher, check, sink
        self.layers: set[Layer] = set()

    def __call__(self, layer: Layer, pairs: list[Pair], context: Context, draw: int = 0) -> None:
        """Hand on what the calls of a layer in one pass amount to."""
        read = [self.readable(layer, x, e, context) for _, x, e in pairs if e.numel()]
        parts = [statistics for statistics in read if statistics is not None]
        # Calls with one and the same batch: what they say of a sample belongs together, as positions of one call do.
        alike = context.batch is not None and layer.order != ROWS and {s.samples for s in parts} == {context.batch}
        if len(parts) > 1 and alike and not layer.plain:
            parts = [parts[0].joined(parts[1:])]
        for statistics in parts:
            if self.config.sharing == "reduce" and not layer.plain:
                statistics = statistics.reduced()
            statistics.offset, statistics.draw, statistics.drawn = context.offset, draw, not self.fisher.empirical
            statistics.aligned = context.batch is None or (statistics.samples == context.batch and layer.order != ROWS)
            self.layers.add(layer)
            self.sink(layer, statistics)

    def true(self, layer: Layer, x: Tensor, e: Tensor, context: Context) -> None:
        """A pair of the user's own backward pass, which brings one call after another."""
        if not self.fisher.empirical or context.closed:
            return
        assert context.normaliser is not None
        pair = layer, x, e * context.normaliser.to(e.dtype)
        if context.calls.get(layer, 1) > 1:
            context.held.setdefault(layer, []).append(pair)
        else:
            self(layer, [pair], context)

    def held(self, context: Context) -> None:
        """What has waited until all calls of its layer were there."""
        for layer, pairs in context.held.items():
            with torch.no_grad(), full_precision(pairs[0][2].device):
                self(layer, pairs, context)
        context.held.clear()

    def statistics(self, layer: Layer, x: Tensor, e: Tensor, context: Context) -> Statistics:
        """Those of one pair."""
        if layer.plain:
            gradient = e.reshape(1, 1, -1).to(self.config.factor_dtype(layer.owner))
            return SummedStatistics(gradient, context.batch or 1)  # type: ignore[return-value]
        return layer.statistics(x, e, context.batch, self.config.factor_dtype(layer.owner))

    def readable(self, layer: Layer, x: Tensor, e: Tensor, context: Context) -> Statistics | None:
        """None where a call is not what the layer's kind promises: the layer is given up then, visibly."""
        try:
            return self.statistics(layer, x, e, context)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            self.check.unfit(layer, error)
            if not layer.pending:  # of a kind that was not seen before
                layer.status, layer.reason = "failed", self.check.unfitness(layer)
                warn([layer])
            return None
