"""Kronecker-factored operations against dense Kronecker products, one matrix at a time."""

import pytest
import torch
from grng.kernels import (
    factored_precondition,
    kron_product,
    kron_spectrum,
    pi_split,
    rotate,
    rotate_back,
    rotated_diagonal,
)
from torch import Tensor

SHAPES = pytest.mark.parametrize(("k", "n_out", "n_in"), [(1, 1, 1), (1, 3, 4), (3, 4, 2), (2, 5, 5), (4, 1, 6)])
SIDES = pytest.mark.parametrize("sides", ["both", "out", "in", "none"])


def basis(k: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(k, n, n))[0].contiguous()  # torch.kron wants it so


def bases(sides: str, k: int, n_out: int, n_in: int) -> tuple[Tensor | None, Tensor | None]:
    return basis(k, n_out) if sides in ("both", "out") else None, basis(k, n_in) if sides in ("both", "in") else None


def dense(A: Tensor | None, k: int, n: int) -> Tensor:
    return torch.eye(n).repeat(k, 1, 1) if A is None else A


def psd(k: int, n: int) -> Tensor:
    A = torch.randn(k, n, n + 2)
    return A @ A.mT


@SHAPES
@SIDES
def test_rotate(sides: str, k: int, n_out: int, n_in: int) -> None:
    """vec(U_out^T G U_in) == (U_out (x) U_in)^T vec(G), rows first; and back."""
    U_out, U_in = bases(sides, k, n_out, n_in)
    G = torch.randn(k, n_out, n_in)
    C = rotate(G, U_out, U_in)
    for j in range(k):
        K = torch.kron(dense(U_out, k, n_out)[j], dense(U_in, k, n_in)[j])
        torch.testing.assert_close(C[j].flatten(), K.T @ G[j].flatten())
    torch.testing.assert_close(rotate_back(C, U_out, U_in), G)


@SHAPES
@SIDES
def test_rotated_diagonal(sides: str, k: int, n_out: int, n_in: int) -> None:
    """diag(R diag(s) R^T) with R = R_out (x) R_in; the trace stays."""
    R_out, R_in = bases(sides, k, n_out, n_in)
    s = torch.rand(k, n_out, n_in)
    found = rotated_diagonal(s, R_out, R_in)
    for j in range(k):
        R = torch.kron(dense(R_out, k, n_out)[j], dense(R_in, k, n_in)[j])
        torch.testing.assert_close(found[j].flatten(), (R @ s[j].flatten().diag() @ R.T).diagonal())
    torch.testing.assert_close(found.sum((1, 2)), s.sum((1, 2)))


@SHAPES
@pytest.mark.parametrize("diagonal", [False, True])
def test_kron_product_and_spectrum(diagonal: bool, k: int, n_out: int, n_in: int) -> None:
    """Gamma G Lambda is (Gamma (x) Lambda) vec(G), rows first, and its eigenvalues are gamma_i l_j."""
    G, Gamma = torch.randn(k, n_out, n_in), psd(k, n_out)
    Lambda = torch.rand(k, n_in) if diagonal else psd(k, n_in)
    full = Lambda.diag_embed() if diagonal else Lambda
    product = kron_product(G, Gamma, Lambda)
    spectrum = kron_spectrum(torch.linalg.eigvalsh(Gamma), torch.linalg.eigvalsh(full))
    for j in range(k):
        K = torch.kron(Gamma[j], full[j])
        torch.testing.assert_close(product[j].flatten(), K @ G[j].flatten())
        torch.testing.assert_close(spectrum[j].flatten().sort()[0], torch.linalg.eigvalsh(K))


@SHAPES
@pytest.mark.parametrize("diagonal", [False, True])
def test_factored_precondition(diagonal: bool, k: int, n_out: int, n_in: int) -> None:
    """With the inverses of both factors it is the inverse of their product."""
    G, Gamma = torch.randn(k, n_out, n_in), psd(k, n_out)
    Lambda = 0.1 + torch.rand(k, n_in) if diagonal else psd(k, n_in)
    X_in = 1 / Lambda if diagonal else torch.stack([torch.linalg.inv(A) for A in Lambda])
    X_out = torch.stack([torch.linalg.inv(A) for A in Gamma])
    found = factored_precondition(G, X_out, X_in)
    for j in range(k):
        K = torch.kron(Gamma[j], Lambda[j].diag() if diagonal else Lambda[j])
        torch.testing.assert_close(found[j].flatten(), torch.linalg.solve(K, G[j].flatten()), rtol=1e-7, atol=1e-9)


@SHAPES
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_pi_split(scale: float, diagonal: bool, k: int, n_out: int, n_in: int) -> None:
    Lambda, Gamma = (scale * torch.rand(k, n_in) if diagonal else scale * psd(k, n_in)), psd(k, n_out)
    pi = pi_split(Lambda, Gamma)
    for j in range(k):
        mean_in = (Lambda[j].sum() if diagonal else Lambda[j].trace()) / n_in
        assert pi[j].item() == pytest.approx((mean_in / (Gamma[j].trace() / n_out)).sqrt().item(), rel=1e-12)
    # The damping of the product, (Lambda + pi sqrt(lam)) (x) (Gamma + sqrt(lam)/pi), contains exactly lam.
    torch.testing.assert_close((pi * 0.3) * (0.3 / pi), torch.full((k,), 0.09))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("mean_in", "mean_out", "expected"),
    [(0, 0, 1), (1, 0, 1e3), (0, 1, 1e-3), (1e12, 1, 1e3), (1, 1e12, 1e-3), (1e30, 1e30, 1), (1e-30, 1e-30, 1)],
)
def test_pi_split_is_clipped(mean_in: float, mean_out: float, expected: float, dtype: torch.dtype) -> None:
    """A factor can vanish, as LoRA's does at the start: nothing becomes NaN."""
    Lambda, Gamma = mean_in * torch.eye(2, dtype=dtype)[None], mean_out * torch.eye(3, dtype=dtype)[None]
    assert pi_split(Lambda, Gamma).item() == pytest.approx(expected, rel=1e-6)
    assert pi_split(Lambda.diagonal(dim1=1, dim2=2), Gamma).item() == pytest.approx(expected, rel=1e-6)
