"""Optimizers to compare with, and one spelling for all: `make_optimizer("adamw", model, lr=1e-3)`."""

from .factory import OPTIMIZERS, Entry, make_optimizer

__all__ = ["OPTIMIZERS", "Entry", "make_optimizer"]
