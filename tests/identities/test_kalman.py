"""R-Kalman: gain form, information form, natural gradient and where its regularisation may sit."""

import pytest
import torch
from grng.kernels import ema_, propagate_vd
from torch import Tensor
from torch.nn.functional import cross_entropy

from .forms import dense_gain, dense_posterior, diagonal_gain, filter_diagonal, softmax_rows
from .reference import damped_step, flat, labelled, model, parts, relative, squared, summed, weights_of

# samples, classes, hidden layers
SOFTMAX = [(1, 2, ()), (1, 5, ()), (3, 3, (4,)), (8, 2, (5,)), (8, 4, (5,))]


def covariance(d: int) -> Tensor:
    A = torch.randn(d, d)
    return 0.1 * (A @ A.T / d + 0.2 * torch.eye(d))


@pytest.mark.parametrize(("B", "C", "hidden"), SOFTMAX)
def test_T1_gain_form_is_information_form(B: int, C: int, hidden: tuple[int, ...]) -> None:
    """T1: P H^T (H P H^T + R)^{-1} (onehot - p) == (P^{-1} + J^T S J)^{-1} J^T e though R = S is singular, no ridge."""
    weights = weights_of(4, *hidden, C)
    x, y, theta = torch.randn(B, 4), torch.randint(C, (B,)), flat(weights)
    f, loss = model(weights, x), labelled(y)
    P = covariance(len(theta))
    J, S, e = parts(f, theta, loss)
    gs, F = summed(f, theta, loss)

    V = softmax_rows(J, f(theta))
    D = dense_gain(P, V, gs)
    information = damped_step(P.inverse() + F, 0, gs)
    assert relative(D, information) < 1e-10
    assert relative(dense_posterior(P, V), (P.inverse() + F).inverse()) < 1e-10

    # one class left out: R is regular, and nothing is lost because probabilities sum to one
    H, R = (S @ J)[:, :-1].flatten(0, 1), torch.block_diag(*S[:, :-1, :-1])
    assert relative(P @ H.T @ torch.linalg.solve(H @ P @ H.T + R, e[:, :-1].flatten()), D) < 1e-10

    # all classes and no square root: theta += P J^T (I + S M)^{-1} e, M = J P J^T
    J = J.flatten(0, 1)
    M = J @ P @ J.T
    solved = torch.linalg.solve(torch.eye(B * C) + torch.block_diag(*S) @ M, e.flatten())
    assert relative(P @ J.T @ solved, D) < 1e-10


@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_T1_ridge_on_R_biases(eps: float) -> None:
    """T1: R + eps I shortens the step by about 2 eps where p = 1/2 and the prior is tight."""
    weights = weights_of(4, 2)
    f, theta, loss = model(weights, torch.randn(1, 4)), torch.zeros(10), labelled(torch.tensor([1]))
    J, S, e = parts(f, theta, loss)
    P, H = 1e-6 * torch.eye(10), S[0] @ J[0]
    exact = dense_gain(P, softmax_rows(J, f(theta)), -J[0].T @ e[0])
    ridged = P @ H.T @ torch.linalg.solve(H @ P @ H.T + S[0] + eps * torch.eye(2), e[0])
    assert relative(ridged, exact) == pytest.approx(2 * eps, rel=0.01)


