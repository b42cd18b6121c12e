"""Every rule over several steps, warm-ups and hybrids included, against a plain loop that writes its formula out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng.regularizers import AGR, ASAM, GNP, ClipNorm, Explicit, Regularized, Schedule, gnp_repository

from ..optimizer.cases import closure_of, mlp, relative, stream, vector

STEPS = 7
LR = 0.3


def gradient(model: nn.Module, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The gradient at other weights, flat."""
    before = vector(model)
    nn.utils.vector_to_parameters(at, model.parameters())
    found = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    nn.utils.vector_to_parameters(before, model.parameters())
    return torch.cat([g.flatten() for g in found])


Rule = Callable[[nn.Module, Tensor, Tensor, Tensor, float, float], Tensor]  # model, x, y, w, strength, radius


def gnp(r: float, alpha: float, unit: bool = False, clip: float = 0.0) -> Rule:
    def rule(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, strength: float, radius: float) -> Tensor:
        g = gradient(model, x, y, w)
        a = alpha * strength
        first = g / g.norm() if unit else g
        if a and radius:
            first = (1 - a) * first + a * gradient(model, x, y, w + radius * r * g / g.norm())
        elif unit:
            first = (1 - a) * first + a * g
        return first * min(1.0, clip / float(first.norm())) if clip else first

    return rule


def explicit(rho: float, eps: float) -> Rule:
    def rule(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, strength: float, radius: float) -> Tensor:
        g = gradient(model, x, y, w)
        return g + strength * rho * g.norm() * (gradient(model, x, y, w + eps * g / g.norm()) - g) / eps

    return rule


def whole_agr(scale: float) -> Rule:
    def rule(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, strength: float, radius: float) -> Tensor:
        g = gradient(model, x, y, w)
        return g - strength * scale * g.abs() / g.abs().sum() * g

    return rule


def plain(model: nn.Module, x: Tensor, y: Tensor, w: Tensor, strength: float, radius: float) -> Tensor:
    return gradient(model, x, y, w)


def ramp(t: int, length: float) -> float:
    return min(1.0, t / length)


# regularizers, the rule, its strength at step t, its radius at step t, whether step t acts
ROWS: dict[str, tuple[Any, Rule, Callable[[int], float], Callable[[int], float], Callable[[int], bool]]] = {}


def row(
    name: str,
    rule: Any,
    formula: Rule,
    strength: Callable[[int], float] = lambda t: 1.0,
    radius: Callable[[int], float] = lambda t: 1.0,
    acts: Callable[[int], bool] = lambda t: True,
) -> None:
    ROWS[name] = rule, formula, strength, radius, acts


