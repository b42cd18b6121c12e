"""The gain of a Kalman update and the propagation of its covariance, without a d x d matrix.

V V^T is the information of a batch, V of m columns; the covariance is diagonal or, matrix by matrix, a Kronecker product
P_out (x) P_in. The m x m system couples all of them.
"""

import torch
from torch import Tensor

from grng.kernels.columns import DenseColumns


def gain(gram: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The m numbers that make the Kalman step of a summed gradient g under the prior q and the information V V^T.

        z = (I_m + V^T q V)^{-1} V^T q g,      D = -(q^{-1} + V V^T)^{-1} g = q (V z - g)

    q enters only through its products, so that it may be diagonal, Kronecker or dense, and of several blocks, whose
    grams and products add up.

    Args:
        gram: V^T q V, (m, m).
        projected: V^T q g, (m,).

    Returns:
        z (m,) and the lower Cholesky factor of I_m + V^T q V.

    >>> q, V, g = torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([3.0])
    >>> z, _ = gain(V @ (q * V).T, V @ (q * g))
    >>> round((q * (z @ V - g)).item(), 4)  # -3 / (1/2 + 1)
    -2.0
    """
    root, _ = torch.linalg.cholesky_ex(identity_plus(gram))  # at least the identity: positive definite
    return torch.cholesky_solve(projected.unsqueeze(1), root).squeeze(1), root


def identity_plus(gram: Tensor) -> Tensor:
    """I + gram, for (..., m, m).

    >>> identity_plus(torch.ones(1, 1)).item()
    2.0
    """
    return gram + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def propagate_vd(p: Tensor, squares: Tensor) -> Tensor:
    """Diagonal covariance after a batch, "variational diagonal": p' = 1 / (1/p + rowsum(V o V)).

    The diagonal Gaussian closest in KL(q || posterior); `squares` is rowsum(V o V).

    >>> propagate_vd(torch.tensor([1.0]), torch.tensor([2.0])).item()
    0.3333333432674408
    """
    return p / (1 + p * squares)


def propagate_fd(p: Tensor, whitened_squares: Tensor, squares: Tensor) -> Tensor:
    """Diagonal covariance after a batch, "filter diagonal": the diagonal of the exact posterior covariance.

        p' = p - p^2 o rowsum( V (I + V^T p V)^{-1} o V ),   never below `propagate_vd`

    >>> round(propagate_fd(torch.tensor([1.0]), torch.tensor([2 / 3]), torch.tensor([2.0])).item(), 6)
    0.333333
    """
    # Where hardly anything is left, the difference is all rounding: it may be negative.
    return torch.maximum(p - p.square() * whitened_squares, propagate_vd(p, squares))


def propagate_kron(P_out: Tensor, P_in: Tensor, V: DenseColumns) -> tuple[Tensor, Tensor]:
    """Kronecker covariance after a batch: one round of minimising KL(Q || posterior) over Q = Q_out (x) Q_in, each
    factor in closed form with the other held (derived here).

        Q_in^{-1}  = P_in^{-1} + (1/n_out) sum_c V_c^T P_out V_c
        Q_out^{-1} = [ tr(P_in^{-1} Q_in) P_out^{-1} + sum_c V_c Q_in V_c^T ] / n_in

    It is the exact posterior wherever that is a Kronecker product with P_out's or P_in's share unchanged in shape: one
    output, or outputs that see the same inputs with the same information. No factor is inverted where the columns have
    fewer rows than it has.

    Args:
        P_out: (k, n_out, n_out), positive definite.
        P_in: (k, n_in, n_in), positive definite.
        V: columns of the k matrices.

    Returns:
        Q_out and Q_in, with the mean of Q_out's diagonal 1.

    >>> P_out, P_in = torch.eye(1).unsqueeze(0), 2 * torch.eye(1).unsqueeze(0)
    >>> V = DenseColumns(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    >>> round((propagate_kron(P_out, P_in, V)[1]).item(), 4)  # 1 / (1/2 + 1)
    0.6667
    """
    n_out, n_in = P_out.shape[-1], P_in.shape[-1]
    Q_in, trace = absorb(P_in, V.x, V.e, P_out, 1 / n_out)
    scale = n_in / trace.view(-1, 1, 1)
    Q_out, _ = absorb(P_out, V.e, V.x, Q_in, scale / n_in)
    Q_out = scale * Q_out
    size = Q_out.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    return Q_out / size, Q_in * size


def absorb(P: Tensor, rows: Tensor, others: Tensor, Q: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """(P^{-1} + w sum_c X_c^T (E_c Q E_c^T) X_c)^{-1}, and tr(P^{-1} of it), for columns V_c = E_c^T X_c.

    Args:
        P: (k, n, n).
        rows: X, (k, m, R, n).
        others: E, (k, m, R, n').
        Q: (k, n', n').
        weight: w, a number or (k, 1, 1).
    """
    k, m, R, n = rows.shape
    inner = torch.bmm(others.flatten(1, 2), Q).view_as(others) @ others.mT  # (k, m, R, R): E_c Q E_c^T
    weight = torch.as_tensor(weight).to(P).view(-1, 1, 1)
    eye = torch.eye(min(m * R, n), dtype=P.dtype, device=P.device).expand(k, -1, -1)
    if m * R < n:
        # The rows of a column are mixed by a root of E_c Q E_c^T.
        root = inner.clamp(min=0).sqrt() if R == 1 else semidefinite_root(inner)
        X = weight.sqrt() * (root.mT @ rows).flatten(1, 2)
        XP = torch.bmm(X, P)
        root, _ = torch.linalg.cholesky_ex(eye + torch.bmm(XP, X.mT))
        half = torch.linalg.solve_triangular(root, XP, upper=False)
        new = torch.baddbmm(P, half.mT, half, alpha=-1)
        # More than what rounding takes: P stays positive definite however long it is updated.
        new.diagonal(dim1=1, dim2=2).addcmul_(
            P.diagonal(dim1=1, dim2=2), P.new_tensor(4 * n**0.5 * torch.finfo(P.dtype).eps)
        )
    else:
        information = weight * torch.bmm(rows.flatten(1, 2).mT, (inner @ rows).flatten(1, 2))
        L, _ = torch.linalg.cholesky_ex(P)
        root, _ = torch.linalg.cholesky_ex(eye + L.mT @ information @ L)
        half = torch.linalg.solve_triangular(root, L.mT, upper=False)
        new = torch.bmm(half.mT, half)
    # tr(P^{-1} P') = n - r + tr (I + K)^{-1} for r rows
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    return new, n - eye.shape[-1] + inverse.square().sum((1, 2))


def semidefinite_root(A: Tensor) -> Tensor:
    """B with B B^T = A, for positive semidefinite matrices (..., n, n) of any rank.

    >>> B = semidefinite_root(torch.ones(2, 2, dtype=torch.float64))
    >>> (B @ B.T).round(decimals=6).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    values, vectors = torch.linalg.eigh(A)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
