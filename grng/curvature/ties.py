"""What is measured belongs to the gradients in p.grad that came with it: where those are dropped, it goes too."""

import warnings
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from grng.curvature.layers import Layer
from grng.curvature.passes import LEFT, RETURNED, Context, is_look
from grng.errors import GRNGWarning

OUTSIDE = -1  # in place of the number of a backward pass: passes() has put gradients there


class Ties:
    """Between the backward passes of one step that were measured and the gradients that they left.

    Args:
        layers: those whose gradients are looked at.
        drop: called where the gradients are gone.
    """

    def __init__(self, layers: list[Layer], drop: Callable[[], None]) -> None:
        self._layers, self._drop = layers, drop
        self.epoch = 0  # counts how often what was measured was forgotten
        self._counted: int | None = None  # the last backward pass that was measured and left its gradients in p.grad
        self._stale = False  # what was measured in this step was dropped, as its gradients were gone
        self._left: tuple[nn.Parameter, Tensor] | None = None  # one of the gradients that were left since
        self._told = False  # of a second backward pass

    def measures(self, context: Context) -> bool:
        """Whether the backward pass that runs is part of a step; at first sight of it, what was measured before is
        looked at."""
        if context.meets(self._layers) and context.kind:
            self._drop_stale(context.task)
            if context.kind == RETURNED and self._counted is not None and is_look():
                context.kind = ""  # nothing could be taken back of what it adds to the backward passes before it
            elif context.closed:
                self._walk_again(context)
        return bool(context.kind)

    def measured(self, context: Context) -> None:
        """The backward pass that runs is."""
        if context.kind == LEFT:
            self._counted = context.task

    def ended(self) -> None:
        """A backward pass has gone through."""
        if self._stale:
            self._left = next(((p, p.grad) for p in self._owners() if p.grad is not None), None)

    def _walk_again(self, context: Context) -> None:
        """A graph that a backward pass went through before: it is measured once, unless that is forgotten, or was a
        look at gradients before the first of the step's own."""
        if context.looked and context.kind == LEFT and self._counted is None:
            self._drop()
        if context.epoch != self.epoch:
            context.reopen()

    def warn_repeated(self, context: Context) -> None:
        """Say once that the output that is read is gone through again, by a pass that leaves its gradient too."""
        if context.left and context.kind == LEFT and not self._told:
            self._told = True
            warnings.warn(
                "a second backward() went through one forward pass of the model: its gradient is in p.grad, and the "
                "curvature is that of the first one's loss alone. Add the losses up, and call backward() once",
                GRNGWarning,
                stacklevel=2,
            )

    def _owners(self) -> Iterator[nn.Parameter]:
        return (p for layer in self._layers for p in layer.parameters if p.requires_grad)

    def _gradients_are_there(self) -> bool:
        return any(p.grad is not None for p in self._owners())

    def _drop_stale(self, task: int | None) -> None:
        """Where somebody has dropped the gradients of this step, as model.zero_grad() does, what was measured along
        with them goes too."""
        if self._counted not in (None, task) and not self._gradients_are_there():
            self._drop()
            self._stale = True

    def begin_passes(self, taken: bool) -> None:
        """The passes of a step begin; `taken`: gradients of before are taken away meanwhile."""
        self._drop_stale(None)
        if taken:
            self._counted = None

    def end_passes(self, anything: bool) -> None:
        """They have ended; `anything`: something was measured."""
        self._counted = OUTSIDE if anything and self._gradients_are_there() else None

    def warn_put_back(self) -> None:
        """Say where the gradients that were gone have come back: what was measured along with them is lost."""
        if self._stale and self._left is not None and self._counted != OUTSIDE:
            p, gradient = self._left
            if p.grad is not gradient and p.grad is not None:
                warnings.warn(
                    "gradients were taken away between backward passes, and others put in their place before step(): "
                    "the curvature is that of the last backward pass alone. Let backward() add them up in p.grad",
                    GRNGWarning,
                    stacklevel=6,
                )

    def forget(self) -> None:
        """What was measured is forgotten."""
        self.epoch, self._counted = self.epoch + 1, None

    def finish_step(self) -> None:
        self._stale, self._left = False, None
