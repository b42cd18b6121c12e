"""What the baselines share: how a step() begins, and which settings are refused."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grng.errors import finite, invalid

COUNTS = {2: "two", 3: "three"}


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


def check_betas(betas: Any, count: int) -> None:
    """Refuse what are not `count` numbers in [0, 1).

    >>> check_betas((0.9, 0.99), 2)
    """
    if not (isinstance(betas, tuple | list) and len(betas) == count and all(finite(b) and 0 <= b < 1 for b in betas)):
        raise invalid("betas", betas, f"{COUNTS[count]} numbers in [0, 1)")
