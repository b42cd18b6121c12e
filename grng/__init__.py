"""GRNG: gradient-regularized natural gradients for PyTorch."""

from importlib.metadata import PackageNotFoundError, version

from grng.checkup import check
from grng.curvature import Curvature
from grng.errors import GRNGWarning
from grng.optimizer import GRNG
from grng.preconditioners import register_preconditioner

try:
    __version__ = version("grng")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["GRNG", "Curvature", "GRNGWarning", "__version__", "check", "register_preconditioner"]
