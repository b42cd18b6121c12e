"""What must not change an update: duplicates, micro-batches, the loss's scale, the order of parameters, idle layers."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, normalize

from grng import Curvature

from .cases import (
    AVERAGED,
    METHODS,
    SUMMED,
    Affine,
    Loss,
    Method,
    closure_of,
    methods,
    mixed,
    mlp,
    relative,
    settings,
    stream,
    tensors_of,
    train,
    vector,
)

Fisher = Literal["mc", "empirical", "exact"]
TOLERANCE = 1e-10


def image_stream(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(steps, 8, 1, 6, 6, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(3, (8,), generator=generator)) for x in images]


def convolutions() -> nn.Sequential:
    """Factors of full rank, or one short of it: the basis of a null space of two dimensions, which EKFAC's second
    moments depend on, is any."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2, groups=2)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), *head).double()


MODELS = {"mixed": (mixed, stream(3)), "convolutions": (convolutions, image_stream(3))}


def run(method: Method, build: Any, steps: list[list[tuple[Tensor, Tensor]]], loss: Loss, **options: Any) -> Tensor:
    """Parameters after one step a list of micro-batches."""
    model = build()
    with method(model, **options) as optimizer:
        for parts in steps:
            optimizer.step(closure_of(optimizer, model, parts, loss)) if optimizer.requires_closure else _plain(
                optimizer, model, parts, loss
            )
    return vector(model)


