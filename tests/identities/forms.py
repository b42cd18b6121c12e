"""GRNG's forms of a step on one network, written with its kernels only."""

from collections.abc import Callable

import torch
from grng.kernels import (
    damped_inverse,
    eigh,
    factored_precondition,
    gain,
    gram,
    identity_plus,
    kron_spectrum,
    newton_inverse,
    pi_split,
    propagate_fd,
    rotate,
    rotate_back,
)
from torch import Tensor

Inverse = Callable[[Tensor, Tensor], Tensor]


def softmax_rows(J: Tensor, out: Tensor) -> Tensor:
    """V^T (m = BC rows): J_i^T S_i^{1/2} with the closed square root diag(sqrt p) - p sqrt(p)^T of S."""
    p = out.softmax(1)
    root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    return torch.einsum("bci,bck->bki", J, root).flatten(0, 1)


def dense_gain(q: Tensor, V: Tensor, gs: Tensor) -> Tensor:
    """The Kalman step under a dense prior q (d x d)."""
    z, _ = gain(V @ q @ V.T, V @ q @ gs)
    return q @ (z @ V - gs)


def dense_posterior(P: Tensor, V: Tensor) -> Tensor:
    """P - P V (I + V^T P V)^{-1} V^T P."""
    root = torch.linalg.cholesky(identity_plus(V @ P @ V.T))
    half = torch.linalg.solve_triangular(root, V @ P, upper=False)
    return P - half.T @ half


def diagonal_gain(q: Tensor, V: Tensor, gs: Tensor) -> Tensor:
    z, _ = gain((V * q) @ V.T, V @ (q * gs))
    return q * (z @ V - gs)


def filter_diagonal(p: Tensor, V: Tensor) -> Tensor:
    root = torch.linalg.cholesky(identity_plus((V * p) @ V.T))
    half = torch.linalg.solve_triangular(root, V, upper=False)
    return propagate_fd(p, half.square().sum(0), V.square().sum(0))


def factor(rows: Tensor) -> Tensor:
    """Mean outer product of (B, n) rows, as a stack of one."""
    return gram(rows[None, :, None]) / len(rows)


def eigen_step(G: Tensor, Lambda: Tensor, Gamma: Tensor, lam: float | Tensor) -> Tensor:
    """-(Lambda (x) Gamma + lam I)^{-1} G in the eigenbasis, stacks of one."""
    (l, U_in, _), (gam, U_out, _) = eigh(Lambda), eigh(Gamma)
    C = rotate(G[None], U_out, U_in) / (kron_spectrum(gam, l) + lam)
    return -rotate_back(C, U_out, U_in)[0]


def factored_step(G: Tensor, Lambda: Tensor, Gamma: Tensor, lam: Tensor, inverse: Inverse) -> Tensor:
    """-(Gamma + sqrt(lam)/pi I)^{-1} G (Lambda + pi sqrt(lam) I)^{-1}, stacks of one."""
    pi = pi_split(Lambda, Gamma)
    return -factored_precondition(G[None], inverse(Gamma, lam.sqrt() / pi), inverse(Lambda, pi * lam.sqrt()))[0]


def by_cholesky(A: Tensor, damping: Tensor) -> Tensor:
    return damped_inverse(A, damping)[0]


def by_newton(A: Tensor, damping: Tensor) -> Tensor:
    damped = A + damping.view(-1, 1, 1) * torch.eye(A.shape[-1])
    return newton_inverse(damped, tolerance=1e-12, max_rounds=60)[0]
