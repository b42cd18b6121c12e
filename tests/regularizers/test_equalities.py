"""The rules against independent references: the common two-step SAM, double backpropagation, the published formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng.regularizers import ASAM, GNP, SAM, Explicit, Regularized, agr

from ..optimizer.cases import mlp, stream, vector

BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
batch_sizes = pytest.mark.parametrize("B", [3, 8, 17])


def closure_for(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def two_step(model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor, move: Callable[..., Any]) -> None:
    """A step as the common implementations make it: gradient, climb, gradient, come back, step."""
    base.zero_grad()
    cross_entropy(model(x), y).backward()
    params = list(model.parameters())
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in params]), p=2)  # type: ignore[union-attr]
    old = [p.data.clone() for p in params]
    with torch.no_grad():
        move(params, norm)
    base.zero_grad()
    cross_entropy(model(x), y).backward()
    for p, w in zip(params, old, strict=True):
        p.data = w
    base.step()


@bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [SAM(0.07), GNP(0.07, 1.0), GNP(0.07, lam=0.07)], ids=["sam", "alpha", "lam"])
def test_alpha_1_is_sam_to_the_bit(base: Any, dtype: torch.dtype, rule: GNP) -> None:
    ours, theirs = mlp(4, 9, 3, dtype=dtype), mlp(4, 9, 3, dtype=dtype)
    optimizer, reference = Regularized(base(ours.parameters()), rule), base(theirs.parameters())

    def climb(params: list[nn.Parameter], norm: Tensor) -> None:
        for p in params:
            p.add_(p.grad * (0.07 / (norm + 1e-12)))

    for x, y in stream(10, dtype=dtype):
        optimizer.step(closure_for(optimizer, ours, x, y))
        two_step(theirs, reference, x, y, climb)
    assert torch.equal(vector(ours), vector(theirs))


@bases
@pytest.mark.parametrize("rule", ["official", "common"])
def test_asam(base: Any, rule: str) -> None:
    ours, theirs = mlp(4, 9, 3), mlp(4, 9, 3)
    optimizer = Regularized(base(ours.parameters()), ASAM(0.3, eta=0.02, rule=rule), model=ours)
    reference, r = base(theirs.parameters()), 0.3

    def climb(params: list[nn.Parameter], norm: Tensor) -> None:
        names = [name for name, _ in theirs.named_parameters()]
        T = [p.abs() for p in params]
        if rule == "official":
            T = [p.abs() + 0.02 if "weight" in n else torch.ones_like(p) for n, p in zip(names, params, strict=True)]
        norm = torch.stack([(t * p.grad).square().sum() for t, p in zip(T, params, strict=True)]).sum().sqrt()
        for t, p in zip(T, params, strict=True):
            p.add_(r * t * t * p.grad / norm)

    for x, y in stream(6):
        optimizer.step(closure_for(optimizer, ours, x, y))
        two_step(theirs, reference, x, y, climb)
    assert torch.allclose(vector(ours), vector(theirs), atol=1e-9)


def handed_on(model: nn.Module, rule: Any, x: Tensor, y: Tensor) -> Tensor:
    """What SGD with learning rate 1 subtracts: the regularised gradient."""
    optimizer, before = Regularized(torch.optim.SGD(model.parameters(), lr=1.0), rule, model=model), vector(model)
    optimizer.step(closure_for(optimizer, model, x, y))
    found = before - vector(model)
    nn.utils.vector_to_parameters(before, model.parameters())
    return found


def exact(model: nn.Module, x: Tensor, y: Tensor, penalty: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The plain gradient and what the penalty adds, by double backpropagation."""
    params = list(model.parameters())
    g = torch.cat([t.flatten() for t in torch.autograd.grad(cross_entropy(model(x), y), params, create_graph=True)])
    added = torch.autograd.grad(penalty(g), params)
    return g.detach(), torch.cat([t.flatten() for t in added])


