"""One forward pass of the model, what its backward passes amount to, and which of its outputs is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

if TYPE_CHECKING:
    from grng.curvature.engines import Pair, Use
    from grng.curvature.layers import Layer


@dataclass
class Context:
    """What the layers of one forward pass share: the batch size, and once the output gradient has arrived N and how
    many samples came before it in the same step.

    `waiting` holds the pairs of the user's own backward pass that come before N: those of a layer whose output is the
    model's. `calls` counts how often each layer was called, and `held` keeps the true gradients of those called several
    times until all are there. `closed` says that a backward pass has gone through.
    """

    normaliser: Tensor | None = None
    batch: int | None = None
    offset: int = 0
    waiting: list["Pair"] = field(default_factory=list)
    calls: dict["Layer", int] = field(default_factory=dict)
    held: dict["Layer", list["Pair"]] = field(default_factory=dict)
    closed: bool = False
    _task: int | None = None
    _trains: bool = True

    def trains(self, layers: Sequence["Layer"]) -> bool:
        """Whether the backward pass that runs reaches parameters: an attack's `autograd.grad(loss, x)` is no part of a
        step."""
        task = torch._C._current_graph_task_id()
        if self._task != task:
            self._task, self._trains = task, any(_reached(p) for layer in layers for p in layer.parameters)
        return self._trains


def _reached(p: nn.Parameter) -> bool:
    if not p.requires_grad:
        return False
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(p).node)
    except RuntimeError:  # autograd.grad() was asked for this very parameter
        return True


@dataclass
class Pass:
    """One forward pass of the model on a statistics step."""

    context: Context = field(default_factory=Context)
    uses: list["Use"] = field(default_factory=list)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    given: list[Tensor] = field(default_factory=list)  # the model's own inputs, of those that need a gradient

    def record(self, use: "Use") -> None:
        """A call of a layer."""
        self.uses.append(use)
        self.context.calls[use.layer] = self.context.calls.get(use.layer, 0) + 1

    def close(self, keep_graph: bool) -> None:
        """After a backward pass: its rows are counted, and nothing of it stays alive."""
        self.context.closed = True
        self.uses.clear()
        if not keep_graph:
            self.inputs.clear()
            self.given.clear()


@dataclass
class Batch:
    """What the backward passes since the last step amount to.

    Attributes:
        predictions: how many predictions the statistics were summed over.
        normaliser: N of the last backward pass; N * p.grad is the gradient of the summed loss.
        misfit: largest relative misfit of the likelihood.
        samples: samples seen, a Python number.
        valid: whether the step's gradient is finite; a bool on the device, set by the optimizer.
    """

    predictions: Tensor
    normaliser: Tensor
    misfit: Tensor
    samples: int
    valid: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))


def find_output(output: Any) -> Tensor | None:
    """The tensor that the loss is computed from: a tensor, `.logits`, a dict's "logits", or the first that has a graph.

    >>> find_output({"logits": torch.ones(1, requires_grad=True)}).tolist()
    [1.0]
    """
    if isinstance(output, Tensor):
        return output if output.requires_grad and output.is_floating_point() else None
    if isinstance(output, dict):
        return find_output(output["logits"]) if "logits" in output else _first(output.values())
    if hasattr(output, "logits"):
        return find_output(output.logits)
    return _first(output) if isinstance(output, list | tuple) else None


def _first(values: Any) -> Tensor | None:
    return next((f for f in map(find_output, values) if f is not None), None)
