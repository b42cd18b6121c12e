"""One way to say that an argument is wrong: its name, its value, the values that are right, and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class GRNGWarning(UserWarning):
    """A visible fallback: training goes on, but not as was asked."""


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