@pytest.mark.parametrize(("size", "C", "variance"), [(1, 1, 0.5), (3, 2, 2.0), (4, 3, 0.1)])
def test_T2_stacked_is_sequential(size: int, C: int, variance: float) -> None:
    """T2: on a linear-Gaussian model one stacked batch of 12 == its parts one after the other == Bayesian ridge."""
    weights = weights_of(4, C)
    x, y, theta = torch.randn(12, 4), torch.randn(12, C), flat(weights)
    P = covariance(len(theta))

    def step(theta: Tensor, P: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        f, loss = model(weights, x[rows]), squared(y[rows], variance)
        V = parts(f, theta, loss)[0].flatten(0, 1) / variance**0.5
        return theta + dense_gain(P, V, summed(f, theta, loss)[0]), dense_posterior(P, V)

    stacked = step(theta, P, slice(None))
    sequential = theta, P
    for start in range(0, 12, size):
        sequential = step(*sequential, slice(start, start + size))

    f, loss = model(weights, x), squared(y, variance)
    gs, F = summed(f, theta, loss)
    ridge = theta + damped_step(P.inverse() + F, 0, gs), (P.inverse() + F).inverse()
    for one, other in ((stacked, sequential), (stacked, ridge)):
        assert relative(one[0], other[0]) < 1e-10
        assert relative(one[1], other[1]) < 1e-10


def two_forms(gamma: float, B: int, C: int, rho: float, divisor: float) -> list[tuple[Tensor, Tensor]]:
    """(theta, theta') after each of six batches: the fading filter with lam_K = B rho ||gbar||^2 / divisor in the gain,
    and natural gradient with F = (1 - gamma) F + gamma F_batch, lr = gamma, lam = rho gamma/divisor ||gbar||^2."""
    weights = weights_of(4, 5, C)
    theta = natural = flat(weights)
    P = 0.1 * torch.eye(len(theta))
    F = gamma / B * P.inverse()
    pairs = []
    for _ in range(6):
        f, loss = model(weights, torch.randn(B, 4)), labelled(torch.randint(C, (B,)))

        gs = summed(f, theta, loss)[0]
        P = P / (1 - gamma)
        V = softmax_rows(parts(f, theta, loss)[0], f(theta))
        lam_K = B * rho * (gs / B).square().sum() / divisor
        q = torch.linalg.inv(P.inverse() + lam_K * torch.eye(len(theta)))
        theta = theta + dense_gain(q, V, gs)
        P = dense_posterior(P, V)

        gs, F_batch = summed(f, natural, loss)
        F = (1 - gamma) * F + gamma * F_batch / B
        lam = rho * gamma / divisor * (gs / B).square().sum()
        natural = natural + gamma * damped_step(F, lam, gs / B)
        pairs.append((theta, natural))
    return pairs


STREAMS = pytest.mark.parametrize(("gamma", "B", "C"), [(0.5, 1, 2), (0.1, 3, 4), (0.02, 8, 3)])


@STREAMS
def test_T3_fading_filter_is_natural_gradient(gamma: float, B: int, C: int) -> None:
    """T3: the filter with P/(1 - gamma) == natural gradient with lr = gamma and an EMA Fisher of rate gamma."""
    for theta, natural in two_forms(gamma, B, C, rho=0.0, divisor=1.0):
        assert relative(theta, natural) < 1e-10


@STREAMS
def test_T4_full_kalman_is_ring(gamma: float, B: int, C: int) -> None:
    """T4: full P with lam_K = B rho ||gbar||^2 in the gain == RING with lr gamma and penalty gamma rho."""
    for theta, ring in two_forms(gamma, B, C, rho=3.0, divisor=1.0):
        assert relative(theta, ring) < 1e-10


@STREAMS
def test_T17_scaled_penalty_is_ring_at_equal_rho(gamma: float, B: int, C: int) -> None:
    """T17: lam_K = B rho ||gbar||^2 / gamma == RING with lr gamma and the same rho."""
    for theta, ring in two_forms(gamma, B, C, rho=3.0, divisor=gamma):
        assert relative(theta, ring) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_T3_bias_corrected_average(gamma: float) -> None:
    """T3: without a prior, the average of `ema_` with b = 1 - gamma needs lr = gamma / (1 - b^t), 1/t for gamma = 0."""
    weights, b = weights_of(3, 2), 1 - gamma
    theta = flat(weights)
    average, count = torch.zeros(1, 8, 8), torch.zeros(1)
    P = torch.empty(0)
    for t in range(1, 7):
        f, loss = model(weights, torch.randn(8, 3)), squared(torch.randn(8, 2))
        gs, F_batch = summed(f, theta, loss)
        ema_(average, count, F_batch[None] / 8, b, torch.tensor([True]))
        lr = 1 / t if gamma == 0 else gamma / (1 - b**t)
        natural = theta + lr * damped_step(average[0], 0, gs / 8)
        if t == 1:  # the first batch alone determines all eight parameters
            P, theta = F_batch.inverse(), theta - torch.linalg.solve(F_batch, gs)
        else:
            V = parts(f, theta, loss)[0].flatten(0, 1)
            theta, P = theta + dense_gain(P / b, V, gs), dense_posterior(P / b, V)
        assert relative(theta, natural) < 1e-10


@pytest.mark.parametrize(("B", "C"), [(1, 2), (3, 3), (8, 2)])
@pytest.mark.parametrize("isotropic", [True, False])
def test_T5_inflated_noise_is_regularised_prior(B: int, C: int, isotropic: bool) -> None:
    """T5: R (1 + lam p0) in place of R == q = P/(1 + lam P), if and only if P = p0 I."""
    weights, lam, p0 = weights_of(4, 5, C), 7.0, 0.3
    theta = flat(weights)
    f, loss = model(weights, torch.randn(B, 4)), labelled(torch.randint(C, (B,)))
    gs = summed(f, theta, loss)[0]
    J = parts(f, theta, loss)[0]
    V = softmax_rows(J, f(theta))
    p = p0 * (torch.ones_like(theta) if isotropic else torch.linspace(0.2, 1.8, len(theta)))
    regularised = diagonal_gain(p / (1 + lam * p), V, gs)
    s = 1 + lam * p0
    assert (relative(diagonal_gain(p, V / s**0.5, gs / s), regularised) < 1e-10) == isotropic

    # whatever replaces R, the gain stays in the range of P J^T; the regularised step leaves it
    basis = torch.linalg.svd(p.unsqueeze(1) * V.T, full_matrices=False)
    U = basis.U[:, 1e-10 * basis.S[0] < basis.S]
    outside = relative(U @ (U.T @ regularised), regularised)
    assert outside < 1e-10 if isotropic else outside > 1e-2


@pytest.mark.parametrize(("B", "C", "hidden"), SOFTMAX)
def test_T6_filter_above_variational_diagonal(B: int, C: int, hidden: tuple[int, ...]) -> None:
    """T6: p_fd = diag((1/p + F)^{-1}) >= p_vd = 1/(1/p + diag F) elementwise, and p_vd minimises KL(q || posterior)."""
    weights = weights_of(4, *hidden, C)
    theta = flat(weights)
    f, loss = model(weights, torch.randn(B, 4)), labelled(torch.randint(C, (B,)))
    F, V = summed(f, theta, loss)[1], softmax_rows(parts(f, theta, loss)[0], f(theta))
    p = 0.01 + torch.rand(len(theta))
    precision = torch.diag(1 / p) + F
    fd, vd = filter_diagonal(p, V), propagate_vd(p, V.square().sum(0))
    assert relative(fd, precision.inverse().diagonal()) < 1e-10
    assert relative(vd, 1 / precision.diagonal()) < 1e-10
    assert (fd >= vd * (1 - 1e-12)).all()
    assert (fd / vd).max() > 1.05

    variance = vd.clone().requires_grad_()
    kl = ((precision @ torch.diag(variance)).trace() - variance.log().sum()) / 2
    assert (torch.autograd.grad(kl, variance)[0] * vd).abs().max() < 1e-10


@pytest.mark.parametrize("overlapping", [False, True])
def test_T6_diagonal_prior_is_not_diagonal_step(overlapping: bool) -> None:
    """T6: the gain under a diagonal prior is -g/(1/p + diag F) only if the columns of V have disjoint supports."""
    V = torch.randn(4, 12)
    if not overlapping:
        V *= torch.eye(4, 12)
    p, gs = 0.1 + torch.rand(12), torch.randn(12)
    gap = relative(diagonal_gain(p, V, gs), -gs * propagate_vd(p, V.square().sum(0)))
    assert gap > 0.05 if overlapping else gap < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 1e-2])
