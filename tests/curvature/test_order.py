"""Whose rows are whose, where the shapes do not tell: against gradients of the loss of single samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from grng.benchmarks.architectures.structures import Named, linear
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature
from grng.curvature.order import FIRST, ROWS, SECOND, UNKNOWN

from .harness import ENGINES, measure
from .reference import matrices, module_of, own_parameters

T, V = 4, 5  # positions; 4 is also a batch size below, and a multiple of another
BATCHES = (2, 3, 4, 8)


def mixed(h: Tensor, axis: int) -> Tensor:
    """Every position looks at those before it."""
    return h + h.cumsum(axis)


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=batch_first)


def shuffled(h: Tensor, layer: nn.Module) -> Tensor:
    """As experts have it: rows of all samples, sorted by something else."""
    rows = h.flatten(0, 1)
    order = rows[:, 0].argsort()
    return layer(rows[order])[order.argsort()].view(*h.shape[:2], -1)


def frames(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x.flatten(0, 1)).tanh()  # (B T, 2, 3)
    return m.out(h.view(len(x), T, -1).flatten(1))


def words(B: int) -> Tensor:
    return torch.randint(V, (B, T))


def tokens(m: Any, x: Tensor) -> Tensor:
    """Positions first, as they were given."""
    h = mixed(m.emb(x.T), 0)
    return m.out(mixed(m.norm(m.up(h).tanh()), 0))


def parts() -> dict[str, nn.Module]:
    return {"emb": nn.Embedding(V, 4), "up": linear(4, 6), "norm": nn.LayerNorm(6), "out": linear(6, 3)}


@dataclass
class Case:
    """A model, and in which order its layers' rows are; `unlike` the rest some of them, by name."""

    build: Callable[[], nn.Module]
    order: str
    inputs: Callable[[int], Tensor] = lambda B: torch.randn(B, T, 4)
    unlike: tuple[tuple[str, str], ...] = ()
    axis: int = 0
    flattened: bool = False  # every prediction is a row of the output
    engines: tuple[str, ...] = ENGINES


CASES = {
    "samples first": Case(
        lambda: Named(lambda m, x: m.out(m.enc(x).mean(1)), enc=encoder(True), out=linear(4, 3)), FIRST,
        engines=("hooks",),  # BackPACK does not know attention
    ),
    "positions first inside": Case(
        lambda: Named(lambda m, x: m.out(m.enc(x.transpose(0, 1)).mean(0)), enc=encoder(False), out=linear(4, 3)),
        SECOND,
        unlike=(("out", FIRST), ("enc.self_attn.in_proj", FIRST), ("enc.self_attn.out_proj", FIRST)),
        engines=("hooks",),
    ),
    "words, positions first": Case(
        lambda: Named(lambda m, x: tokens(m, x).mean(0), **parts()), SECOND, words,
    ),
    "positions first throughout": Case(lambda: Named(tokens, **parts()), SECOND, words, axis=1),
    "positions first throughout, with places": Case(  # which belong to all samples
        lambda: Named(
            lambda m, x: m.out(mixed(m.emb(x.T) + m.places(torch.arange(T)).unsqueeze(1), 0)),
            emb=nn.Embedding(V, 4), places=nn.Embedding(T, 4), out=linear(4, 3),
        ),
        SECOND, words, unlike=(("places", ROWS),), axis=1,
    ),
    "positions first, flattened": Case(
        lambda: Named(lambda m, x: tokens(m, x).flatten(0, 1), **parts()), SECOND, words, flattened=True
    ),
    "every position predicted": Case(
        lambda: Named(lambda m, x: m.out(mixed(m.up(x).tanh(), 1)), up=linear(4, 6), out=linear(6, 3)), FIRST
    ),
    "every position predicted, flattened": Case(
        lambda: Named(
            lambda m, x: mixed(m.out(mixed(m.up(x).tanh(), 1)), 1).flatten(0, 1), up=linear(4, 6), out=linear(6, 3)
        ),
        FIRST,
        flattened=True,
    ),
    "experts": Case(
        lambda: Named(
            lambda m, x: m.out(mixed(shuffled(x, m.up).tanh(), 1).mean(1)), up=linear(4, 6), out=linear(6, 3)
        ),
        ROWS,
        unlike=(("out", FIRST),),
    ),
    "places": Case(
        lambda: Named(
            lambda m, x: m.out(mixed(m.emb(x) + m.places(torch.arange(T)), 1)[:, -1]),
            emb=nn.Embedding(V, 4), places=nn.Embedding(T, 4), out=linear(4, 3),
        ),
        FIRST, words, unlike=(("places", ROWS),),
    ),
    "frames": Case(
        lambda: Named(frames, conv=nn.Conv1d(1, 2, 2), out=linear(6 * T, 3)), FIRST, lambda B: torch.randn(B, T, 1, 4)
    ),
    "a batch norm between": Case(
        lambda: nn.Sequential(nn.Conv1d(T, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), linear(6, 3)), FIRST
    ),
}  # fmt: skip
GRID = [(name, B, engine) for name, case in CASES.items() for B in BATCHES for engine in case.engines]


