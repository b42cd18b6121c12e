"""Backward passes that are no plain loop's: which of them are measured, and what is said of those that cannot be."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, l1_loss, mse_loss
from torch.utils.checkpoint import checkpoint

from grng import GRNG, Curvature, GRNGWarning
from grng.preconditioners import Kalman

from .cases import mlp, vector

VARIANTS = pytest.mark.parametrize("variant", ["kfac", "ekfac", "kalman"])


def batch(size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator).double(), torch.randint(3, (size,), generator=generator)


def moved(variant: str, work: Callable[[nn.Module, GRNG], Any], steps: int = 12, **settings: Any) -> Tensor:
    """Where the parameters are after steps of which each calls `work`, with the exact Fisher: nothing is drawn."""
    model = mlp(4, 5, 3)
    with GRNG(model, variant, curvature=Curvature(fisher="exact", **settings)) as optimizer:
        for _ in range(steps):
            optimizer.zero_grad()
            work(model, optimizer)
            optimizer.step()
        assert all(row.verified == "yes" for row in optimizer.coverage())
        assert int(optimizer.diagnostics["uncaptured"]) == 0
    return vector(model)


def plain(model: nn.Module, optimizer: GRNG) -> None:
    x, y = batch()
    cross_entropy(model(x), y).backward()


def raising(model: nn.Module, optimizer: GRNG) -> None:
    """Out of memory in the middle of a backward pass, say."""
    x, y = batch(seed=1)

    def fail(gradient: Tensor) -> None:
        raise MemoryError

    h = model[1](model[0](10 * x))
    h.register_hook(fail)
    loss = cross_entropy(model(10 * x), y) + 0 * h.sum()
    with pytest.raises(MemoryError):
        loss.backward()
    model.zero_grad()
    plain(model, optimizer)


def of_one_graph(model: nn.Module, optimizer: GRNG) -> None:
    """One forward pass, gone through for every task: the last walk is the step's."""
    x, y = batch()
    f = model(x)
    (0.3 * cross_entropy(f, y.flip(0))).backward(retain_graph=True)
    optimizer.zero_grad()
    cross_entropy(f, y).backward()


def looked_at(model: nn.Module, optimizer: GRNG) -> None:
    """Gradients by which a loss is weighted come before the step's own."""
    x, y = batch()
    loss = cross_entropy(model(x), y)
    for _ in range(2):
        torch.autograd.grad(0.1 * loss, model[2].weight, retain_graph=True)
    loss.backward()


def in_micro_batches(model: nn.Module, optimizer: GRNG, look: bool = False) -> None:
    for a, b in zip(*(part.split(2) for part in batch()), strict=True):
        loss = cross_entropy(model(a), b) / 3
        if look:
            torch.autograd.grad(0.1 * loss, list(model.parameters()), retain_graph=True)
        loss.backward()


def looked_at_in_micro_batches(model: nn.Module, optimizer: GRNG) -> None:
    in_micro_batches(model, optimizer, look=True)


@VARIANTS
@pytest.mark.parametrize(
    ("work", "capture"),
    [
        (raising, "hooks"),  # its module is called twice, which BackPACK does not carry
        *((work, capture) for work in (of_one_graph, looked_at) for capture in ("hooks", "backpack")),
    ],
)
def test_as_the_plain_loop(variant: str, capture: str, work: Any) -> None:
    assert torch.equal(moved(variant, work, capture=capture), moved(variant, plain, capture=capture))


@VARIANTS
@pytest.mark.parametrize("capture", ["hooks", "backpack"])
def test_looks_at_the_gradients_of_micro_batches(variant: str, capture: str) -> None:
    found, expected = (moved(variant, f, capture=capture) for f in (looked_at_in_micro_batches, in_micro_batches))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capture", ["hooks", "backpack"])
def test_a_second_loss_of_one_output_is_said(capture: str) -> None:
    """Once: p.grad is that of both, the curvature of the first alone."""
    model, (x, y) = mlp(4, 5, 3), batch()
    with GRNG(model, "ring", curvature=Curvature(capture=capture)) as optimizer:
        for step in range(3):
            optimizer.zero_grad()
            f = model(x)
            cross_entropy(f, y).backward(retain_graph=True)
            with nullcontext() if step else pytest.warns(GRNGWarning, match=r"a second backward\(\) went through one"):
                (0.1 * f.square().mean()).backward()
            optimizer.step()


def two_heads(model: nn.Module, x: Tensor, y: Tensor) -> None:
    hidden: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda module, args, output: hidden.append(output))
    f = model(x)
    handle.remove()
    cross_entropy(f, y).backward(retain_graph=True)
    hidden[0].square().mean().backward()


