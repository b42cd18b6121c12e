"""One forward pass of the model, what its backward passes amount to, and which of its outputs is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

if TYPE_CHECKING:
    from grng.curvature.engines import Pair, Use
    from grng.curvature.layers import Layer


@dataclass
class Context:
    """What the layers of one forward pass share: the batch size, and once the output gradient has arrived N and how
    many samples came before it in the same step.

    `waiting` holds the pairs of the user's own backward pass that come before N: those of a layer whose output is the
    model's. `calls` counts how often each layer was called, and `held` keeps the true gradients of those called several
    times until all are there. `kind` says what becomes of the gradients of the backward pass that runs; `closed` that
    one has gone through, `epoch` when, and `looked` that it returned its gradients and left no graph of them: a look at
    them, as losses are weighted by, rather than a step's. `heard` is the last backward pass that came to the output.
    """

    normaliser: Tensor | None = None
    batch: int | None = None
    offset: int = 0
    waiting: list["Pair"] = field(default_factory=list)
    calls: dict["Layer", int] = field(default_factory=dict)
    held: dict["Layer", list["Pair"]] = field(default_factory=dict)
    closed: bool = False
    epoch: int = -1
    looked: bool = False
    left: bool = False
    kind: str = ""
    task: int = -1
    heard: int = -1

    def hears(self) -> bool:
        """Whether the backward pass that runs comes to the output for the first time."""
        before, self.heard = self.heard, torch._C._current_graph_task_id()
        return self.heard != before

    def meets(self, layers: Sequence["Layer"]) -> bool:
        """Whether this is the first that is seen of the backward pass that runs. Its kind is "" where it reaches no
        parameter: an attack's `autograd.grad(loss, x)` is no part of a step."""
        task = torch._C._current_graph_task_id()
        if self.task == task:
            return False
        self.task, self.kind = task, ""
        for kind in (_kind(p) for layer in layers for p in layer.parameters if p.requires_grad):
            self.kind = kind or self.kind
            if kind == LEFT:  # the first parameter's, as a rule
                break
        return True

    def close(self, epoch: int, differentiable: bool) -> None:
        """A backward pass has gone through."""
        self.closed, self.epoch = True, epoch
        self.looked, self.left = self.kind == RETURNED and not differentiable, self.kind == LEFT

    def reopen(self) -> None:
        """Another one is to be measured."""
        self.closed, self.normaliser = False, None
        self.waiting.clear()
        self.held.clear()


LEFT, RETURNED = "left in p.grad", "returned by autograd.grad()"


def _kind(p: nn.Parameter) -> str:
    try:
        return LEFT if torch._C._will_engine_execute_node(get_gradient_edge(p).node) else ""
    except RuntimeError:  # autograd.grad() was asked for this very parameter
        return RETURNED


def is_look() -> bool:
    """Whether the backward pass that runs returns gradients which nobody can train by alone: its graph is kept for
    another one, and there is none of the gradients."""
    return torch._C._autograd._get_current_graph_task_keep_graph() and not torch.is_grad_enabled()


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

    def close(self, keep_graph: bool, epoch: int, differentiable: bool) -> None:
        """After a backward pass: its rows are counted, and nothing of it stays alive, unless the graph does."""
        self.context.close(epoch, differentiable)
        if not keep_graph:
            self.uses.clear()
            self.inputs.clear()
            self.given.clear()


@dataclass
class Batch:
    """What the backward passes since the last step amount to.

    Attributes:
        predictions: how many predictions the statistics were summed over.
        normaliser: N; N * p.grad is the gradient of the summed loss. Of several backward passes with an N of their own,
            that by which as many predictions are weighed in all: sum B_i / sum (B_i / N_i).
        misfit: largest relative misfit of the likelihood.
        samples: samples seen, a Python number.
        valid: whether the step's gradient is finite; a bool on the device, set by the optimizer.
    """

    predictions: Tensor
    normaliser: Tensor
    misfit: Tensor
    samples: int
    valid: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))

    def joined(self, other: "Batch") -> "Batch":
        """This one and that of another backward pass of the step; one without predictions changes no N.

        >>> a, b = (Batch(torch.tensor(B), torch.tensor(N), torch.zeros(()), 1) for B, N in ((28.0, 56.0), (4.0, 8.0)))
        >>> a.joined(b).normaliser, a.joined(Batch(torch.tensor(0.0), torch.tensor(0.0), a.misfit, 1)).normaliser
        (tensor(32.), tensor(56.))
        """
        weights = [torch.where(part.normaliser > 0, part.predictions / part.normaliser, 0.0) for part in (self, other)]
        predictions, weight = self.predictions + other.predictions, weights[0] + weights[1]
        normaliser = torch.where(weight > 0, predictions / weight, other.normaliser)
        return Batch(predictions, normaliser, torch.maximum(self.misfit, other.misfit), self.samples + other.samples)


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


CAST = "ToCopyBackward0"


def origin(place: GradientEdge) -> GradientEdge:
    """The place in the graph behind casts: accelerate returns casts of what a model puts out, and the loss that the
    model has computed itself does not go through them.

    >>> x = torch.ones(2, requires_grad=True).sin()
    >>> origin(get_gradient_edge(x.bfloat16().float())).node is x.grad_fn
    True
    """
    node, number = place.node, place.output_nr
    while node.name() == CAST:
        before, its = node.next_functions[0]
        if before is None or before.name() == "torch::autograd::AccumulateGrad":
            break
        if before._input_metadata[its].device != node._input_metadata[number].device:
            break
        node, number = before, its
    return GradientEdge(node, number)
