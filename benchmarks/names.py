"""The names of runs, OPTIMIZER[/LABEL], and the settings that stand under them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from grng.baselines import OPTIMIZERS, parts_of

from grng.regularizers import REGULARIZERS

from .errors import InputError


def optimizer_of(name: str) -> str:
    """What `make_optimizer` knows it by; the label only tells apart several settings of one optimizer.

    >>> optimizer_of("adamw+gnp/lr=0.01")
    'adamw+gnp'
    """
    return name.partition("/")[0]


def base_of(name: str) -> str:
    """The optimizer without its regularizers."""
    return optimizer_of(name).partition("+")[0]


def check_name(name: str) -> str:
    """Return `name` if a run can have it, else raise InputError."""
    try:
        parts_of(optimizer_of(name))
    except ValueError as error:
        raise InputError(str(error)) from None
    _, slash, label = name.partition("/")
    if slash and not (label.strip() and label.isprintable()):
        raise InputError(f"the label of {name!r} is empty or not printable: write OPTIMIZER/LABEL, or leave out the /")
    return name


def file_name(name: str) -> str:
    """`name` as a part of a file's name, on any system; no two names share one.

    >>> file_name("adamw+gnp/lr=0.01"), file_name("sgd/../a:b")
    ('adamw+gnp@lr=0.01', 'sgd@..@a%3Ab')
    """
    return quote(name, safe="+=,/").replace("/", "@")


def ordered(names: Iterable[str]) -> list[str]:
    """Names without repetition: as in the table of optimizers, the regularized after the plain, numbers by their size.

    >>> ordered(["adamw/lr=0.01", "adamw/lr=1e-05", "adamw", "ring+sam", "ring", "adamw"])
    ['ring', 'ring+sam', 'adamw', 'adamw/lr=1e-05', 'adamw/lr=0.01']
    """
    return sorted(set(names), key=rank)


def rank(name: str) -> Any:
    """The sort key of a name."""
    # Split at numbers, text and numbers take turns, so that like is compared with like.
    pieces = re.split(r"(\d+\.?\d*(?:e[+-]?\d+)?)", name.partition("/")[2])
    numbered = [float(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
    base = base_of(name)
    place = list(OPTIMIZERS).index(base) if base in OPTIMIZERS else len(OPTIMIZERS)
    return place, optimizer_of(name), numbered


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at KEY or REGULARIZER.KEY.

    >>> settings = {"lr": 0.1}
    >>> put(settings, "gnp.r", 0.05)
    >>> settings
    {'lr': 0.1, 'gnp': {'r': 0.05}}
    """
    if not is_key(path):
        raise InputError(f"{path!r} is no setting: write KEY or REGULARIZER.KEY, as in lr or gnp.r")
    regularizer, dot, key = path.rpartition(".")
    (settings.setdefault(regularizer, {}) if dot else settings)[key] = value


def is_key(path: str) -> bool:
    """Whether `path` is KEY or REGULARIZER.KEY."""
    regularizer, dot, key = path.rpartition(".")
    return key.isidentifier() and (not dot or regularizer in REGULARIZERS)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of the regularizers among them.

    >>> flat({"lr": 0.1, "gnp": {"r": 0.05}})
    {'lr': 0.1, 'gnp.r': 0.05}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        found |= {f"{key}.{name}": item for name, item in inner} if inner else {key: value}
    return found


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under`, overridden one by one by what `over` holds, in tables within tables too.

    >>> merge({"adamw": {"lr": 0.1, "eps": 1e-8}}, {"adamw": {"lr": 0.2}})
    {'adamw': {'lr': 0.2, 'eps': 1e-08}}
    """
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], Mapping) and isinstance(over[key], Mapping):
            merged[key] = merge(under[key], over[key])
    return merged
