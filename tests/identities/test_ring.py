"""RING: what the damping lam = rho ||g||^2 + lam0 does to a natural-gradient step."""

import math

import pytest
import torch
from grng.kernels import damped_inverse, gain
from torch import Tensor
from torch.func import jacrev

from .forms import diagonal_gain, eigen_step, factor, softmax_rows
from .reference import (
    damped_step,
    flat,
    forward,
    labelled,
    layer_moments,
    model,
    parts,
    relative,
    summed,
    weights_of,
)


@pytest.mark.parametrize(("B", "C", "rho"), [(1, 2, 0.1), (3, 3, 1.0), (8, 4, 100.0)])
def test_T8_rank_one_damping_rescales(B: int, C: int, rho: float) -> None:
    """T8: (F + rho g g^T)^{-1} g == F^{-1} g / (1 + rho g^T F^{-1} g)."""
    weights = weights_of(3, C)
    theta = flat(weights)
    f, loss = model(weights, torch.randn(B, 3)), labelled(torch.randint(C, (B,)))
    gs, F = summed(f, theta, loss)
    F, g = F / B + 0.1 * torch.eye(len(theta)), gs / B
    natural = damped_step(F, 0, g)
    z, _ = gain(-rho * (g @ natural).view(1, 1), -(rho**0.5) * (g @ natural).view(1))
    D = natural - z * rho**0.5 * natural
    assert relative(D, natural / (1 - rho * g @ natural)) < 1e-10
    assert relative(D, damped_step(F + rho * torch.outer(g, g), 0, g)) < 1e-10


@pytest.mark.parametrize("n", [1, 3, 8])
def test_T9_cubic_convergence(n: int) -> None:
    """T9: linear least squares, lr 1: ||r+|| <= rho mu_max/(n mu_min) ||r||^3, mu the eigenvalues of X X^T."""
    x, rho = torch.randn(n, 20), 2.0
    mu = torch.linalg.eigvalsh(x @ x.T)
    bound = rho * mu[-1] / (n * mu[0])
    start = torch.randn(n)
    before, after = [], []
    for size in torch.logspace(-3, -1, 9):
        r = size * start / start.norm()
        g = r @ x / n
        D = eigen_step(g[None], factor(x), torch.ones(1, 1, 1), rho * g.square().sum())[0]
        assert relative(D, damped_step(x.T @ x / n, rho * g.square().sum(), g)) < 1e-8  # condition: 1/lam
        before.append(r.norm())
        after.append((r + x @ D).norm())
        assert after[-1] <= bound * before[-1] ** 3
    u, v = torch.stack(before).log(), torch.stack(after).log()
    order = (u - u.mean()) @ (v - v.mean()) / (u - u.mean()).square().sum()
    assert order >= 2.8


@pytest.mark.parametrize(("B", "C", "lr", "rho"), [(8, 3, 1.0, 3e3), (8, 5, 0.3, 3e3), (3, 4, 1.0, 1e4)])
def test_T10_loss_falls_by_lr_over_rho(B: int, C: int, lr: float, rho: float) -> None:
    """T10: while rho ||g||^2 dominates the curvature, a step lowers the loss by lr/rho, within 2 %."""
    weights = [3 * W for W in weights_of(4, 6, C)]
    x, y = torch.randn(B, 4), torch.randint(C, (B,))
    for _ in range(10):
        drawn = torch.multinomial(forward(weights, x)[0].softmax(1), 1).squeeze(1)
        curvature = [(factor(h), factor(e)) for h, e in layer_moments(weights, x, labelled(drawn))]
        G = [e.T @ h / B for h, e in layer_moments(weights, x, labelled(y))]
        lam = rho * flat(G).square().sum()
        moved = [W + lr * eigen_step(g, *LG, lam) for W, g, LG in zip(weights, G, curvature, strict=True)]
        fall = (labelled(y)(forward(weights, x)[0]) - labelled(y)(forward(moved, x)[0])) / B
        assert fall == pytest.approx(lr / rho, rel=0.02)
        weights = moved


def blow_up(lam0: float, size: float, form: str) -> tuple[float, float]:
    """Norm of the RING step (rho = 1) for a gradient of that size to which the stale, rank-one Lambda is blind."""
    x, e = torch.randn(1, 5), torch.randn(8, 3)
    G = torch.randn(3, 5)
    G -= G @ x.T @ x / x.square().sum()
    G *= size / G.norm()
    Lambda, Gamma, lam = factor(x), factor(e), G.square().sum() + lam0
    dense = damped_step(torch.kron(Gamma[0], Lambda[0]), lam, G.flatten())
    if form == "eigen":
        return eigen_step(G, Lambda, Gamma, lam).norm().item(), dense.norm().item()
    X, failed = damped_inverse(torch.kron(Gamma[0], Lambda[0])[None], lam[None])
    assert not failed.any()
    return (X[0] @ G.flatten()).norm().item(), dense.norm().item()


