"""Honest comparisons of optimizers: the same weights, batches and clock for all.

>>> from grng.benchmarks import CompareConfig, compare
>>> records = compare(CompareConfig(optimizers=("kfac", "adamw"), seeds=3, out="compare-out"))  # doctest: +SKIP
"""

from .compare import compare
from .config import CompareConfig
from .errors import InputError, MissingExtra
from .records import RunRecord

__all__ = ["CompareConfig", "InputError", "MissingExtra", "RunRecord", "compare"]
