"""The gain of a Kalman update and the propagation of its covariance, without a d x d matrix.

V V^T is the information of a batch, V of m columns; the covariance is diagonal or, matrix by matrix, a Kronecker
product P_out (x) P_in. The m x m system couples all of them.
"""

import torch
from grng.kernels.columns import DenseColumns
from grng.kernels.solve import eigh
from torch import Tensor

REPAIR = 1e-3  # of its diagonal, added to a covariance that rounding has made indefinite


def gain(gram: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """The m numbers that make the Kalman step of a summed gradient g under the prior q and the information V V^T.

        z = (I_m + V^T q V)^{-1} V^T q g,      D = -(q^{-1} + V V^T)^{-1} g = q (V z - g)

    q enters only through its products, so that it may be diagonal, Kronecker or dense, and of several blocks, whose
    grams and products add up.

    Args:
        gram: V^T q V, (m, m).
        projected: V^T q g, (m,).

    Returns:
        z (m,) and the lower Cholesky factor of I_m + V^T q V; NaN where rounding or overflow leaves no such factor.

    >>> q, V, g = torch.tensor([2.0]), torch.tensor([[1.0]]), torch.tensor([3.0])
    >>> z, _ = gain(V @ (q * V).T, V @ (q * g))
    >>> round((q * (z @ V - g)).item(), 4)  # -3 / (1/2 + 1)
    -2.0
    """
    root = root_or_nan(identity_plus(gram))
    return torch.cholesky_solve(projected.unsqueeze(1), root).squeeze(1), root


def root_or_nan(A: Tensor) -> Tensor:
    """The lower Cholesky factor, all NaN where `info` says that there is none: what is left there is finite garbage.

    >>> root_or_nan(-torch.eye(1)).item()
    nan
    """
    root, info = torch.linalg.cholesky_ex(A)
    return root.masked_fill((info != 0)[..., None, None], torch.nan)


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


def propagate_kron_(P_out: Tensor, P_in: Tensor, V: DenseColumns, PV: DenseColumns, valid: Tensor) -> None:
    """Kronecker covariance after a batch, in place: one round of minimising KL(Q || posterior) over Q = Q_out (x) Q_in,
    each factor in closed form with the other held (derived here).

        Q_in^{-1}  = P_in^{-1} + (1/n_out) sum_c V_c^T P_out V_c
        Q_out^{-1} = [ tr(P_in^{-1} Q_in) P_out^{-1} + sum_c V_c Q_in V_c^T ] / n_in

    It is the exact posterior wherever that is a Kronecker product: one output, say, or outputs that see the same inputs
    with the same information. Afterwards the mean of Q_out's diagonal is 1.

    Args:
        P_out: (k, n_out, n_out), positive definite.
        P_in: (k, n_in, n_in), positive definite.
        V: columns of the k matrices.
        PV: the columns P_out V_c P_in.
        valid: bool; where false, nothing changes.

    >>> P_out, P_in = torch.eye(1).unsqueeze(0), 2 * torch.eye(1).unsqueeze(0)
    >>> V = DenseColumns(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    >>> propagate_kron_(P_out, P_in, V, V.transformed(P_out, P_in), torch.tensor(True))
    >>> round(P_in.item(), 4)  # 1 / (1/2 + 1)
    0.6667
    """
    n_out, n_in = P_out.shape[-1], P_in.shape[-1]
    trace, inner = absorb_(P_in, V.x, PV.x, PV.e @ V.e.mT, torch.full_like(P_in[:, :1, :1], 1 / n_out), valid)
    absorb_(P_out, V.e, PV.e, inner, 1 / trace, valid)
    size = P_out.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    P_out.div_(torch.where(valid, size, 1.0))
    P_in.mul_(torch.where(valid, size * n_in / trace, 1.0))


def absorb_(P: Tensor, X: Tensor, XP: Tensor, inner: Tensor, weight: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """P <- (P^{-1} + w sum_c X_c^T A_c X_c)^{-1}; no matrix of P's size is inverted where there are fewer rows.

    Args:
        P: (k, n, n), positive definite.
        X: (k, m, R, n).
        XP: X P.
        inner: A, (k, m, R, R), positive semidefinite.
        weight: w, (k, 1, 1).
        valid: bool; where false, P stays.

    Returns:
        tr(P^{-1} P') (k, 1, 1), and X_c P' X_c^T (k, m, R, R).
    """
    k, m, R, n = X.shape
    rows = X.flatten(1, 2)
    eye = torch.eye(min(m * R, n), dtype=P.dtype, device=P.device).expand(k, -1, -1)
    diagonal = P.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    if m * R < n:
        # The rows of a column are mixed by a root of A_c.
        mix = (inner.clamp(min=0).sqrt() if R == 1 else semidefinite_root(inner).mT) * weight.sqrt().unsqueeze(1)
        mixed, mixed_P = (mix @ X).flatten(1, 2), (mix @ XP).flatten(1, 2)
        root, failed = torch.linalg.cholesky_ex(eye + torch.bmm(mixed_P, mixed.mT))
        positive = (failed == 0).view(-1, 1, 1)
        half = torch.linalg.solve_triangular(root, mixed_P, upper=False)
        half = torch.where(valid & positive, half, 0)
        P.baddbmm_(half.mT, half, alpha=-1)
        taken = torch.bmm(half, rows.mT).view(k, -1, m, R).transpose(1, 2)
        after = XP @ X.mT - taken.mT @ taken
    else:
        information = weight * torch.bmm(rows.mT, (inner @ X).flatten(1, 2))
        L, failed = torch.linalg.cholesky_ex(P)
        root, lost = torch.linalg.cholesky_ex(eye + L.mT @ information @ L)
        positive = (failed + lost == 0).view(-1, 1, 1)
        half = torch.linalg.solve_triangular(root, L.mT, upper=False)
        P.copy_(torch.where(valid & positive, torch.bmm(half.mT, half), P))
        after = torch.bmm(rows, P).view_as(X) @ X.mT
    # More than what rounding takes, so that P stays positive definite however long it is updated; where it was not, P
    # keeps what it was, and more is added.
    more = torch.where(positive.flatten(1), 2 * n * torch.finfo(P.dtype).eps, REPAIR)
    diagonal.add_(torch.where(valid, more * before, 0))
    # tr(P^{-1} P') = n - r + tr (I + K)^{-1} for r rows
    inverse = torch.linalg.solve_triangular(root, eye, upper=False)
    trace = n - eye.shape[-1] + inverse.square().sum((1, 2)).view(-1, 1, 1)
    return torch.where(positive, trace, n), after


def semidefinite_root(A: Tensor) -> Tensor:
    """B with B B^T = A, for positive semidefinite matrices (..., n, n) of any rank.

    >>> B = semidefinite_root(torch.ones(2, 2, dtype=torch.float64))
    >>> (B @ B.T).round(decimals=6).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    values, vectors, _ = eigh(A.reshape(-1, *A.shape[-2:]))
    return (vectors * values.sqrt().unsqueeze(-2)).view_as(A)