row("gnp", GNP(0.1, 0.8), gnp(0.1, 0.8))
row("gnp by lambda", GNP(0.2, lam=0.1), gnp(0.2, 0.5))
row("unit first term", GNP(0.1, 0.8, first="unit"), gnp(0.1, 0.8, unit=True))
row("repository", gnp_repository(0.1, 0.8, 0.3), gnp(0.1, 0.8, unit=True, clip=0.3))
row("clipped", [GNP(0.1, 0.8), ClipNorm(0.2)], gnp(0.1, 0.8, clip=0.2))
row("barely clipped", [GNP(0.1, 0.8), ClipNorm(50.0)], gnp(0.1, 0.8, clip=50.0))
row("warm-up of r", GNP(0.1, 0.8, warmup="r", warmup_steps=4), gnp(0.1, 0.8), radius=lambda t: ramp(t, 4))
row(
    "warm-up of r, unit",
    GNP(0.1, 0.8, first="unit", warmup="r", warmup_steps=4),
    gnp(0.1, 0.8, unit=True),
    radius=lambda t: ramp(t, 4),
)
row("warm-up of lambda", GNP(0.1, 0.8, warmup="lambda", warmup_steps=4), gnp(0.1, 0.8), strength=lambda t: ramp(t, 4))
row("warm-up zero", GNP(0.1, 0.8, warmup="zero", warmup_steps=4), gnp(0.1, 0.8), acts=lambda t: t >= 4)
row(
    "warm-up in epochs",
    GNP(0.1, 0.8, warmup="lambda", warmup_epochs=1.5, steps_per_epoch=4),
    gnp(0.1, 0.8),
    strength=lambda t: ramp(t, 6),
)
row("every third step", GNP(0.1, 0.8, interval=3), gnp(0.1, 0.8), acts=lambda t: t % 3 == 0)
row("now and then", GNP(0.1, 0.8, probability=lambda t: float(t in (2, 5))), gnp(0.1, 0.8), acts=lambda t: t in (2, 5))
row("never", GNP(0.1, 0.8, probability=0.0), gnp(0.1, 0.8), acts=lambda t: False)
row("explicit", Explicit(0.3, eps=0.05), explicit(0.3, 0.05))
row(
    "explicit, warm-up",
    Explicit(0.3, eps=0.05, warmup="lambda", warmup_steps=5),
    explicit(0.3, 0.05),
    strength=lambda t: ramp(t, 5),
)
row("agr", AGR("global", 0.7), whole_agr(0.7))
row("agr, warm-up", AGR("global", warmup="lambda", warmup_steps=3), whole_agr(1.0), strength=lambda t: min(1.0, t / 3))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("B", [3, 8])
def test_rule(name: str, B: int) -> None:
    rule, formula, strength, radius, acts = ROWS[name]
    model = mlp(4, 6, 3)
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=LR), rule)
    w = vector(model)
    for t, (x, y) in enumerate(stream(STEPS, B=B)):
        chosen = formula if acts(t) else plain
        w = w - LR * chosen(model, x, y, w, strength(t), radius(t))
        closure, calls = closure_of(optimizer, model, [(x, y)]), []
        optimizer.step(lambda closure=closure, calls=calls: (calls.append(1), closure())[1])
        twice = acts(t) and strength(t) and radius(t) and not name.startswith("agr")
        assert len(calls) == 1 + bool(twice)  # no pass that does not count
        assert relative(vector(model), w) < 1e-5 * (1 if "clip" in name or name == "repository" else 1e-5)
        nn.utils.vector_to_parameters(w, model.parameters())


@pytest.mark.parametrize(
    "rule",
    [
        *(GNP(0.1, 0.8), GNP(0.1, 0.8, first="unit")),
        *(Explicit(0.3, mode, penalty) for mode in ("central", "double") for penalty in ("squared", "norm")),
        Explicit(0.3, normalize=False),
    ],
    ids=str,
)
def test_a_scaled_loss(rule: Any) -> None:
    """Under a GradScaler's factor: the same step as without, and the same diagnostics."""
    ends, told = [], []
    for scale in (1.0, 1024.0):
        model, (x, y) = mlp(4, 6, 3), stream(1)[0]
        optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=LR), rule)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        for each in optimizer.passes(scaler):
            with each:
                scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append(vector(model))
        told.append({name: float(value) for name, value in optimizer.diagnostics.items()})
    assert relative(ends[1], ends[0]) < 1e-6
    assert relative(ends[0], vector(mlp(4, 6, 3))) > 1e-3
    assert told[0] == pytest.approx(told[1], rel=1e-6)


