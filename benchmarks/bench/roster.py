"""Who takes part: a row of the roster, any name of `grng compare`, or an optimizer of the user's own.

One line: `--optimizer torch.optim:RAdam`, MODULE:CLASS. One file: `--optimizer mine.py`, which defines

    def build(params, lr=1e-3, **settings): ...         # or build(model, ...): returns the optimizer
                                                        # whose step() is given a closure if it asks for one
    SPACE = {"lr": (1e-4, 1e-1), "damping": (1e-3, 1)}  # what is searched, on a log scale, besides the horizon
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from grng.baselines import OPTIMIZERS, register_optimizer

from ..errors import InputError
from ..names import base_of, check_name, is_key, optimizer_of
from ..records import hash_of
from .search import DIMENSIONS
from .spaces import HORIZON, PLAIN, ROSTER, SPACES, Contestant, Dimension

OWN: dict[str, Contestant] = {}  # those of the user that were asked for


def contestant_of(name: str) -> Contestant:
    """The contestant of that name, registered if it is the user's own.

    >>> [d.name for d in contestant_of("torch.optim:RAdam").space]
    ['lr', 'horizon', 'weight_decay']

    Raises:
        InputError: nothing of that name can be found or built.
    """
    rows = OWN | {contestant.name: contestant for contestant in ROSTER}
    if name in rows:
        return rows[name]
    if name.endswith(".py"):
        return from_file(Path(name).expanduser())
    if ":" in name:
        return from_module(name)
    check_name(name)
    for known in (optimizer_of(name), base_of(name)):  # regularized as the row without, but for a row of its own
        if known in rows:
            return replace(rows[known], name=name)
    return Contestant(name, SPACES.get(base_of(name), PLAIN))


def own_name(name: str) -> str:
    """The name that an optimizer of the user's own gets, of what it is given by; other names stay.

    >>> own_name("src/Mine.py"), own_name("torch.optim:RAdam"), own_name("adamw+gnp")
    ('mine', 'radam', 'adamw+gnp')
    """
    if name.endswith(".py"):
        return Path(name).stem.lower()
    return name.partition(":")[2].lower() if ":" in name else name


def from_module(name: str) -> Contestant:
    where, _, what = name.partition(":")
    try:
        with beside(Path.cwd()):
            found = getattr(importlib.import_module(where), what)
    except Exception as error:
        raise InputError(f"no optimizer {name!r} ({error}): give MODULE:CLASS, as in torch.optim:RAdam") from error
    if not callable(found):
        raise InputError(f"{name!r} is {found!r}, no optimizer: give MODULE:CLASS, as in torch.optim:RAdam")
    taken = parameters_of(found)
    space = tuple(d for d in PLAIN if d is HORIZON or taken is None or d.name in taken)
    known = OPTIMIZERS.get(own_name(name))
    return registered(
        f"{where}.{what}".lower() if known and known.own else own_name(name), found, space, file_of(found)
    )


def parameters_of(build: Any) -> set[str] | None:
    """The names of its arguments; None where it takes any."""
    parameters = inspect.signature(build).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Modules in that folder can be imported too."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def from_file(path: Path) -> Contestant:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.exists() else None
    if spec is None or spec.loader is None:
        raise InputError(f"no file {str(path)!r}: give a Python file with a function `build`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, "build", None)):
        raise InputError(f"{path} defines no function `build`: it is called with the parameters or with the model")
    return registered(own_name(path.name), module.build, space_of(module, path), path)


def space_of(module: ModuleType, path: Path) -> tuple[Dimension, ...]:
    space: Any = getattr(module, "SPACE", None)
    if space is None:
        return PLAIN
    try:
        dimensions = [Dimension(name, float(low), float(high)) for name, (low, high) in space.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"SPACE in {path} is {space!r}: write {{'lr': (1e-4, 1e-1)}}") from error
    for d in dimensions:
        if not (isinstance(d.name, str) and is_setting(d.name)):
            raise InputError(f"SPACE in {path}: {d.name!r} is no setting: write KEY, as in lr")
        if d.name == "horizon":
            raise InputError(f"SPACE in {path} holds the horizon, which all search alike: leave it out")
        if not 0 < d.low < d.high < math.inf:
            raise InputError(f"SPACE in {path}: {d.name} has the bounds {d.low:g}, {d.high:g}: give 0 < low < high")
    if len(dimensions) >= DIMENSIONS:
        raise InputError(
            f"SPACE in {path} has {len(dimensions)} dimensions: all search {DIMENSIONS}, of which one is the horizon; "
            f"keep {DIMENSIONS - 1}"
        )
    return (*dimensions[:1], HORIZON, *dimensions[1:])


def is_setting(name: str) -> bool:
    """Whether a dimension may have that name."""
    return is_key(name.removeprefix("1-"))


def file_of(found: Any) -> Path | None:
    """Where it is defined, as far as that is known."""
    try:
        file = Path(inspect.getfile(found))
    except TypeError:
        return None
    return file if file.is_file() else None


def registered(name: str, build: Any, space: tuple[Dimension, ...], file: Path | None) -> Contestant:
    try:
        register_optimizer(name, build, "given by the user")
    except ValueError as error:
        raise InputError(str(error)) from error
    OWN[name] = Contestant(name, space, code=hash_of(file.read_bytes().hex()) if file else "")
    return OWN[name]
