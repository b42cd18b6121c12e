"""The gain of a Kalman update and the propagation of its covariance, without a d x d matrix.

The parameters' d coordinates may lie in several blocks (layers); V, q V and the gradients are then lists with one entry
a block, V of shape (m, d_block), and the m x m system couples the blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def woodbury_matrix(V: Sequence[Tensor], qV: Sequence[Tensor]) -> Tensor:
    """I_m + V^T q V, summed over blocks, for V given as rows (m, d)."""
    m = V[0].shape[0]
    M = torch.eye(m, dtype=V[0].dtype, device=V[0].device)
    for v, qv in zip(V, qV, strict=True):
        M = torch.addmm(M, v, qv.mT)
    return M


def woodbury_direction(qg: Sequence[Tensor], V: Sequence[Tensor], qV: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The Kalman step of a summed gradient g under the prior q and curvature V V^T.

        D = -(q^{-1} + V V^T)^{-1} g = -[ q g - q V (I_m + V^T q V)^{-1} V^T q g ]

    q enters only through q g and q V, so that it may be diagonal, Kronecker or dense.

    Args:
        qg: one (d,) a block.
        V: one (m, d) a block.
        qV: one (m, d) a block.

    Returns:
        the directions, one (d,) a block, and the lower Cholesky factor of I_m + V^T q V.

    >>> q, V, g = torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([3.0])
    >>> round(woodbury_direction([q * g], [V], [V * q])[0][0].item(), 4)  # -3 / (1/2 + 1)
    -2.0
    """
    root, _ = torch.linalg.cholesky_ex(woodbury_matrix(V, qV))  # at least the identity: positive definite
    Vqg = torch.stack([v @ x for v, x in zip(V, qg, strict=True)]).sum(0)
    z = torch.cholesky_solve(Vqg.unsqueeze(1), root).squeeze(1)
    return [z @ qv - x for x, qv in zip(qg, qV, strict=True)], root


def propagate_vd(p: Tensor, V: Tensor) -> Tensor:
    """Diagonal covariance after a batch, "variational diagonal": p' = 1 / (1/p + rowsum(V o V)).

    The diagonal Gaussian closest in KL(q || posterior); V is (m, d), p is (d,).

    >>> propagate_vd(torch.tensor([1.0]), torch.tensor([[1.0], [1.0]])).item()
    0.3333333432674408
    """
    return p / (1 + p * V.square().sum(0))


def propagate_fd(p: Tensor, V: Tensor, root: Tensor) -> Tensor:
    """Diagonal covariance after a batch, "filter diagonal": the diagonal of the exact posterior covariance.

        p' = p - p^2 o rowsum( V (I + V^T p V)^{-1} o V ),   never below `propagate_vd`

    Args:
        p: (d,).
        V: (m, d).
        root: lower Cholesky factor of I + V^T p V, over all blocks.

    >>> V = torch.tensor([[1.0], [1.0]])
    >>> root = torch.linalg.cholesky(torch.eye(2) + V @ V.T)
    >>> round(propagate_fd(torch.tensor([1.0]), V, root).item(), 6)
    0.333333
    """
    half = torch.linalg.solve_triangular(root, V, upper=False)
    # Where hardly anything is left, the difference is all rounding: it may be negative.
    return torch.maximum(p - p.square() * half.square().sum(0), propagate_vd(p, V))