SCOPES: dict[str, Callable[[list[Tensor], list[int]], list[Tensor]]] = {
    "tensor": lambda gs, groups: [g.abs().sum().expand_as(g) for g in gs],
    "row": lambda gs, groups: [
        g.abs().sum().expand_as(g) if g.ndim == 1 else g.abs().sum(1, keepdim=True).expand_as(g) for g in gs
    ],
    "group": lambda gs, groups: [
        torch.stack([h.abs().sum() for h, j in zip(gs, groups, strict=True) if i == j]).sum().expand_as(g)
        for g, i in zip(gs, groups, strict=True)
    ],
    "global": lambda gs, groups: [torch.stack([h.abs().sum() for h in gs]).sum().expand_as(g) for g in gs],
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("min_numel", [1, 4, 5])
def test_agr_scopes(scope: str, eps: float, min_numel: int) -> None:
    """(1 - |g| / (sum |g| + eps)) g with the sum over each scope; scopes of fewer than min_numel elements keep g."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    params, groups = list(model.parameters()), [0, 0, 1, 1]
    optimizer = Regularized(
        torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0),
        AGR(scope, eps=eps, min_numel=min_numel),
    )
    before = [p.detach().clone() for p in params]
    closure_of(optimizer, model, [(x, y)])()
    gs = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    optimizer.step()
    for p, w, g, total in zip(params, before, gs, SCOPES[scope](gs, groups), strict=True):
        size = g[0].numel() if scope == "row" and g.ndim > 1 else g.numel()
        small = scope in ("tensor", "row") and size < min_numel
        torch.testing.assert_close(w - p, g if small else g - g.abs() / (total + eps) * g)


def test_settings_of_a_group() -> None:
    """Each group its r and alpha; the norm is that of all that take part, and what does not is not displaced."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    params, w = list(model.parameters()), vector(mlp(4, 5, 3))
    sizes = [p.numel() for p in params]
    groups = [
        {"params": params[:2], "regularizer": {"r": 0.3, "alpha": 0.5}},
        {"params": params[2:3]},
        {"params": params[3:], "regularizer": False},
    ]
    optimizer = Regularized(torch.optim.SGD(groups, lr=1.0), GNP(0.1, 0.8))
    g = gradient(model, x, y, w)
    r = torch.cat([torch.full((n,), v) for n, v in zip(sizes, (0.3, 0.3, 0.1, 0.0), strict=True)])
    alpha = torch.cat([torch.full((n,), v) for n, v in zip(sizes, (0.5, 0.5, 0.8, 0.0), strict=True)])
    taking = g * (r > 0)
    moved = gradient(model, x, y, w + r * taking / taking.norm())
    optimizer.step(closure_of(optimizer, model, [(x, y)]))
    found = w - vector(model)
    inside = r > 0
    assert relative(found[inside], ((1 - alpha) * g + alpha * moved)[inside]) < 1e-6
    # What takes no part feels the penalty of the others' gradient like every parameter, by the rule's own alpha.
    assert relative(found[~inside], (0.8 * moved + 0.2 * g)[~inside]) < 1e-6


def test_a_first_gradient_of_zero_stays_where_it_is() -> None:
    """There is no direction: no displacement, nothing that is not finite."""
    for rule in (GNP(0.1, 0.8), ASAM(0.1, rule="common"), Explicit(0.3)):
        w = nn.Parameter(torch.zeros(3))
        optimizer = Regularized(torch.optim.SGD([w], lr=1.0), rule)

        def closure(w: nn.Parameter = w, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (w**4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert torch.equal(w.detach(), torch.zeros(3))


def test_draws_depend_on_the_seed() -> None:
    """Half of the steps, others for another seed, the same for the same."""
    taken = [[Schedule(probability=0.5, seed=seed).acts(t) for t in range(400)] for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2]
    assert 160 < sum(taken[0]) < 240


@pytest.mark.parametrize("mode", ["forward", "backward", "central"])
def test_differences_of_bfloat16_weights(mode: str) -> None:
    """As of the same weights in float32: the displacement is made there, on both sides."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model, (x, y) = mlp(4, 8, 3, dtype=torch.bfloat16).to(dtype), stream(1, dtype=torch.float32)[0]
        handed: list[Tensor] = []

        class Note(torch.optim.SGD):
            def step(self, closure: Any = None, into: list[Tensor] = handed) -> None:  # type: ignore[override]
                into += [p.grad.float().flatten() for g in self.param_groups for p in g["params"]]

        optimizer = Regularized(Note(model.parameters(), lr=1.0), Explicit(3.0, mode, eps=0.05))
        optimizer.step(closure_of(optimizer, model, [(x.to(dtype), y)], lambda f, y: cross_entropy(f.float(), y)))
        found.append(torch.cat(handed))
    assert relative(found[0], found[1]) < 0.1


def test_random_numbers_go_on_as_after_one_pass() -> None:
    """Both passes draw the same, and what comes after draws as if there had been one."""
    ends = []
    for rule in (GNP(0.1, 0.8), ClipNorm(1.0)):
        torch.manual_seed(0)
        model, (x, y) = nn.Sequential(mlp(4, 6, 3), nn.Dropout(0.5)), stream(1)[0]
        torch.manual_seed(5)
        optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.1), rule)
        optimizer.step(closure_of(optimizer, model, [(x, y)]))
        ends.append(torch.rand(3))
    assert torch.equal(*ends)