@batch_sizes
@pytest.mark.parametrize("lam", [0.02, 0.5])
def test_gnp_is_linear_in_r(B: int, lam: float) -> None:
    """Against the exact gradient of L + lam |g|: the error of what is added falls with r, and as r."""
    model, (x, y) = mlp(4, 9, 3), stream(1, B=B)[0]
    g, added = exact(model, x, y, lambda g: lam * g.norm())
    errors = [
        float((handed_on(model, GNP(r, lam=lam), x, y) - g - added).norm() / added.norm()) for r in (0.1, 0.01, 0.001)
    ]
    assert errors[0] < 0.2
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.1)


@batch_sizes
@pytest.mark.parametrize("penalty", ["squared", "norm"])
def test_explicit_modes(B: int, penalty: str) -> None:
    model, (x, y), rho = mlp(4, 9, 3), stream(1, B=B)[0], 0.3
    g, added = exact(model, x, y, lambda g: rho / 2 * g.square().sum() if penalty == "squared" else rho * g.norm())

    def error(mode: str, eps: float, **settings: Any) -> float:
        found = handed_on(model, Explicit(rho, mode, penalty, eps, **settings), x, y)
        return float((found - g - added).norm() / added.norm())

    assert error("double", 1e-2) < 1e-10
    for mode in ("forward", "backward"):
        assert error(mode, 1e-3) / error(mode, 1e-2) == pytest.approx(0.1, rel=0.1)
        assert error(mode, 1e-3, normalize=False) < 1e-2
    assert error("central", 1e-2) / error("central", 1e-1) == pytest.approx(0.01, rel=0.1)


@batch_sizes
def test_gauss_newton_product(B: int) -> None:
    """Against J^T S J g with J and S by brute force."""
    model, (x, y), rho = mlp(4, 9, 3), stream(1, B=B)[0], 0.3
    params = dict(model.named_parameters())
    f = model(x)
    J = torch.autograd.functional.jacobian(
        lambda *values: torch.func.functional_call(model, dict(zip(params, values, strict=True)), (x,)),
        tuple(params.values()),
    )
    J = torch.cat([j.flatten(2) for j in J], -1)  # (B, C, d)
    p = torch.softmax(f, 1)
    S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    G = torch.einsum("bid,bij,bje->de", J, S, J) / B
    g, _ = exact(model, x, y, lambda g: g.sum())
    found = handed_on(model, Explicit(rho, "ggn"), x, y)
    assert torch.allclose(found, g + rho * (G @ g), atol=1e-12)


class Cast(nn.Module):
    """Returns a cast of its body's output, and keeps that."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.kept = body, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.body(x)
        return self.kept.double()


@pytest.mark.parametrize("inside", [False, True])
def test_gauss_newton_product_where_a_cast_is_returned(inside: bool) -> None:
    """Of a loss of the cast, and of one of what it is of, as a model has it that computes its own loss."""
    body, (x, y) = mlp(4, 9, 3, dtype=torch.float32), stream(1)[0]
    expected = handed_on(body, Explicit(0.3, "ggn"), x.float(), y)
    model = Cast(body)
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=1.0), Explicit(0.3, "ggn"), model=model)
    before = vector(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        f = model(x.float())
        loss = cross_entropy(model.kept if inside else f, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(before - vector(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 2, 3)])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_agr_formula(shape: tuple[int, ...], scope: str) -> None:
    g = torch.randn(shape, dtype=torch.float64)
    g[0] = 0
    rows = g.flatten(1) if scope == "row" and g.ndim > 1 else g.flatten().unsqueeze(0)
    total = rows.abs().sum(1, keepdim=True)
    expected = torch.where(total > 0, (1 - rows.abs() / total) * rows, 0).view(shape)
    found = agr(g, scope=scope)
    assert torch.allclose(found, expected, atol=1e-15)
    assert torch.allclose(agr(3 * g, scope=scope), 3 * found, atol=1e-14)
    assert (found * g >= 0).all()
    assert (found.abs() <= g.abs()).all()


def test_agr_of_one_element() -> None:
    g = torch.tensor([[0.3]])
    assert agr(g).item() == 0.0  # as published
    assert torch.equal(agr(g, min_numel=2), g)
    assert torch.equal(agr(torch.zeros(5)), torch.zeros(5))
