"""Which direction is made of a gradient: the protocol, the registry, and the methods."""

from grng.preconditioners.base import Group, Moment, Preconditioner, Stacked, make_groups
from grng.preconditioners.conformance import check_preconditioner
from grng.preconditioners.diagonal import Diagonal
from grng.preconditioners.ekfac import EKFAC
from grng.preconditioners.identity import Identity
from grng.preconditioners.kalman import Kalman
from grng.preconditioners.kfac import KFAC
from grng.preconditioners.registry import available_preconditioners, make_preconditioner, register_preconditioner

__all__ = [
    "EKFAC",
    "KFAC",
    "Diagonal",
    "Group",
    "Identity",
    "Kalman",
    "Moment",
    "Preconditioner",
    "Stacked",
    "available_preconditioners",
    "check_preconditioner",
    "make_groups",
    "make_preconditioner",
    "register_preconditioner",
]
