"""RENG on a linear layer with squared error, where the Fisher is the Hessian: F = Lambda (x) I / variance."""

from collections.abc import Callable

import pytest
import torch
from grng.kernels import eigh, kron_spectrum, rotate, rotate_back
from torch import Tensor
from torch.func import grad, hessian

from .forms import eigen_step, factor
from .reference import damped_step, flat, relative, weights_of, with_one

VARIANCE = 0.5


class Linear:
    """Mean squared error of theta -> W [x, 1] on one batch, and its two Kronecker factors."""

    def __init__(self, B: int, C: int) -> None:
        self.x, self.y = with_one(torch.randn(B, 3) * torch.tensor([2.0, 1.0, 0.5])), torch.randn(B, C)
        self.theta, self.shape = flat(weights_of(3, C)), (C, 4)
        self.Lambda, self.Gamma = factor(self.x), torch.eye(C)[None] / VARIANCE
        self.H = hessian(self.loss)(self.theta)

    def loss(self, theta: Tensor) -> Tensor:
        return (self.x @ theta.view(self.shape).T - self.y).square().sum(1).mean() / (2 * VARIANCE)

    def step(self, gradient: Tensor, lam0: float = 0.0) -> Tensor:
        return eigen_step(gradient.view(self.shape), self.Lambda, self.Gamma, lam0).flatten()


def double(loss: Callable[[Tensor], Tensor], theta: Tensor, rho: float) -> Tensor:
    """g + grad(rho/2 ||g||^2) by double backpropagation."""
    theta = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    return (g + torch.autograd.grad(rho / 2 * g.square().sum(), theta)[0]).detach()


def finite(loss: Callable[[Tensor], Tensor], theta: Tensor, rho: float) -> Tensor:
    """g + rho ||g|| (grad L(theta + eps g/||g||) - g)/eps: exact on a quadratic."""
    g, eps = grad(loss)(theta), 0.1
    return g + rho * g.norm() * (grad(loss)(theta + eps * g / g.norm()) - g) / eps


@pytest.mark.parametrize("penalised", [double, finite])
@pytest.mark.parametrize(("B", "C", "rho"), [(5, 1, 0.3), (8, 3, 2.0), (16, 2, 0.0)])
def test_T7_where_F_is_H(penalised: Callable[..., Tensor], B: int, C: int, rho: float) -> None:
    """T7: D = -F^{-1} (g + rho H g) == -(F^{-1} g + rho g)."""
    problem = Linear(B, C)
    g = grad(problem.loss)(problem.theta)
    D = problem.step(penalised(problem.loss, problem.theta, rho))
    assert relative(D, damped_step(problem.H, 0, g) - rho * g) < 1e-10


def test_T7_penalised_Fisher_cancels() -> None:
    """T7: with the Fisher of the penalised loss, F + rho F^2, the penalty cancels: D == -F^{-1} g."""
    problem, rho = Linear(8, 3), 0.7
    (l, U_in, _), (gam, U_out, _) = eigh(problem.Lambda), eigh(problem.Gamma)
    s = kron_spectrum(gam, l)
    gt = double(problem.loss, problem.theta, rho).view(1, *problem.shape)
    D = -rotate_back(rotate(gt, U_out, U_in) / (s + rho * s.square()), U_out, U_in).flatten()
    assert relative(D, damped_step(problem.H, 0, grad(problem.loss)(problem.theta))) < 1e-10


def test_T7_natural_norm_is_a_learning_rate() -> None:
    """T7: penalising rho/2 g^T F^{-1} g instead of rho/2 ||g||^2 only multiplies the step by 1 + rho."""
    problem, rho = Linear(8, 3), 0.7
    g = grad(problem.loss)(problem.theta)

    def penalised(theta: Tensor) -> Tensor:
        g = grad(problem.loss)(theta)
        return problem.loss(theta) + rho / 2 * g @ torch.linalg.solve(problem.H, g)

    D = problem.step(grad(penalised)(problem.theta))
    assert relative(D, (1 + rho) * damped_step(problem.H, 0, g)) < 1e-10


@pytest.mark.parametrize(("stiffness", "converges"), [(1.9, True), (2.1, False)])
def test_T7_stability_limit(stiffness: float, converges: bool) -> None:
    """T7: RENG is stable where lr (1 + rho s_max) < 2 and diverges beyond."""
    problem = Linear(8, 2)
    s_max = torch.linalg.eigvalsh(problem.H)[-1].item()
    rho = 2 / s_max
    lr = stiffness / (1 + rho * s_max)
    theta = problem.theta
    start = grad(problem.loss)(theta).norm()
    for _ in range(200):
        theta = theta + lr * problem.step(double(problem.loss, theta, rho))
    end = grad(problem.loss)(theta).norm()
    assert end < 1e-6 * start if converges else end > 1e6 * start


@pytest.mark.parametrize(("lr", "rho", "lam0"), [(1.0, 0.0, 0.1), (0.7, 0.5, 0.0), (0.3, 2.0, 1.0)])
@pytest.mark.parametrize(("B", "C"), [(8, 1), (8, 3)])
def test_T20_mode_factor(lr: float, rho: float, lam0: float, B: int, C: int) -> None:
    """T20: the error along an eigenvector of F with eigenvalue s is multiplied by 1 - lr s (1 + rho s)/(s + lam0)."""
    problem = Linear(B, C)
    solution = torch.linalg.lstsq(problem.x, problem.y).solution.T.flatten()
    theta = problem.theta + lr * problem.step(double(problem.loss, problem.theta, rho), lam0)
    s, U = torch.linalg.eigh(problem.H)
    expected = (1 - lr * s * (1 + rho * s) / (s + lam0)) * (U.T @ (problem.theta - solution))
    assert relative(U.T @ (theta - solution), expected) < 1e-10
