"""Optimizers to compare with, and one spelling for all: `make_optimizer("adamw+gnp", model, gnp={"r": 0.05})`."""

from .adan import Adan
from .factory import OPTIMIZERS, Entry, make_optimizer, parts_of

__all__ = ["OPTIMIZERS", "Adan", "Entry", "make_optimizer", "parts_of"]