def _plain(optimizer: Any, model: nn.Module, parts: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
    closure_of(optimizer, model, parts, loss)()
    optimizer.step()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@methods(*AVERAGED)
def test_duplicated_batch(method: Method, fisher: Fisher, kind: str) -> None:
    """Four copies of every sample: the same updates. (The filter counts samples as evidence: four copies are more.)"""
    build, batches = MODELS[kind]
    config = Curvature(fisher=fisher)
    once = run(method, build, [[batch] for batch in batches], cross_entropy, curvature=config)
    copies = [[(torch.cat([x] * 4), torch.cat([y] * 4))] for x, y in batches]
    assert relative(run(method, build, copies, cross_entropy, curvature=config), once) < TOLERANCE
    assert relative(once, vector(build())) > 1e-4


@pytest.mark.parametrize(
    ("kind", "fisher", "parts"),
    [
        *(("mixed", "mc", 2), ("mixed", "mc", 4), ("mixed", "exact", 4), ("mixed", "empirical", 2)),
        *(("convolutions", "mc", 4), ("convolutions", "exact", 4)),
    ],
)
@methods(*[name for name in METHODS if name != "reng-double"])
def test_micro_batches(method: Method, fisher: Fisher, parts: int, kind: str) -> None:
    """Gradients accumulated over parts of the batch, each with its share of the mean: the same updates."""
    build, batches = MODELS[kind]
    config = Curvature(fisher=fisher)
    whole = run(method, build, [[batch] for batch in batches], cross_entropy, curvature=config)
    split = [list(zip(x.chunk(parts), y.chunk(parts), strict=True)) for x, y in batches]
    assert relative(run(method, build, split, cross_entropy, curvature=config), whole) < TOLERANCE
    assert relative(whole, vector(build())) > 1e-4


def test_double_refuses_micro_batches() -> None:
    model, (x, y) = mixed(), stream(1)[0]
    with METHODS["reng-double"](model) as optimizer:
        closure = closure_of(optimizer, model, [(x[:4], y[:4]), (x[4:], y[4:])])
        with pytest.raises(RuntimeError, match=r"one backward\(\) a closure.*mode 'finite'"):
            optimizer.step(closure)


@pytest.mark.parametrize("samples", [3, 8])
@methods(*AVERAGED)
def test_pairs(method: Method, samples: int) -> None:
    """A contrastive loss over pairs, whose halves the model sees in two calls or in one: the same updates. Its scale,
    which cannot be read, is taken for that of a mean over a call: declared half of that over two."""
    torch.manual_seed(0)
    pairs = torch.randn(4, 2, samples, 4, dtype=torch.float64)

    def trained(calls: int) -> Tensor:
        model = mlp(4, 6, 3)
        config = Curvature(fisher="empirical", capture="hooks", loss_scale=1 / calls)
        with method(model, curvature=config) as optimizer:
            for pair in pairs:

                def closure(pair: Tensor = pair) -> Tensor:
                    optimizer.zero_grad()
                    halves = [model(x) for x in pair] if calls == 2 else model(pair.flatten(0, 1)).chunk(2)
                    one, other = (normalize(half, dim=1) for half in halves)
                    loss = cross_entropy(one @ other.T, torch.arange(samples))
                    loss.backward()
                    return loss

                optimizer.step(closure)
        return vector(model)

    once = trained(1)
    assert relative(trained(2), once) < TOLERANCE
    assert relative(once, vector(mlp(4, 6, 3))) > 1e-4


def squared(f: Tensor, y: Tensor) -> Tensor:
    return mse_loss(f, torch.eye(3).double()[y])


def bernoulli(f: Tensor, y: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(f, torch.eye(3).double()[y])


# name: the loss, predictions a sample, and what must be declared for a Gaussian, whose scale its gradient hides.
LOSSES: dict[str, tuple[Loss, int, bool]] = {
    "categorical": (cross_entropy, 1, False),
    "bernoulli": (bernoulli, 3, False),
    "gaussian": (squared, 3, True),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("scale", ["sum", 1024.0, 1 / 1024])
@methods("kfac", "ekfac", "ring-factored", "ring-diagonal", *SUMMED)
def test_scaled_loss(method: Method, scale: Any, kind: str) -> None:
    """A summed loss, or a loss times 1024: the same factors, and an update that scales as the gradient does. The
    filter's update, made of the summed gradient, does not change at all."""
    loss, predictions, declare = LOSSES[kind]
    batch, found = stream(1)[0], []
    factor = 8 * predictions if scale == "sum" else scale
    for by in (1.0, factor):
        model = nn.Sequential(*[m for m in mixed() if not isinstance(m, Affine)])  # the fallback ignores scale
        before = vector(model)
        told = scale if declare and by != 1 else None
        options = {"rho": 0.0} if method.variant == "ring" else {}  # lam grows with ||g||^2
        curvature = settings(likelihood=kind, loss_scale=told)
        with method(model, lr=0.1, curvature=curvature, **options) as optimizer:
            train(optimizer, model, [batch], lambda f, y, by=by: by * loss(f, y))
            state = {k: v for k, v in tensors_of(optimizer).items() if "." in k and v.dtype == torch.float64}
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((vector(model) - before, state, grads))
    (moved, state, grads), (scaled_move, scaled_state, scaled_grads) = found
    assert relative(scaled_grads, factor * grads) < 1e-13
    assert relative(scaled_move, (1.0 if method.kalman else factor) * moved) < TOLERANCE
    kron = ["P_out", "P_in"] if "kron" in method.name else ["p"]
    names = kron if method.kalman else ["Lambda", "Gamma"] if method.name != "ring-diagonal" else ["fisher"]
    compared = [key for key in state if key.split(".", 1)[1] in names]
    assert len(compared) == 3 * len(names)
    for key in compared:
        assert relative(scaled_state[key], state[key]) < TOLERANCE, key


@methods(*SUMMED)
def test_scaled_loss_under_rho(method: Method) -> None:
    """The filter's penalty is that of the mean loss, whatever the loss's scale."""
    ends = []
    for by in (1.0, 1024.0):
        model = nn.Sequential(*[m for m in mixed() if not isinstance(m, Affine)])
        with method(model, rho=5.0) as optimizer:
            train(optimizer, model, stream(3), lambda f, y, by=by: by * cross_entropy(f, y))
        ends.append(vector(model))
    assert relative(ends[1], ends[0]) < TOLERANCE


@methods()
def test_parameter_order(method: Method) -> None:
    """Parameters given backwards, one group each: the same updates."""
    ends = []
    for backwards in (False, True):
        model = mixed()
        groups = [{"params": [p]} for p in reversed(list(model.parameters()))] if backwards else None
        with method(model, params=groups) as optimizer:
            train(optimizer, model, stream(4))
        ends.append(vector(model))
    assert relative(ends[1], ends[0]) < TOLERANCE


class Idle(nn.Module):
    """`mixed` beside layers that the forward pass does not use, one of a shape that is in use and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleList([nn.Linear(4, 4), nn.Linear(9, 2), nn.Embedding(3, 2), nn.LayerNorm(2)]).double()
        self.used = mixed()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("zero", [False, True], ids=["None", "zeros"])
@methods()
def test_idle_layers(method: Method, zero: bool) -> None:
    """Layers that get no gradient, or a gradient of zeros, neither move nor change how the others do."""
    plain, idle = mixed(), Idle()
    before = vector(idle.unused)
    with method(plain) as optimizer:
        train(optimizer, plain, stream(4))
    with method(idle) as optimizer:
        for x, y in stream(4):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(idle(x), y)
                loss.backward()
                for p in idle.unused.parameters() if zero and not optimizer.requires_closure else ():
                    p.grad = torch.zeros_like(p)
                return loss

            if optimizer.requires_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        assert optimizer.diagnostics["failures"].item() == 0
    assert torch.equal(vector(idle.unused), before)
    assert relative(vector(idle.used), vector(plain)) < TOLERANCE
