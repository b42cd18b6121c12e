"""Loops of one's own: GradScaler, accumulation, several closures; and when which pass is taken."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

from grng import GRNG
from grng.regularizers import AGR, GNP, SAM, ClipNorm, Explicit, Regularized

from ..optimizer.cases import closure_of, mlp, stream, vector

RULES: dict[str, Callable[[], Any]] = {
    "gnp": lambda: GNP(0.05),
    "unit": lambda: GNP(0.05, first="unit"),
    "sam": lambda: SAM(0.05),
    "unit ramped": lambda: GNP(0.05, 1.0, first="unit", warmup="lambda", warmup_steps=8),
    "squared": lambda: Explicit(0.3, "forward"),
    "unnormalised": lambda: Explicit(0.3, "forward", normalize=False),
    "double": lambda: Explicit(0.3, "double"),
    "chain": lambda: [GNP(0.05), ClipNorm(0.2), AGR()],
}
BASES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "sgd": lambda m, rule: Regularized(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), rule),
    "adamw fused": lambda m, rule: Regularized(torch.optim.AdamW(m.parameters(), fused=True), rule),
    "ring": lambda m, rule: GRNG(m, regularizer=rule),
    "kalman": lambda m, rule: GRNG(m, "kalman", regularizer=rule),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
bases = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())


def by_passes(optimizer: Any, model: nn.Module, parts: Any, scaler: GradScaler | None = None) -> None:
    optimizer.zero_grad()
    for each in optimizer.passes(scaler):
        with each:
            for x, y in parts:
                loss = cross_entropy(model(x), y) / len(parts)
                (loss if scaler is None else scaler.scale(loss)).backward()


@bases
@rules
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(base: Any, rule: Any, clip: bool) -> None:
    """The recipe equals the loop without a scaler, whatever the scale; unscaled once, by the user or by the step."""
    plain, scaled = mlp(4, 5, 3, dtype=torch.float32), mlp(4, 5, 3, dtype=torch.float32)
    optimizers = base(plain, rule()), base(scaled, rule())
    scaler = GradScaler("cpu", init_scale=2.0**9)
    for batch in stream(4, dtype=torch.float32):
        by_passes(optimizers[0], plain, [batch])
        by_passes(optimizers[1], scaled, [batch], scaler)
        if clip:
            scaler.unscale_(optimizers[1])
            for model in (plain, scaled):
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert torch.allclose(vector(plain), vector(scaled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["ring", "kalman"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_an_ordinary_loop_under_a_scaler(variant: str, unscaled: bool) -> None:
    """As without one; only kalman refuses gradients that were unscaled before the step."""
    plain, scaled = mlp(4, 5, 3, dtype=torch.float32), mlp(4, 5, 3, dtype=torch.float32)
    optimizers, scaler = (GRNG(plain, variant), GRNG(scaled, variant)), GradScaler("cpu", init_scale=2.0**9)
    for batch in stream(4, dtype=torch.float32):
        closure_of(optimizers[0], plain, [batch])()
        optimizers[0].step()
        optimizers[1].zero_grad()
        scaler.scale(cross_entropy(scaled(batch[0]), batch[1])).backward()
        if unscaled:
            scaler.unscale_(optimizers[1])
        if unscaled and variant == "kalman":
            with pytest.raises(RuntimeError, match=r"passes\(scaler\)"):
                scaler.step(optimizers[1])
            return
        scaler.step(optimizers[1])
        scaler.update()
    assert torch.allclose(vector(plain), vector(scaled), rtol=1e-4, atol=1e-5)


@bases
@pytest.mark.parametrize("at", [1, 2])
def test_overflow_under_a_scaler(base: Any, at: int) -> None:
    """In either pass it skips the step and lowers the scale; the next step works."""
    model, (x, y) = mlp(4, 5, 3, dtype=torch.float32), stream(1, dtype=torch.float32)[0]
    optimizer, scaler = base(model, SAM(0.05)), GradScaler("cpu", init_scale=64.0)

    def step(broken: int) -> None:
        optimizer.zero_grad()
        for i, each in enumerate(optimizer.passes(scaler), 1):
            with each:
                scaler.scale(cross_entropy(model(x), y) * (float("inf") if i == broken else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(0)
    before = vector(model)
    step(at)
    assert torch.equal(vector(model), before)
    assert scaler.get_scale() == 32.0
    step(0)
    assert not torch.equal(vector(model), before)
    assert vector(model).isfinite().all()


@pytest.mark.parametrize("build", [
    lambda m: Regularized(torch.optim.SGD(m.parameters(), 0.1), GNP()),
    lambda m: GRNG(m, regularizer=GNP()),
    lambda m: GRNG(m, "reng"),
])  # fmt: skip
def test_a_closure_through_a_scaler_is_refused(build: Any) -> None:
    model, (x, y) = mlp(4, 5, 3, dtype=torch.float32), stream(1, dtype=torch.float32)[0]
    optimizer, scaler, before = build(model), GradScaler("cpu"), vector(model)
    closure = closure_of(optimizer, model, [(x, y)])
    scaler.scale(closure())
    with pytest.raises(RuntimeError, match=r"optimizer\.passes\(scaler\)"):
        scaler.step(optimizer, closure)
    assert torch.equal(vector(model), before)
    assert GradScaler("cpu", enabled=False).step(optimizer, closure) is not None
    assert not torch.equal(vector(model), before)


@pytest.mark.parametrize("name", ["unit", "unit ramped", "squared", "unnormalised", "double"])
def test_a_rule_that_needs_the_scale_says_so(name: str) -> None:
    model, (x, y) = mlp(4, 5, 3, dtype=torch.float32), stream(1, dtype=torch.float32)[0]
    optimizer, scaler = BASES["sgd"](model, RULES[name]()), GradScaler("cpu")
    optimizer.zero_grad()
    for each in optimizer.passes():
        with each:
            scaler.scale(cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match=r"passes\(scaler\)"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["gnp", "sam", "chain"])
@bases
def test_replayed_micro_batches_are_the_big_batch(base: Any, name: str) -> None:
    whole, parts = mlp(4, 5, 3), mlp(4, 5, 3)
    optimizers = base(whole, RULES[name]()), base(parts, RULES[name]())
    for x, y in stream(3, B=12):
        by_passes(optimizers[0], whole, [(x, y)])
        by_passes(optimizers[1], parts, list(zip(x.split(4), y.split(4), strict=True)))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(vector(whole), vector(parts), atol=1e-10)


def gradient_of(model: nn.Module, rule: GNP, x: Tensor, y: Tensor) -> Tensor:
    """What GNP makes of one batch, by hand."""
    params = list(model.parameters())

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model(x), y), params)])

    w, g = vector(model), gradient()
    nn.utils.vector_to_parameters(w + rule.r * g / g.norm(), params)
    moved = gradient()
    nn.utils.vector_to_parameters(w, params)
    return (1 - rule.weight) * g + rule.weight * moved


@bases
def test_a_micro_batch_displaces_by_its_own_gradient(base: Any) -> None:
    """A loop around passes() leaves the average of the micro-batches' own gradients."""
    model, rule, (x, y) = mlp(4, 5, 3), GNP(0.3), stream(1, B=12)[0]
    parts = list(zip(x.split(4), y.split(4), strict=True))
    expected = sum(gradient_of(model, rule, *part) for part in parts) / 3
    optimizer = base(model, rule)
    optimizer.zero_grad()
    for a, b in parts:
        for each in optimizer.passes():
            with each:
                (cross_entropy(model(a), b) / 3).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert torch.allclose(found, torch.as_tensor(expected), atol=1e-12)
    optimizer.step()
    if hasattr(optimizer, "coverage"):
        assert {row.verified for row in optimizer.coverage()} == {"yes"}


