"""The front end: which gradient is handed on to the optimizer.

GNP (SAM is its alpha = 1), ASAM and Explicit take further gradients of the same batch; AGR and ClipNorm change the one
that there is. `Regularized(base, regularizer)` puts them over any optimizer, `GRNG(..., regularizer=...)` inside.
"""

from grng.regularizers.agr import AGR, agr
from grng.regularizers.asam import ASAM
from grng.regularizers.base import Passes, Regularizer, Transform
from grng.regularizers.clip import ClipNorm
from grng.regularizers.explicit import Explicit
from grng.regularizers.frontend import FrontEnd
from grng.regularizers.gnp import GNP, SAM, gnp_repository
from grng.regularizers.registry import REGULARIZERS, make_regularizers
from grng.regularizers.regularized import Regularized
from grng.regularizers.schedule import WARMUPS, Schedule

__all__ = [
    "AGR",
    "ASAM",
    "GNP",
    "REGULARIZERS",
    "SAM",
    "WARMUPS",
    "ClipNorm",
    "Explicit",
    "FrontEnd",
    "Passes",
    "Regularized",
    "Regularizer",
    "Schedule",
    "Transform",
    "agr",
    "gnp_repository",
    "make_regularizers",
]
