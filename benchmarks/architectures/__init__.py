"""The architecture grid, as data: what GRNG claims of each, and the judge that measures it by brute force."""

from importlib.util import find_spec

from . import layers, libraries, structures
from .base import KINDS, Architecture, Claim

ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in (*layers.ROWS, *structures.ROWS, *libraries.ROWS)}


def available(row: Architecture) -> bool:
    """Whether the package that it comes from is installed."""
    return not row.needs or find_spec(row.needs) is not None


__all__ = ["ARCHITECTURES", "KINDS", "Architecture", "Claim", "available"]
