"""One forward and backward pass with the capture attached, and everything that it handed over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature import Batch, Capture, Curvature, Layer, Statistics
from grng.curvature.plan import find_layers

ENGINES = ("hooks", "backpack")


def quantity(statistics: Statistics, what: str) -> Any:
    """An attribute or method of the statistics; columns as a dense V."""
    if what == "columns":
        return lambda groups: statistics.columns(groups).dense()
    return getattr(statistics, what)


@dataclass
class Measured:
    """What one step saw: the layers by name, their statistics in order, and the batch."""

    layers: dict[str, Layer]
    uses: list[tuple[str, Statistics]]
    batch: Batch | None
    capture: Capture

    def total(self, name: str, what: str, *args: Any) -> Tensor:
        """A sum over all uses of a layer: `input_sum`, `output_sum`, `squared_gradients`, ..., or `rows`."""
        values = [quantity(s, what) for n, s in self.uses if n == name]
        return torch.stack([v(*args) if callable(v) else v for v in values]).sum(0)


class Attached:
    """A capture on a model; `step` runs what calls forward and backward, and returns what was measured."""

    def __init__(self, model: nn.Module, engine: str = "hooks", **settings: Any) -> None:
        trainable = {p for p in model.parameters() if p.requires_grad}
        layers, self.reasons = find_layers(model, trainable)
        self.model, self.layers, self.uses = model, {layer.name: layer for layer in layers}, []
        self.capture = Capture(model, layers, Curvature(capture=engine, **settings), self._sink)

    def _sink(self, layer: Layer, statistics: Statistics) -> None:
        self.uses.append((layer.name, statistics))

    def step(self, work: Callable[[], Any], collect_next: bool = True) -> Measured:
        self.uses = []
        work()
        self.capture.verify()
        measured = Measured(self.layers, self.uses, self.capture.batch, self.capture)
        self.capture.finish_step(collect_next)
        return measured


def measure(
    model: nn.Module, x: Any, loss: Callable[[Any], Tensor], engine: str = "hooks", **settings: Any
) -> Measured:
    """loss(model(x)).backward() under a capture that is closed afterwards."""
    attached = Attached(model, engine, **settings)
    model.zero_grad()
    try:
        return attached.step(lambda: loss(model(x)).backward())
    finally:
        attached.capture.close()
