"""The self-check: the captured pairs of a layer reproduce what autograd has accumulated, sum e x^T == p.grad."""

import math
import warnings

import torch
from torch import Tensor, nn

from grng.curvature.layers import Layer
from grng.curvature.likelihood import tolerance
from grng.curvature.statistics import Statistics
from grng.errors import GRNGWarning

NOT_CALLED = "no call was captured: its weights are used outside its forward()"
NOT_READ = "the loss reaches it, but not through the model's output that is read"
NO_LABEL = "no label can be drawn for its curvature"


class SelfCheck:
    """What one step's backward passes brought for layers that are not verified yet, beside the change of p.grad."""

    def __init__(self) -> None:
        self._sums: dict[Layer, Tensor] = {}
        self._precision: dict[Layer, tuple[float, Tensor | float]] = {}  # relative and absolute
        self._unfit: dict[Layer, str] = {}  # why the rows of a layer cannot be read
        self._idle: set[Layer] = set()  # called with nothing
        self._before: dict[nn.Parameter, Tensor | None] = {}
        self._after: dict[nn.Parameter, Tensor] = {}

    def begin(self, layer: Layer) -> None:
        """Keep the gradients that a backward pass will add to; where those that it left were changed, start anew."""
        changed = any(p in self._after and not _same(p.grad, self._after[p]) for p in layer.parameters)
        if changed:
            self._sums.pop(layer, None)
            self._precision.pop(layer, None)
        for p in layer.parameters:
            if changed or p not in self._before:
                self._before[p] = None if p.grad is None else p.grad.detach().clone()
                self._after.pop(p, None)

    def begin_backward(self) -> None:
        """Look again: gradients may have been zeroed since the forward pass."""
        for p in self._before.keys() - self._after.keys():
            self._before[p] = None if p.grad is None else p.grad.clone()

    def add(self, layer: Layer, x: Tensor, e: Tensor, statistics: Statistics) -> None:
        """A pair of the user's own backward pass."""
        gradient = statistics.gradient()
        self._sums[layer] = self._sums[layer] + gradient if layer in self._sums else gradient
        real = [t for t in (x, e, layer.owner) if t.is_floating_point()]
        rounding = 20 * max(torch.finfo(t.dtype).eps for t in real) * statistics.magnitude()
        relative, absolute = self._precision.get(layer, (0.0, 0.0))
        self._precision[layer] = max(relative, tolerance(*real)), absolute + rounding

    def unfit(self, layer: Layer, error: Exception) -> None:
        """A call of a layer is not what its kind promises."""
        self._unfit[layer] = str(error).partition("\n")[0]

    def unfitness(self, layer: Layer) -> str:
        """Why, in words."""
        return f"its calls cannot be read: {self._unfit[layer]}"

    def idle(self, layer: Layer) -> None:
        """A layer was called with an empty batch."""
        self._idle.add(layer)

    def note(self, p: nn.Parameter, gradient: Tensor) -> None:
        """The gradient that the backward pass left, before anybody clips or rescales it."""
        if p in self._before:
            self._after[p] = gradient.detach().clone()

    def judge(self, layers: list[Layer], delivered: set[Layer], read: bool, empirical: bool) -> list[Layer]:
        """Settle the status of pending layers that a gradient has arrived at; return those that failed. A look at
        values, once a layer.

        Args:
            layers: the pending ones.
            delivered: those whose statistics the model's output has reached.
            read: whether an output was read at all.
            empirical: whether true labels were used.
        """
        failed: list[Layer] = []
        for layer in layers:
            if not any(p in self._after for p in layer.parameters):
                continue
            reason = self._reason(layer, layer in delivered, read, empirical)
            if reason:
                layer.status, layer.reason = "failed", reason
                failed.append(layer)
            elif reason is not None:
                layer.status = "verified"
        warn(failed)
        return failed

    def _reason(self, layer: Layer, delivered: bool, read: bool, empirical: bool) -> str | None:
        """Why a layer fails; empty where it does not; None where that cannot be told yet."""
        if layer.plain:  # autograd's own gradient
            if delivered or not read:
                return "" if delivered else None
            return NO_LABEL if empirical else NOT_READ
        if layer in self._unfit:
            return self.unfitness(layer)
        if layer not in self._sums:
            return None if layer in self._idle else NOT_CALLED
        if not any(bool(t.any()) for t in (self._sums[layer], *map(self._change, layer.parameters)) if t is not None):
            return None  # nothing equals nothing, as behind a last layer that begins at zero
        errors = [self._miss(layer, p, mine) for p, mine in layer.views(self._sums[layer])]
        if any(map(math.isnan, errors)):
            return None  # not finite: the step is skipped, the layer is checked at the next
        if max(errors) > 0:
            return (
                f"the captured pair misses the gradient by {max(errors):.2g} (shared or transformed weights, or "
                "derivatives of the model in the loss; passes that are no part of the step belong in opt.paused())"
            )
        if not read:
            return None
        return "" if delivered else NOT_READ

    def _change(self, p: nn.Parameter) -> Tensor | None:
        """What the backward pass has added to a gradient."""
        if p not in self._after:
            return None
        before = self._before[p]
        return self._after[p] if before is None else self._after[p] - before

    def _miss(self, layer: Layer, p: nn.Parameter, mine: Tensor) -> float:
        """Relative error of the captured gradient of a parameter; 0 where rounding explains it."""
        theirs = self._change(p)
        if theirs is None:
            return 0.0
        relative, absolute = self._precision[layer]
        before = self._before[p]
        # Under accumulation the difference carries the rounding errors of what was there before.
        size = float(theirs.norm()) + (0.0 if before is None else float(before.norm()))
        allowed = relative * size + float(absolute)
        stray = (mine - theirs).flatten()
        error = float(stray.norm())
        if error > allowed:
            # A weight penalty in the loss adds a multiple of the weights, which no layer sees.
            w = p.detach().flatten().to(stray.dtype)
            error = float((stray - w * (stray @ w / (w @ w).clamp(min=1e-30))).norm())
        return 0.0 if error <= allowed else error / max(size, 1e-30)

    def forget(self) -> None:
        """Drop what backward passes have brought, not what stood in p.grad before."""
        for found in (self._sums, self._precision, self._unfit, self._idle, self._after):
            found.clear()

    def end(self) -> None:
        """Drop all of a step."""
        self.forget()
        self._before.clear()


def warn(failed: list[Layer]) -> None:
    """Say which layers the fallback trains from now on."""
    for layer in failed:
        warnings.warn(
            f"GRNG trains {layer.name or 'the model'} by the first-order fallback: {layer.reason}",
            GRNGWarning,
            stacklevel=5,
        )


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a, b)