def labels(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum")


def own_losses(case: Case, f: Tensor, y: Tensor, B: int) -> list[Tensor]:
    """The loss of each sample."""
    if case.flattened:
        f, y = (
            (z.unflatten(0, (T, B)).transpose(0, 1) if case.order == SECOND else z.unflatten(0, (B, T))) for z in (f, y)
        )
    return [labels(f.select(case.axis, b).reshape(-1, 3), y.select(case.axis, b).reshape(-1)) for b in range(B)]


@pytest.mark.parametrize(("name", "B", "engine"), GRID)
def test_columns_are_gradients_of_samples(name: str, B: int, engine: str) -> None:
    case = CASES[name]
    model, x = case.build().double(), case.inputs(B)
    x = x.double() if x.is_floating_point() else x
    f = model(x)
    y = torch.randint(3, f.shape[:-1])
    measured = measure(model, x, lambda f: labels(f, y), engine, fisher="empirical")
    unlike = dict(case.unlike)
    for at, layer in measured.layers.items():
        assert layer.status == "verified"
        assert layer.order == unlike.get(at, case.order), at
        (statistics,) = [s for n, s in measured.uses if n == at]
        found = statistics.columns().dense()
        assert statistics.aligned == (layer.order != ROWS and not case.flattened)
        if at == "places" or "batch norm" in name:  # there is no gradient of a sample alone
            continue
        own = own_parameters(model, at)
        module = module_of(model, at)
        expected = []
        for loss in own_losses(case, f, y, B):
            gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            expected.append(matrices(module, dict(zip(own, (g.unsqueeze(0) for g in gradients), strict=True)))[0])
        expected = torch.stack(expected)
        if layer.order == ROWS:
            assert len(found) == B * T
            found, expected = found.sum(0), expected.sum(0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def step(optimizer: GRNG, model: nn.Module, x: Tensor) -> int:
    """Returns how many nested passes the step took."""
    passes, ask = 0, torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        return ask(*args, **kwargs)

    optimizer.zero_grad()
    f = model(x)
    torch.autograd.grad = counted
    try:
        labels(f, torch.zeros(f.shape[:-1], dtype=torch.long)).backward()
    finally:
        torch.autograd.grad = ask
    optimizer.step()
    return passes


def test_asked_once_and_kept_in_a_checkpoint() -> None:
    """Four passes in the first step: for the samples along either axis of the output. Then none but the Fisher's."""
    x, settings = words(3), {"variant": "ekfac", "curvature": Curvature(capture="hooks", stats_every=1)}
    model = CASES["positions first throughout"].build()
    with GRNG(model, **settings) as optimizer:
        assert [step(optimizer, model, x) for _ in range(3)] == [5, 1, 1]
        orders = [layer.order for layer in optimizer._layers]
        state = optimizer.state_dict()
    with GRNG(model, **settings) as optimizer:
        assert {layer.order for layer in optimizer._layers} == {UNKNOWN}
        optimizer.load_state_dict(state)
        assert [layer.order for layer in optimizer._layers] == orders
        assert optimizer._capture.order.axis == 1
        assert step(optimizer, model, x) == 1


def test_posterior_by_linearisation_wants_samples_first() -> None:
    model, x = CASES["positions first throughout"].build(), words(T)
    with GRNG(model, variant="kalman", curvature=Curvature(capture="hooks")) as optimizer:
        step(optimizer, model, x)
        with pytest.raises(TypeError, match=r"use predict\(\)"):
            optimizer.posterior.linearised(x)
