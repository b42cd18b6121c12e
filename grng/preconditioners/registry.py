"""Preconditioners by name: built in, registered by decorator, or found among entry points."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from grng.errors import unknown
from grng.preconditioners.base import Preconditioner

ENTRY_POINTS = "grng.preconditioners"
_registry: dict[str, type[Preconditioner]] = {}


def register_preconditioner(name: str) -> Callable[[type[Preconditioner]], type[Preconditioner]]:
    """Class decorator: make a preconditioner available as `GRNG(model, preconditioner=name)`.

    A package can do the same without being imported first, by an entry point in the group `grng.preconditioners`.
    """

    def register(kind: type[Preconditioner]) -> type[Preconditioner]:
        if not (isinstance(kind, type) and issubclass(kind, Preconditioner)):
            raise TypeError(f"a preconditioner must derive from grng.preconditioners.Preconditioner, but is: {kind!r}")
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"preconditioner {name!r} is registered already, by {known.__module__}.{known.__qualname__}"
            )
        kind.name = name
        _registry[name] = kind
        return kind

    return register


def available_preconditioners() -> list[str]:
    """Names that `make_preconditioner` takes.

    >>> {"kfac", "ekfac", "kalman", "diagonal", "identity"} <= set(available_preconditioners())
    True
    """
    return sorted({*_registry, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def make_preconditioner(which: str | Preconditioner, **settings: Any) -> Preconditioner:
    """A preconditioner by name with its settings, or the instance itself.

    >>> make_preconditioner("kfac", solver="factored").solver
    'factored'
    """
    if isinstance(which, Preconditioner):
        if settings:
            raise TypeError(
                f"settings {sorted(settings)} belong to the constructor of the {which.name!r} that was passed"
            )
        return which
    if isinstance(which, str) and which not in _registry:
        for point in entry_points(group=ENTRY_POINTS):
            if point.name == which:
                register_preconditioner(which)(point.load())
    if not isinstance(which, str) or which not in _registry:
        raise unknown("preconditioner", which, available_preconditioners())
    return _registry[which](**settings)
