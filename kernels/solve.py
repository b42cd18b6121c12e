"""Decompositions and inverses of stacks of symmetric positive semi-definite matrices.

Batched LU is never used: it is broken in some CPU builds of torch. Where a matrix resists, each function climbs a
ladder and reports it: more damping, then float64, then a result that the caller replaces by the previous one.
"""

import torch
from torch import Tensor

# A batched eigh on a CPU is several times slower than a loop once threads compete; on a GPU the stack is one call.
_LOOP_ON_CPU_FROM = 32


def eigh(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigendecomposition A = U diag(w) U^T of every member of a stack, negative eigenvalues set to zero.

    Args:
        stack: (k, n, n) symmetric positive semi-definite up to rounding; what is not finite fails.

    Returns:
        w (k, n) ascending, U (k, n, n), and a bool (k,) that marks members where every attempt failed: their U is the
        identity, their w the diagonal, or zero where the member is not finite.

    >>> w, U, failed = eigh(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]))
    >>> [round(v, 4) for v in w[0].tolist()], failed.tolist()
    ([1.0, 3.0], [False])
    """
    k, n = stack.shape[0], stack.shape[-1]
    try:
        if k > 1 and stack.device.type == "cpu" and n >= _LOOP_ON_CPU_FROM:
            w, U = _one_by_one(stack)
        else:
            w, U = torch.linalg.eigh(stack)
    except torch.linalg.LinAlgError:
        w, U = _one_by_one(stack)
    # LAPACK does not always complain: of a NaN it may make NaN, or finite garbage.
    finite = torch.isfinite(stack).flatten(1).all(1)
    failed = ~(finite & _sound(w, U))
    axes = torch.where(finite.view(-1, 1), stack.diagonal(dim1=1, dim2=2), 0)
    w = torch.where(failed.view(-1, 1), axes, w).clamp_(min=0)
    return w, torch.where(failed.view(-1, 1, 1), torch.eye(n, dtype=U.dtype, device=U.device), U), failed


def _sound(w: Tensor, U: Tensor) -> Tensor:
    return torch.isfinite(w).all(-1) & torch.isfinite(U).flatten(-2).all(-1)


def _one_by_one(stack: Tensor) -> tuple[Tensor, Tensor]:
    w, U = zip(*map(_eigh_ladder, stack), strict=True)
    return torch.stack(w), torch.stack(U)


def _eigh_ladder(matrix: Tensor) -> tuple[Tensor, Tensor]:
    damping = 100 * torch.finfo(matrix.dtype).eps * matrix.diagonal().abs().amax()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for shift, dtype in ((0 * damping, matrix.dtype), (damping, matrix.dtype), (0 * damping, torch.float64)):
        try:
            w, U = torch.linalg.eigh((matrix + shift * eye).to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if bool(_sound(w, U)):
            return (w - shift).to(matrix.dtype), U.to(matrix.dtype)
    return torch.full_like(matrix[0], torch.nan), matrix


def damped_inverse(stack: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(A + d I)^{-1} by Cholesky; where A + d I is not positive definite, with 10 d, 100 d, and 1000 d in float64.
    `info` of the factorisation decides, not finiteness: a failed factor is finite garbage.

    Args:
        stack: (k, n, n) symmetric.
        damping: (k,) positive.

    Returns:
        the inverses (k, n, n) and a bool (k,) that marks the members where even the last attempt failed: the inverse of
        their diagonal with the last damping.

    >>> X, failed = damped_inverse(torch.tensor([[[2.0, 0.0], [0.0, 14.0]]]), torch.tensor([2.0]))
    >>> X.tolist(), failed.tolist()
    ([[[0.25, -0.0], [-0.0, 0.0625]]], [False])
    """
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    X, failed = _cholesky_inverse(stack + damping.view(-1, 1, 1) * eye)
    for times, dtype in ((10, stack.dtype), (100, stack.dtype), (1000, torch.float64)):
        if not bool(failed.any()):
            break
        damped = stack[failed].to(dtype) + times * damping[failed].to(dtype).view(-1, 1, 1) * eye.to(dtype)
        again, still = _cholesky_inverse(damped)
        X[failed] = again.to(stack.dtype)
        failed = failed.clone().masked_scatter_(failed, still)
    if bool(failed.any()):
        diagonal = stack[failed].diagonal(dim1=1, dim2=2).nan_to_num(0, 0, 0).clamp(min=0)
        X[failed] = (1 / (diagonal + 1000 * damping[failed].view(-1, 1))).diag_embed()
    return X, failed


def _cholesky_inverse(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses, and which members are not positive definite: the identity there."""
    factor, info = torch.linalg.cholesky_ex(stack)
    failed = info != 0
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    return torch.cholesky_inverse(torch.where(failed.view(-1, 1, 1), eye, factor)), failed


def newton_inverse(
    stack: Tensor, start: Tensor | None = None, tolerance: float = 1e-4, max_rounds: int = 25
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of a stack by Newton's (Newton-Schulz) iteration, products only.

        X <- X (2 I - A X),   from X = I / ||A||_F, or from `start` where ||I - A start||_F < 0.9

    From scratch it takes about log2(kappa ln(1/tolerance)) rounds, kappa = ||A||_F / lambda_min; from the inverse of
    a slightly older A two or three.

    Args:
        stack: (k, n, n) symmetric positive definite.
        start: (k, n, n) previous inverses.
        tolerance: stop when ||I - A X||_F is below it for every member.
        max_rounds: at most that many rounds.

    Returns:
        X (k, n, n), rounds taken by every member (k,), and the residuals ||I - A X||_F (k,).

    >>> X, rounds, residual = newton_inverse(torch.diag(torch.tensor([1.0, 4.0]))[None])
    >>> [round(v, 4) for v in X[0].diagonal().tolist()], bool(residual < 1e-4)
    ([1.0, 0.25], True)
    """
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    X = eye / torch.linalg.matrix_norm(stack).view(-1, 1, 1)
    if start is not None:
        close = torch.linalg.matrix_norm(eye - stack @ start) < 0.9
        X = torch.where(close.view(-1, 1, 1), start, X)
    rounds = torch.zeros(len(stack), dtype=torch.long, device=stack.device)
    product = stack @ X
    residual = torch.linalg.matrix_norm(eye - product)
    for _ in range(max_rounds):
        open_ = residual >= tolerance
        if not bool(open_.any()):
            break
        rounds += open_
        # A converged member stays as it is: further rounds would only gather rounding errors.
        X = torch.where(open_.view(-1, 1, 1), 2 * X - X @ product, X)
        product = stack @ X
        residual = torch.linalg.matrix_norm(eye - product)
    return X, rounds, residual
