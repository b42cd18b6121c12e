"""The identities end to end: the same equations through GRNG on ordinary modules, in float64."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.preconditioners import Kalman

from .reference import damped_step, relative

Loss = Callable[[Tensor, Tensor], Tensor]


class Times(nn.Module):
    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        return self.c * x


def mlp(*sizes: int, c: float = 1.0) -> nn.Sequential:
    """The same function for every c: layers are c phi with phi = theta / c."""
    torch.manual_seed(1)
    modules: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        linear = nn.Linear(n_in, n_out)
        for p in linear.parameters():
            p.data.div_(c)
        modules += [linear, nn.Tanh()] if c == 1 else [linear, Times(c), nn.Tanh()]
    return nn.Sequential(*modules[:-1])


def vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def flat_loss(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Callable[[Tensor], Tensor]:
    """theta -> loss, on a copy of the model that no optimizer is attached to."""
    model = deepcopy(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def f(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return loss(functional_call(model, named, x), y)

    return f


def train(optimizer: GRNG, model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> list[float]:
    """One step a batch; the losses before them."""
    losses = []
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            return value

        losses.append(optimizer.step(closure).item())
    return losses


def stream(steps: int, B: int = 8, C: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(B, 4), torch.randint(C, (B,))) for _ in range(steps)]


@pytest.mark.parametrize("mode", [None, "double", "finite", "ggn"])
@pytest.mark.parametrize("settings", [{}, {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.1}])
def test_rho_zero_is_kfac(mode: str | None, settings: dict[str, Any]) -> None:
    """rho = 0: RING, and RENG in every mode, are K-FAC to 1e-12 at the same floor."""
    batches, ends = stream(8), []
    for variant, own in (("kfac", {}), ("ring", {"rho": 0}) if mode is None else ("reng", {"rho": 0, "mode": mode})):
        model = mlp(4, 5, 3)
        with GRNG(model, variant, **own, **settings, curvature=Curvature(damping=0.01)) as optimizer:
            train(optimizer, model, batches, cross_entropy)
        ends.append(vector(model))
    assert relative(ends[1], ends[0]) < 1e-12
    assert relative(ends[0], vector(mlp(4, 5, 3))) > 1e-2


@pytest.mark.parametrize("mode", ["double", "finite", "ggn"])
@pytest.mark.parametrize(("B", "C", "lr", "rho", "lam0"), [(6, 1, 1.0, 0.3, 1e-14), (16, 3, 0.5, 2.0, 0.2)])
def test_T7_reng_where_F_is_H(
    mode: Literal["double", "finite", "ggn"], B: int, C: int, lr: float, rho: float, lam0: float
) -> None:
    """T7, T20: on a linear model with squared error D = -(F + lam0 I)^{-1} (F + rho F^2) F^{-1} g; -(F^{-1} g + rho g)
    for lam0 -> 0."""
    model = mlp(4, C)
    x, y = torch.randn(B, 4), torch.randn(B, C)
    theta = vector(model)
    f = flat_loss(model, x, y, mse_loss)
    g, H = grad(f)(theta), hessian(f)(theta)
    curvature = Curvature(fisher="exact", likelihood="gaussian", damping=lam0, kl_clip=None)
    with GRNG(model, "reng", lr=lr, rho=rho, momentum=0.0, mode=mode, curvature=curvature) as optimizer:
        train(optimizer, model, [(x, y)], mse_loss)
    D = (vector(model) - theta) / lr
    assert relative(D, damped_step(H, lam0, g + rho * H @ g)) < 1e-10
    if lam0 < 1e-10:
        assert relative(D, damped_step(H, 0, g) - rho * g) < 1e-10


@pytest.mark.parametrize(("B", "C", "lr", "rho"), [(8, 3, 1.0, 3e3), (3, 4, 0.3, 1e4)])
def test_T10_loss_falls_by_lr_over_rho(B: int, C: int, lr: float, rho: float) -> None:
    """T10: RING lowers the loss by lr/rho a step while rho ||g||^2 dominates the curvature, within 2 %."""
    model, batches = mlp(4, 6, C), stream(1, B, C) * 10
    with GRNG(model, "ring", lr=lr, rho=rho, momentum=0.0, curvature=Curvature(kl_clip=None)) as optimizer:
        losses = torch.tensor(train(optimizer, model, batches, cross_entropy))
    assert (losses[:-1] - losses[1:]).tolist() == pytest.approx([lr / rho] * 9, rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.3, 30.0, "auto"])
@pytest.mark.parametrize(("c", "region"), [(0.3, {}), (0.3, {"kl_clip": 1e-3}), (10.0, {"kl_clip": 1e-3})])
def test_T19_ring_commutes_with_scaling(c: float, region: dict[str, Any], rho: float | Literal["auto"]) -> None:
    """T19: RING on theta = c phi takes the same steps, with momentum, floor and trust region as they are by default;
    where weights get small, the layers' own trust region apart, which counts them as 0.1 a row at least."""
    batches, ends = stream(12), []
    for scale in (1.0, c):
        model = mlp(4, 5, 3, c=scale)
        with GRNG(model, "ring", rho=rho, curvature=Curvature(**region)) as optimizer:
            train(optimizer, model, batches, cross_entropy)
        ends.append(scale * vector(model))
    assert relative(ends[1], ends[0]) < 1e-10


