"""Newton's iteration in place of inverses, and what damping the factors apart costs."""

import math

import pytest
import torch
from grng.kernels import ema_, gram, newton_inverse, pi_split, rotate
from torch import Tensor

from .forms import Inverse, by_cholesky, by_newton, eigen_step, factor, factored_step
from .reference import damped_step, flat, forward, labelled, layer_moments, relative, weights_of


def spd(n: int, condition: float) -> Tensor:
    U = torch.linalg.qr(torch.randn(n, n)).Q
    return U @ torch.diag(torch.logspace(-math.log10(condition), 0, n)) @ U.T


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-10])
@pytest.mark.parametrize("n", [2, 10, 40])
def test_T11_rounds(n: int, tolerance: float) -> None:
    """T11: from I/||A||_F it takes log2(kappa ln(1/tol)) rounds, rounded up, +-1; kappa = ||A||_F/lambda_min."""
    stack = torch.stack([spd(n, condition) for condition in (2, 1e1, 1e2, 1e3, 1e5)])
    X, rounds, residual = newton_inverse(stack, tolerance=tolerance, max_rounds=60)
    kappa = torch.linalg.matrix_norm(stack) / torch.linalg.eigvalsh(stack)[:, 0]
    expected = (kappa * math.log(1 / tolerance)).log2()
    assert ((rounds - expected.ceil()).abs() <= 1).all()
    assert (residual < tolerance).all()
    for A, inverse in zip(stack, X, strict=True):
        assert torch.linalg.matrix_norm(torch.eye(n) - A @ inverse) < tolerance
        assert relative(inverse, A.inverse()) < tolerance


@pytest.mark.parametrize(("n", "samples"), [(8, 64), (16, 64), (32, 64), (32, 256)])
def test_T11_warm_start(n: int, samples: int) -> None:
    """T11: from the inverse one update ago an average with b = .95 takes two or three rounds to 1e-4."""
    root = torch.linalg.cholesky(spd(n, 100))
    average, count = torch.zeros(1, n, n), torch.zeros(1)
    X, seen = None, []
    for update in range(80):
        rows = torch.randn(samples, n) @ root.T
        ema_(average, count, gram(rows[None, :, None]) / samples, 0.95, torch.tensor([True]))
        X, rounds, _ = newton_inverse(average, start=X)
        if update >= 40:
            seen.append(rounds.item())
            assert relative(X[0], average[0].inverse()) < 1e-4
    assert set(seen) <= {2, 3}


def trained(sizes: tuple[int, ...], samples: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """A classifier of correlated clusters after a hundred steps of gradient descent."""
    y = torch.randint(sizes[-1], (samples,))
    clusters = torch.randn(sizes[-1], sizes[0])[y] + torch.randn(samples, sizes[0])
    x = clusters @ torch.randn(sizes[0], sizes[0]) / sizes[0] ** 0.5
    weights = [W.requires_grad_() for W in weights_of(*sizes)]
    for _ in range(100):
        gradients = torch.autograd.grad(labelled(y)(forward(weights, x)[0]) / samples, weights)
        weights = [(W - 0.3 * G).detach().requires_grad_() for W, G in zip(weights, gradients, strict=True)]
    return [W.detach() for W in weights], x, y


@pytest.mark.parametrize("relative_damping", [1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("inverse", [by_cholesky, by_newton])
def test_T12_factored_damping_overdamps(inverse: Inverse, relative_damping: float) -> None:
    """T12: (Gamma + sqrt(lam)/pi I)^{-1} G (Lambda + pi sqrt(lam) I)^{-1} has 0.34 to 0.50 of the exact step's norm at
    a cosine of 0.82 to 0.98, for lam up to tr F/d; no coordinate in the eigenbasis is larger."""
    weights, x, y = trained((20, 16, 12, 5), samples := 512)
    drawn = torch.multinomial(forward(weights, x)[0].softmax(1), 1).squeeze(1)
    moments = layer_moments(weights, x, labelled(drawn))
    curvature = [(factor(h), factor(e)) for h, e in moments]
    trace = torch.stack([Lambda[0].trace() * Gamma[0].trace() for Lambda, Gamma in curvature]).sum()
    lam = relative_damping * trace / flat(weights).numel()
    exact, factored = [], []
    for (h, e), (Lambda, Gamma) in zip(layer_moments(weights, x, labelled(y)), curvature, strict=True):
        G = e.T @ h / samples
        exact.append(eigen_step(G, Lambda, Gamma, lam))
        factored.append(factored_step(G, Lambda, Gamma, lam[None], inverse))

        dense = damped_step(torch.kron(Gamma[0], Lambda[0]), lam, G.flatten())
        assert relative(exact[-1].flatten(), dense) < 1e-10
        pi = ((Lambda[0].trace() / len(Lambda[0])) / (Gamma[0].trace() / len(Gamma[0]))).sqrt()
        assert relative(pi_split(Lambda, Gamma)[0], pi) < 1e-10
        left = damped_step(Gamma[0], lam.sqrt() / pi, torch.eye(len(Gamma[0])))
        right = damped_step(Lambda[0], pi * lam.sqrt(), torch.eye(len(Lambda[0])))
        assert relative(factored[-1], -left @ G @ right) < 1e-10

        U_out, U_in = (torch.linalg.eigh(A[0])[1][None] for A in (Gamma, Lambda))
        coordinates = [rotate(D[-1][None], U_out, U_in) for D in (factored, exact)]
        assert (coordinates[0].abs() <= coordinates[1].abs() + 1e-10).all()
    a, b = flat(exact), flat(factored)
    assert 0.34 < b.norm() / a.norm() < 0.50
    assert 0.82 < a @ b / (a.norm() * b.norm()) < 0.98
