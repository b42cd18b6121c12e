"""What a GradScaler tells, and when it is calling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]


@contextmanager
def under_scaler(optimizer: Any, closure: Closure | None) -> Iterator[bool]:
    """Whether GradScaler.step() is calling, which leaves what it found on the optimizer until its step has returned.

    Raises:
        RuntimeError: it hands on a closure: it has looked at gradients that the closure replaces.
    """
    scaled = hasattr(optimizer, "found_inf")
    try:
        if scaled and closure is not None:
            raise RuntimeError(
                "a closure was handed through GradScaler.step(), which has looked at other gradients than the closure "
                "leaves and cannot unscale these: take the passes before it, `for each in optimizer.passes(scaler):` "
                "and in it `with each: scaler.scale(loss).backward()`, and call scaler.step(optimizer)"
            )
        yield scaled
    except BaseException:
        for name in ("found_inf", "grad_scale"):  # the scaler does not take them away from a step that raised
            optimizer.__dict__.pop(name, None)
        raise


def as_scale(scale: Any) -> Tensor | None:
    """A loss scale, given as a number, a scalar tensor or a GradScaler, as a scalar.

    >>> as_scale(2.0)
    tensor(2., dtype=torch.float64)
    """
    if scale is None:
        return None
    value = scale.get_scale() if hasattr(scale, "get_scale") else scale
    return torch.as_tensor(value, dtype=torch.float64)