def test_T16_stored_penalty_freezes(gamma: float) -> None:
    """T16: lam stored in p accumulates as false information; in the gain only, learning goes on."""
    means = 1.2 * torch.randn(3, 8)
    y, held_out = torch.arange(3).repeat(200), torch.arange(3).repeat(100)
    x, fresh = means[y] + torch.randn(600, 8), means[held_out] + torch.randn(300, 8)
    weights = weights_of(8, 6, 3)
    nll, variance = {}, {}
    for stored in (False, True):
        theta, total = flat(weights), torch.zeros(())
        p = torch.full_like(theta, 0.1)
        batches = torch.randperm(600, generator=torch.Generator().manual_seed(1)).split(8)
        for rows in batches:
            f, loss = model(weights, x[rows]), labelled(y[rows])
            J, _, e = parts(f, theta, loss)
            gs, V = -torch.einsum("bci,bc->i", J, e), softmax_rows(J, f(theta))
            p = p / (1 - gamma)
            lam = 8 * 30.0 * (gs / 8).square().sum()
            total = (1 - gamma) * total + lam
            q = p / (1 + lam * p)
            theta = theta + diagonal_gain(q, V, gs)
            p = propagate_vd(q if stored else p, V.square().sum(0))
        nll[stored] = cross_entropy(model(weights, fresh)(theta), held_out).item()
        variance[stored] = p.mean().item()
        assert not stored or (p <= 1 / total).all()
    assert nll[False] < 0.6 * nll[True]
    assert variance[True] < 0.2 * variance[False]


@pytest.mark.parametrize(("B", "C"), [(1, 2), (3, 3), (8, 5)])
@pytest.mark.parametrize("prior", ["diagonal", "regularised", "kronecker", "dense"])
def test_T18_woodbury_exact(B: int, C: int, prior: str) -> None:
    """T18: the m x m form == -(q^{-1} + J^T S J)^{-1} gs, whatever the prior; q = p/(1 + lam p) adds lam."""
    weights = weights_of(4, C)
    theta = flat(weights)
    f, loss = model(weights, torch.randn(B, 4)), labelled(torch.randint(C, (B,)))
    gs, F = summed(f, theta, loss)
    V = softmax_rows(parts(f, theta, loss)[0], f(theta))
    p = 0.1 + torch.rand(len(theta))
    if prior in ("diagonal", "regularised"):
        lam = 5.0 if prior == "regularised" else 0.0
        assert relative(diagonal_gain(p / (1 + lam * p), V, gs), damped_step(torch.diag(1 / p) + F, lam, gs)) < 1e-10
    else:
        q = torch.kron(covariance(C), covariance(5)) if prior == "kronecker" else covariance(len(theta))
        assert relative(dense_gain(q, V, gs), damped_step(q.inverse() + F, 0, gs)) < 1e-10