@pytest.mark.parametrize("rho", [0.0, 2.0])
@pytest.mark.parametrize(("gamma", "groups"), [(0.0, 2), (0.1, 3), (0.1, 8)])
@pytest.mark.parametrize("projection", ["vd", "fd"])
def test_T17_kalman_is_the_dense_filter(projection: str, gamma: float, groups: int, rho: float) -> None:
    """T17, T18: theta += -(1/p + lam_K + V V^T)^{-1} gs with lam_K = B rho ||gbar||^2/gamma, 0 for rho = 0; p+ is the
    projection of (1/p + V V^T)^{-1}, into which lam_K does not enter."""
    model, plain, batches = mlp(4, 5, 3), mlp(4, 5, 3), stream(6)
    theta = vector(model)
    p = torch.full_like(theta, 0.05)
    filter_ = Kalman(0.05, gamma, columns="grouped", groups=groups, projection=projection, p_max=1e3)  # type: ignore[arg-type]
    curvature = Curvature(fisher="empirical")
    with GRNG(model, "kalman", rho=rho, preconditioner=filter_, curvature=curvature) as optimizer:
        for x, y in batches:
            train(optimizer, model, [(x, y)], cross_entropy)
            scores = jacrev(flat_loss(plain, x, y, partial(cross_entropy, reduction="none")))(theta)
            V = torch.stack([scores[g::groups].sum(0) for g in range(groups)])
            gs = scores.sum(0)
            lam = 8 * rho * (gs / 8).square().sum() / (gamma or 1)
            precision = torch.diag((1 - gamma) / p) + V.T @ V
            theta = theta + damped_step(precision, lam, gs)
            p = 1 / precision.diagonal() if projection == "vd" else precision.inverse().diagonal()
            assert relative(vector(model), theta) < 1e-10
            theta = vector(model)


def test_T16_penalty_is_not_stored() -> None:
    """T16: the covariance after a step is the same whatever rho is, the step is not."""
    ends, variances = [], []
    for rho in (0.0, 1e3):
        model = mlp(4, 5, 3)
        with GRNG(model, "kalman", rho=rho) as optimizer:
            torch.manual_seed(2)
            train(optimizer, model, stream(1), cross_entropy)
            variances.append(torch.cat([s["p"].flatten() for s in optimizer.state.values() if "p" in s]))
        ends.append(vector(model))
    assert relative(variances[1], variances[0]) < 1e-12
    assert relative(ends[1], ends[0]) > 1e-3


@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
def test_T22_damping_takes_the_data_gradient(fisher: Literal["mc", "empirical", "exact"]) -> None:
    """T22: lam = rho ||g||^2 + lam0 with the gradient of the data, whatever labels the Fisher draws."""
    model, rho, lam0 = mlp(4, 5, 3), 3.0, 0.01
    x, y = stream(1)[0]
    g = grad(flat_loss(model, x, y, cross_entropy))(vector(model))
    with GRNG(model, "ring", rho=rho, curvature=Curvature(fisher=fisher, damping=lam0)) as optimizer:
        train(optimizer, model, [(x, y)], cross_entropy)
        assert optimizer.diagnostics["lam"].item() == pytest.approx((rho * g.square().sum() + lam0).item(), rel=1e-10)