def test_a_closure_that_forgets_zero_grad() -> None:
    """Refused where gradients were there before, since the second pass cannot repeat them; harmless otherwise."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    optimizer, before = BASES["sgd"](model, GNP()), vector(model)

    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
        optimizer.step(closure)
    assert torch.equal(vector(model), before)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert not torch.equal(vector(model), before)


def test_passes_that_were_not_taken() -> None:
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    optimizer, before = BASES["sgd"](model, GNP()), vector(model)
    cross_entropy(model(x), y).backward()
    gradient = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"step\(closure\).*optimizer\.passes\(\)"):
        optimizer.step()
    for each in optimizer.passes():
        with each:
            cross_entropy(model(x), y).backward()
        break
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()

    def without_with() -> None:
        for _ in optimizer.passes():
            cross_entropy(model(x), y).backward()

    def raising() -> None:
        for each in optimizer.passes():
            with each:
                raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="with each"):
        without_with()
    with pytest.raises(ZeroDivisionError):
        raising()
    assert torch.equal(vector(model), before)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradient, strict=True))


CALLS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "always": ({}, [2, 2, 2, 2, 2, 2]),
    "interval": ({"interval": 3}, [2, 1, 1, 2, 1, 1]),
    "zero": ({"warmup": "zero", "warmup_steps": 4}, [1, 1, 1, 1, 2, 2]),
    "zero in epochs": ({"warmup": "zero", "warmup_epochs": 2, "steps_per_epoch": 2}, [1, 1, 1, 1, 2, 2]),
    "r": ({"warmup": "r", "warmup_steps": 4}, [1, 2, 2, 2, 2, 2]),
    "lambda": ({"warmup": "lambda", "warmup_steps": 4}, [1, 2, 2, 2, 2, 2]),
    "never": ({"probability": 0.0}, [1, 1, 1, 1, 1, 1]),
    "from step 3": ({"probability": lambda t: float(t >= 3)}, [1, 1, 1, 2, 2, 2]),
}


@pytest.mark.parametrize(("settings", "expected"), CALLS.values(), ids=CALLS.keys())
def test_how_often_the_closure_is_called(settings: dict[str, Any], expected: list[int]) -> None:
    """No step takes a pass that changes nothing; r and alpha follow their ramps."""
    model, calls = mlp(4, 5, 3), []
    optimizer = BASES["sgd"](model, GNP(0.05, alpha=0.8, **settings))
    for t, (x, y) in enumerate(stream(6)):
        closure, count = closure_of(optimizer, model, [(x, y)]), [0]

        def counted(closure: Any = closure, count: list[int] = count) -> Tensor:
            count[0] += 1
            return closure()

        optimizer.step(counted)
        calls.append(count[0])
        if settings.get("warmup") in ("r", "lambda"):
            ramp = min(1.0, t / 4)
            told = {name: float(optimizer.diagnostics[name]) for name in ("r", "alpha")}
            ramped, constant = ("r", "alpha") if settings["warmup"] == "r" else ("alpha", "r")
            full = {"r": 0.05, "alpha": 0.8}
            assert told[ramped] == pytest.approx(ramp * full[ramped])
            assert told[constant] == pytest.approx(full[constant])
    assert calls == expected


def test_hybrid_draws() -> None:
    """As often as asked for, alike for one seed, otherwise for another, and independent from step to step."""
    draws = [[GNP(probability=0.3, seed=seed).acts(t) for t in range(4000)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for drawn in draws:
        assert abs(sum(drawn) / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
        both = sum(a and b for a, b in pairwise(drawn)) / 3999
        assert abs(both - 0.09) < 4 * (0.09 * 0.91 / 4000) ** 0.5
