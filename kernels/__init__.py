"""Pure functions on stacked tensors; none of them knows a module, a parameter or an optimizer.

Shapes: `k` matrices of one shape are stacked along the first axis. Inputs are `x: (k, B, T, n_in)` and output
gradients `e: (k, B, T, n_out)` for B samples with T shared positions each; factors are `(k, n, n)`; gradients and
directions are `(k, n_out, n_in)`.
"""

from grng.kernels.average import ema_
from grng.kernels.columns import Columns, DenseColumns, IndexColumns, Part, by_group, pieces
from grng.kernels.einsum import contract
from grng.kernels.gram import gram, squared_gradients
from grng.kernels.norms import norms
from grng.kernels.precision import full_precision
from grng.kernels.precondition import (
    factored_precondition,
    kron_product,
    kron_spectrum,
    leading,
    pi_split,
    rotate,
    rotate_back,
    rotated_diagonal,
    sandwich_costs,
)
from grng.kernels.solve import damped_inverse, eigh, newton_inverse
from grng.kernels.woodbury import (
    absorb_,
    gain,
    identity_plus,
    propagate_fd,
    propagate_kron_,
    propagate_vd,
    root_or_nan,
    semidefinite_root,
)

__all__ = [
    "Columns",
    "DenseColumns",
    "IndexColumns",
    "Part",
    "absorb_",
    "by_group",
    "contract",
    "damped_inverse",
    "eigh",
    "ema_",
    "factored_precondition",
    "full_precision",
    "gain",
    "gram",
    "identity_plus",
    "kron_product",
    "kron_spectrum",
    "leading",
    "newton_inverse",
    "norms",
    "pi_split",
    "pieces",
    "propagate_fd",
    "propagate_kron_",
    "propagate_vd",
    "root_or_nan",
    "rotate",
    "rotate_back",
    "rotated_diagonal",
    "sandwich_costs",
    "semidefinite_root",
    "squared_gradients",
]
