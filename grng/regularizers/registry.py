"""The regularizers by name, for recipes and command lines."""

from collections.abc import Callable, Mapping
from typing import Any

from grng.errors import unknown
from grng.regularizers.agr import AGR
from grng.regularizers.asam import ASAM
from grng.regularizers.base import Regularizer
from grng.regularizers.clip import ClipNorm
from grng.regularizers.explicit import Explicit
from grng.regularizers.gnp import GNP, SAM, gnp_repository

REGULARIZERS: Mapping[str, Callable[..., Regularizer | list[Regularizer]]] = {
    "gnp": GNP,
    "gnp-repository": gnp_repository,
    "sam": SAM,
    "asam": ASAM,
    "explicit": Explicit,
    "agr": AGR,
    "clip": ClipNorm,
}


def make_regularizers(name: str, **settings: Any) -> list[Regularizer]:
    """The regularizer of that name, as the list that it is or begins.

    >>> make_regularizers("gnp", r=0.1)[0].r
    0.1
    """
    if name not in REGULARIZERS:
        raise unknown("regularizer", name, REGULARIZERS)
    found = REGULARIZERS[name](**settings)
    return found if isinstance(found, list) else [found]
