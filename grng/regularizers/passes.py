"""One forward and backward pass, the gradients that it leaves, and what may surround it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ByParameter = dict[nn.Parameter, Tensor]


class Pass(AbstractContextManager[None]):
    """One forward and backward pass, and the gradients that it left."""

    def __init__(self, params: list[nn.Parameter], contexts: list[AbstractContextManager[Any]]) -> None:
        self.params, self.contexts = params, contexts
        self._gradients: ByParameter | None = None

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context)
            self.stack = stack.pop_all()

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:  # before the weights are restored, and with them their precision
            self._gradients = {p: p.grad for p in self.params if p.grad is not None}
        self.stack.__exit__(kind, *exception)

    @property
    def gradients(self) -> ByParameter:
        if self._gradients is None:
            raise RuntimeError("a pass was not taken: write `for each in optimizer.passes():` and in it `with each:`")
        refuse_sparse(self._gradients)
        return self._gradients


class PutBack(AbstractContextManager[None]):
    """Where the passes end in an exception, p.grad is what it was before."""

    def __init__(self, params: list[nn.Parameter], before: ByParameter) -> None:
        self.params, self.before = params, before

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is not None:
            for p in self.params:
                p.grad = self.before.get(p)


@contextmanager
def true_gradients(modules: list[nn.Module]) -> Iterator[None]:
    """Modules that hand on another gradient than that of what they computed (Shake-Shake), and have a switch
    `true_gradient`, hand on the true one within: what the weights are displaced along is the loss's gradient."""
    before = [module.true_gradient for module in modules]
    try:
        for module in modules:
            module.true_gradient = True  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.true_gradient = value


def clear(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = None


def refuse_sparse(gradients: ByParameter) -> None:
    """Raise RuntimeError where a gradient is sparse."""
    sparse = [tuple(p.shape) for p, g in gradients.items() if g.layout != torch.strided]
    if sparse:
        raise RuntimeError(
            f"regularizers take dense gradients, but parameters of these shapes have sparse ones: {sparse}. Build the "
            "embedding with sparse=False"
        )