def looks_of_micro_batches(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for a, b in zip(x.split(8), y.split(8), strict=True):
        loss = cross_entropy(model(a), b) / 4
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()


@pytest.mark.parametrize("work", [two_heads, looks_of_micro_batches])
def test_what_is_no_second_loss_of_one_output(work: Any) -> None:
    model, (x, y) = mlp(4, 5, 3), batch(32)
    with GRNG(model, "ring") as optimizer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            work(model, x, y)
            optimizer.step()
    assert not [w for w in caught if "a second backward" in str(w.message)]


@pytest.mark.parametrize("sizes", [(28, 4), (4, 28), (30, 1, 1)])
def test_micro_batches_of_any_size_in_any_order(sizes: tuple[int, ...]) -> None:
    """mean() / k of parts of different sizes: N is such that as many predictions count, whatever comes last."""
    ends = []
    for order in (sizes, sizes[::-1]):
        model, (x, y) = mlp(4, 5, 3), batch(32)
        optimizer = GRNG(model, "kalman", curvature=Curvature(fisher="exact"))
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        for a, b in parts if order is sizes else parts[::-1]:
            (cross_entropy(model(a), b) / len(sizes)).backward()
        assert optimizer._capture.batch is not None
        assert float(optimizer._capture.batch.normaliser) == pytest.approx(32)
        optimizer.step()
        ends.append(vector(model))
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


def test_a_micro_batch_without_labels_changes_no_normaliser() -> None:
    model, (x, y) = mlp(4, 5, 3), batch(8)
    optimizer = GRNG(model, "kalman", curvature=Curvature(fisher="exact"))
    for a, b in ((x[:5], y[:5]), (x[5:], y[5:]), (x, torch.full_like(y, -100))):
        (cross_entropy(model(a), b, reduction="sum") / 8).backward()
        assert optimizer._capture.batch is not None
        assert float(optimizer._capture.batch.normaliser) == pytest.approx(8)


class Second(nn.Module):
    """What is trained on is not the first that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.head = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.other(h), self.head(h)


@VARIANTS
def test_a_loss_that_does_not_go_through_the_output_that_is_read(variant: str) -> None:
    model, (x, y) = Second().double(), batch()
    optimizer = GRNG(model, variant)
    cross_entropy(model(x)[1], y).backward()
    with pytest.warns(GRNGWarning, match=r"no gradient at the model's output.*the first tensor"):
        optimizer.step()
    cross_entropy(model(x)[1], y).backward()
    optimizer.step()
    assert {row.verified for row in optimizer.coverage()} == {"pending"}


class Switched(nn.Module):
    """Its first layer can be taken from view."""

    how = ""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            h = checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
        elif self.how == "functional":
            h = nn.functional.linear(x, self.first.weight, self.first.bias)
        else:
            h = self.first(x)
        return self.last(h.tanh())


@pytest.mark.parametrize("how", ["checkpoint", "functional"])
@pytest.mark.parametrize("variant", ["kfac", "kalman"])
@pytest.mark.filterwarnings("ignore:GRNG uses the empirical Fisher")
def test_a_layer_that_is_no_longer_measured_is_named(how: str, variant: str) -> None:
    model, (x, y) = Switched().double(), batch()
    optimizer = GRNG(model, variant, curvature=Curvature(stats_every=1, capture="hooks"))

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(x.detach()), y).backward()
            optimizer.step()

    train(3)
    model.how = how
    with pytest.warns(GRNGWarning, match="measures nothing any more of first"):
        train(4)


def test_an_expert_that_rests_is_not_named(recwarn: pytest.WarningsRecorder) -> None:
    """Without a gradient, or with one of zeros."""
    model, (x, y) = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double(), batch()
    model.forward = lambda x, i: model[i](x)  # type: ignore[method-assign]
    optimizer = GRNG(model, "kalman")
    for t in range(12):
        model.zero_grad(set_to_none=False)
        cross_entropy(model(x, 0 if t > 3 else t % 2), y).backward()
        optimizer.step()
    assert not recwarn.list


def test_gradients_that_are_put_back_are_told() -> None:
    """Kept apart between micro-batches: p.grad is None when the second comes, as where the first was thrown away."""
    model, (x, y) = mlp(4, 5, 3), batch()
    optimizer = GRNG(model, "kfac")
    kept = []
    for half in (slice(3), slice(3, 6)):
        cross_entropy(model(x[half]), y[half]).backward()
        kept.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for p, a, b in zip(model.parameters(), *kept, strict=True):
        p.grad = a + b
    with pytest.warns(GRNGWarning, match="others put in their place"):
        optimizer.step()


@pytest.mark.parametrize("frozen", ["0", "2"])
@pytest.mark.parametrize("variant", ["kalman", "kfac"])
def test_a_layer_frozen_later_is_as_one_frozen_before(frozen: str, variant: str) -> None:
    ends = []
    for before in (True, False):
        model, (x, y) = mlp(4, 5, 3), batch()
        layer = model.get_submodule(frozen)
        if before:
            layer.requires_grad_(False)
        which: Any = {"preconditioner": Kalman()} if variant == "kalman" else {}
        optimizer = GRNG(model, variant, curvature=Curvature(fisher="exact", capture="hooks"), **which)
        layer.requires_grad_(False)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append(vector(model))
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("loss", "target", "expected"),
    [
        (l1_loss, lambda f: torch.ones_like(f).copysign(torch.randn_like(f)), "gaussian"),
        (mse_loss, lambda f: torch.ones_like(f).copysign(torch.randn_like(f)), "gaussian"),
        (binary_cross_entropy_with_logits, lambda f: (torch.randn_like(f) > 0).double(), "bernoulli"),
    ],
)
def test_outputs_of_zero_tell_nothing_of_an_unusual_scale(
    loss: Any, target: Any, expected: str, reduction: str
) -> None:
    """Whatever the loss, the gradient is of one size everywhere: the second step decides."""
    torch.manual_seed(0)
    model = mlp(4, 5, 3)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    x, _ = batch()
    y = target(model(x).detach())
    optimizer = GRNG(model, "kfac", lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (loss(model(x), y, reduction=reduction) / 3).backward()
        optimizer.step()
    likelihood = optimizer._capture.fisher.likelihood
    assert likelihood is not None
    assert likelihood.name == expected


def test_an_output_of_a_single_class_is_no_categorical_one() -> None:
    model, (x, y) = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 1)]).double(), batch()
    model.forward = lambda x, i: model[i](x)  # type: ignore[method-assign]
    optimizer = GRNG(model, "kfac", curvature=Curvature(stats_every=1))
    cross_entropy(model(x, 0), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(GRNGWarning, match="an output of a single class"):
        mse_loss(model(x, 1), x[:, :1]).backward()
    optimizer.step()
    assert optimizer._capture.fisher.empirical


@pytest.mark.parametrize("first", [1, 8])
def test_a_batch_of_one_settles_no_order(first: int) -> None:
    """Positions first: a batch of one looks alike either way."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x).tanh().mean(0))

    torch.manual_seed(0)
    model = Positions().double()
    optimizer = GRNG(model, "ekfac")
    for size in (first, 8):
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(7, size, 4).double()), torch.randint(3, (size,))).backward()
        optimizer.step()
    assert next(layer for layer in optimizer._layers if layer.name == "a").order == "second"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"fisher": "empirical"}, lambda fisher, schedule: fisher.empirical),
        ({"likelihood": "gaussian"}, lambda fisher, schedule: fisher.likelihood.name == "gaussian"),
        ({"inverse_every": 77}, lambda fisher, schedule: schedule.period == 77),
        ({}, lambda fisher, schedule: fisher.likelihood.name == "categorical" and not fisher.empirical),
    ],
)
def test_what_is_declared_holds_over_a_checkpoint(given: dict[str, Any], expected: Any) -> None:
    model, (x, y) = mlp(4, 5, 3), batch()
    written = GRNG(model, "kfac")
    cross_entropy(model(x), y).backward()
    written.step()
    saved = deepcopy(written.state_dict())
    written.close()
    optimizer = GRNG(model, "kfac", curvature=Curvature(**given))
    optimizer.load_state_dict(saved)
    for _ in range(optimizer._curvature.stats_every):
        optimizer.zero_grad()
        mse_loss(model(x), torch.ones(6, 3).double()).backward()
        optimizer.step()
    assert expected(optimizer._capture.fisher, optimizer._schedule)


def test_the_model_is_bounded_by_the_larger_rate_of_a_layer() -> None:
    """A bias in a group of its own moves by its own rate."""
    moves = []
    for clip in (1e-2, 1e-6):
        model, (x, y) = mlp(4, 3), batch()
        groups = [{"params": [model[0].weight], "lr": 1e-3}, {"params": [model[0].bias], "lr": 1.0}]
        optimizer = GRNG(model, "kfac", params=groups, curvature=Curvature(kl_clip=clip, fisher="exact"))
        before = model[0].bias.detach().clone()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        moves.append(float((model[0].bias.detach() - before).norm()))
    assert moves[1] == pytest.approx(1e-2 * moves[0], rel=1e-6)
