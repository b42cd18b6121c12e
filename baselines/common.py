"""What every baseline's step() begins with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, called with gradients even where step() runs without.

    >>> with torch.no_grad():
    ...     evaluated(torch.is_grad_enabled)
    True
    """
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def refuse_sparse(name: str, params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where one of the parameters has a sparse gradient."""
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise RuntimeError(f"{name} takes no sparse gradients: build the embedding with sparse=False")
