"""One way to say that an argument is wrong: its name, its value, the values that are right, and the remedy."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any

from torch import Tensor


class GRNGWarning(UserWarning):
    """A visible fallback: training goes on, but not as was asked."""


def finite(value: Any) -> bool:
    """Whether it is a finite number, or a tensor of one, for settings that are filled anew.

    >>> import torch
    >>> finite(1), finite(float("inf")), finite("1"), finite(True), finite(torch.ones(1))
    (True, False, False, False, True)
    """
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)


def invalid(name: str, value: object, expected: str, remedy: str = "") -> ValueError:
    """The error for a bad argument.

    >>> print(invalid("lr", -1.0, "a number >= 0"))
    lr must be a number >= 0, but is: -1.0
    """
    return ValueError(f"{name} must be {expected}, but is: {value!r}" + (f". {remedy}" if remedy else ""))


def unknown(name: str, value: object, choices: Iterable[str], remedy: str = "") -> ValueError:
    """The error for a name that is not among the known ones.

    >>> print(unknown("variant", "rong", ["ring", "reng"]))
    unknown variant 'rong'; choose one of: ring, reng. Did you mean 'ring'?
    """
    known = list(choices)
    close = get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"unknown {name} {value!r}; choose one of: {', '.join(known)}.{hint}" + (f" {remedy}" if remedy else "")
    )


def check_nonnegative(name: str, value: object) -> None:
    """Refuse what is not a finite number >= 0.

    >>> check_nonnegative("lr", 0.1)
    """
    if not (finite(value) and value >= 0):  # type: ignore[operator]
        raise invalid(name, value, "a finite number >= 0")


def check_real(params: Iterable[Tensor]) -> None:
    """Refuse parameters that are complex, whose gradients the formulas do not cover, or no floating-point numbers."""
    for p in params:
        if not p.is_floating_point():
            remedy = "torch.view_as_real has two real numbers for every complex one."
            raise invalid("the dtype of a parameter", p.dtype, "real and floating-point", remedy)
