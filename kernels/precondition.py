"""Kronecker-factored curvature F = Lambda (x) Gamma applied to stacked gradients, in its eigenbasis or factor-wise.

An input factor may be diagonal (an embedding's: its inputs are one-hot), given as `(k, n)`; its eigenvectors are then
None.
"""

import torch
from torch import Tensor


def rotate(G: Tensor, U_out: Tensor | None, U_in: Tensor | None) -> Tensor:
    """Coordinates of G (k, n_out, n_in) in the eigenbasis: U_out^T G U_in; None stands for the identity."""
    return _both_sides(G, None if U_out is None else U_out.mT, U_in)


def _both_sides(G: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left G right, in the order that takes fewer operations. By `bmm`, as `@` spends longer on small stacks than they
    take."""
    if left is None:
        return G if right is None else torch.bmm(G, right)
    if right is None:
        return torch.bmm(left, G)
    left_first, right_first = sandwich_costs(left.shape[-2], left.shape[-1], right.shape[-2], right.shape[-1])
    if left_first <= right_first:
        return torch.bmm(torch.bmm(left, G), right)
    return torch.bmm(left, torch.bmm(G, right))


def sandwich_costs(a: int, m: int, n: int, b: int) -> tuple[int, int]:
    """Multiplications in (A G) B and in A (G B), for A (a, m), G (m, n), B (n, b)."""
    return a * n * (m + b), m * b * (n + a)


def rotate_back(C: Tensor, U_out: Tensor | None, U_in: Tensor | None) -> Tensor:
    """The inverse of `rotate`: U_out C U_in^T.

    >>> U = torch.linalg.qr(torch.randn(1, 3, 3))[0]
    >>> G = torch.randn(1, 3, 2)
    >>> torch.allclose(rotate_back(rotate(G, U, None), U, None), G, atol=1e-6)
    True
    """
    return _both_sides(C, U_out, None if U_in is None else U_in.mT)


def kron_spectrum(w_out: Tensor, w_in: Tensor) -> Tensor:
    """Eigenvalues of Lambda (x) Gamma as a (k, n_out, n_in) array: gamma_i l_j."""
    return w_out.unsqueeze(2) * w_in.unsqueeze(1)


def leading(s: Tensor, least: float | Tensor) -> Tensor:
    """How many of the last rows and of the last columns of s (k, n_out, n_in) hold all entries above `least`, a number
    or one for every matrix; all where that is zero.

    >>> s = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 1.0, 3.0]]])
    >>> [leading(s, least).tolist() for least in (0.5, 1.5, 9.0, 0.0)]
    [[2, 2], [2, 1], [1, 1], [3, 3]]
    """
    least = torch.as_tensor(least, dtype=s.dtype, device=s.device)
    large = (s > least) | (least <= 0)
    marked = large.any(2).any(0), large.any(1).any(0)
    return torch.stack([torch.where(m.any(), len(m) - m.int().argmax(), 1) for m in marked])


def rotated_diagonal(s: Tensor, R_out: Tensor | None, R_in: Tensor | None) -> Tensor:
    """Diagonal, in a new basis, of the matrix that is diag(s) in an old one.

        s'_ij = sum_ab R_out[i, a]^2 s_ab R_in[j, b]^2,   R = U_new^T U_old

    It keeps the trace, which is what lets second moments survive a change of basis.

    >>> s = torch.rand(1, 2, 3)
    >>> R = torch.linalg.qr(torch.randn(1, 2, 2))[0]
    >>> torch.allclose(rotated_diagonal(s, R, None).sum(), s.sum())
    True
    """
    if R_out is not None:
        s = R_out.square() @ s
    return s if R_in is None else s @ R_in.square().mT


def kron_product(G: Tensor, Gamma: Tensor, Lambda: Tensor) -> Tensor:
    """(Lambda (x) Gamma) vec(G) as a matrix: Gamma G Lambda; a diagonal Lambda is (k, n_in)."""
    right = G * Lambda.unsqueeze(1) if Lambda.ndim == 2 else torch.bmm(G, Lambda)
    return torch.bmm(Gamma, right)


def factored_precondition(G: Tensor, X_out: Tensor, X_in: Tensor) -> Tensor:
    """X_out G X_in with the inverses of the damped factors; a diagonal X_in is (k, n_in).

    >>> factored_precondition(torch.ones(1, 1, 2), torch.tensor([[[2.0]]]), torch.tensor([[1.0, 3.0]])).tolist()
    [[[2.0, 6.0]]]
    """
    return kron_product(G, X_out, X_in)


def pi_split(Lambda: Tensor, Gamma: Tensor, low: float = 1e-3, high: float = 1e3) -> Tensor:
    """How a damping lam is shared between two factors: Lambda + pi sqrt(lam) I and Gamma + sqrt(lam)/pi I.

        pi = clip( sqrt((tr Lambda / n_in) / (tr Gamma / n_out)), 1e-3, 1e3 )      (Martens & Grosse 2015)

    Clipped, because a factor can vanish: the output factor of LoRA's first matrix does at the start.

    >>> pi_split(torch.eye(2)[None] * 4, torch.zeros(1, 3, 3)).tolist()
    [1000.0]
    """
    mean_in = Lambda.mean(1) if Lambda.ndim == 2 else Lambda.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_out = Gamma.diagonal(dim1=-2, dim2=-1).mean(-1)
    tiny = torch.finfo(Lambda.dtype).tiny
    return (mean_in.clamp(min=tiny).sqrt() / mean_out.clamp(min=tiny).sqrt()).clamp(low, high)