@pytest.mark.parametrize("form", ["eigen", "cholesky"])
@pytest.mark.parametrize(("lam0", "expected"), [(1e-4, 1.0), (0.0, 1e4)])
def test_T13_floor(lam0: float, expected: float, form: str) -> None:
    """T13: outside the range of F the step is ||g||/(rho ||g||^2 + lam0): 1e4 at ||g|| = 1e-4 without a floor."""
    norm, dense = blow_up(lam0, 1e-4, form)
    assert norm == pytest.approx(expected, rel=1e-3)
    assert norm == pytest.approx(dense, rel=1e-6)  # condition 1e8


def test_T13_largest_step() -> None:
    """T13: with a floor no gradient outside the range of F makes a step above 1/(2 sqrt(rho lam0)); one reaches it."""
    lam0 = 1e-4
    limit = 1 / (2 * math.sqrt(lam0))
    norms = [blow_up(lam0, 10**k, "eigen")[0] for k in torch.linspace(-5, 1, 25).tolist()]
    assert max(norms) == pytest.approx(limit, rel=1e-10)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3])
@pytest.mark.parametrize(("B", "C"), [(1, 3), (8, 4)])
def test_T19_exponent_two_is_invariant(exponent: int, B: int, C: int) -> None:
    """T19: lam = rho ||g||^k commutes with theta = c phi if and only if k = 2."""
    weights, c, rho = weights_of(4, 5, C), 10.0, 0.3
    theta, y = flat(weights), torch.randint(C, (B,))
    outputs = model(weights, torch.randn(B, 4))

    def step(scale: float) -> Tensor:
        def f(phi: Tensor) -> Tensor:
            return outputs(scale * phi)

        phi = theta / scale
        gs = summed(f, phi, labelled(y))[0]
        lam = B * rho * (gs / B).norm() ** exponent
        V = softmax_rows(parts(f, phi, labelled(y))[0], f(phi))
        return scale * diagonal_gain(torch.ones_like(phi) / lam, V, gs)

    change = relative(step(c), step(1.0))
    assert change < 1e-10 if exponent == 2 else change > 0.1


@pytest.mark.parametrize(("n", "lr", "rho"), [(3, 1.0, 1.0), (5, 1.0, 30.0), (5, 0.5, 0.1)])
def test_T23_nonlinear_bound(n: int, lr: float, rho: float) -> None:
    """T23: ||r+|| <= (1 - lr mu'/(mu' + n lam) + 2 lr c/(1-c)) ||r|| where ||J - J_0|| <= c sqrt(mu_0) on the path,
    which stays in the ball of radius lr ||r_0|| / ((1-c) sqrt(mu_0) (1 - largest factor)) around the start."""
    weights, scale = weights_of(3, 30, 1), 50.0
    start = theta = flat(weights)
    outputs = model(weights, torch.randn(n, 3))
    zero = outputs(start)

    def f(theta: Tensor) -> Tensor:
        return scale * (outputs(theta) - zero)

    J_0 = jacrev(f)(start).flatten(0, 1)
    mu, U = torch.linalg.eigh(J_0 @ J_0.T)
    y = -U[:, :1]  # the slowest mode, for which the bound is nearly attained
    path, norms, dampings = [start], [y.norm()], []
    for _ in range(5):
        r, J = f(theta) - y, jacrev(f)(theta).flatten(0, 1)
        gs = J.T @ r.flatten()
        n_lam = n * rho * (gs / n).square().sum() + 1e-2 * mu[0]
        D = diagonal_gain(torch.ones_like(theta) / n_lam, J, gs)
        path += [theta + t * lr * D for t in (0.25, 0.5, 0.75, 1.0)]
        theta = path[-1]
        norms.append((f(theta) - y).norm())
        dampings.append(n_lam)
    c = max(torch.linalg.matrix_norm(jacrev(f)(t).flatten(0, 1) - J_0, 2) for t in path) / mu[0].sqrt()
    mu_c = (1 - c) ** 2 * mu[0]
    factors = [1 - lr * mu_c / (mu_c + n_lam) + 2 * lr * c / (1 - c) for n_lam in dampings]
    assert max(factors) < 1
    for before, after, bound in zip(norms, norms[1:], factors, strict=False):
        assert after <= bound * before
    assert norms[1] / norms[0] > factors[0] - 5 * c
    radius = lr * norms[0] / ((1 - c) * mu[0].sqrt() * (1 - max(factors)))
    assert max((t - start).norm() for t in path) <= radius
