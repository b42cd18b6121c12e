"""Layers that do not take part in every step are measured when they do; what takes no part in a step is not counted."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.curvature.visits import Visits
from grng.regularizers import GNP, Regularized

from .cases import relative, vector

EVERY = 10


class Heads(nn.Module):
    """A trunk and heads that take turns."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(heads))

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.trunk(x)))  # type: ignore[no-any-return]


def train(model: Heads, optimizer: GRNG, steps: range, head_of) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x, head_of(t)), y).backward()
        optimizer.step()


@pytest.mark.parametrize("variant", ["ring", "ekfac", "kalman"])
@pytest.mark.parametrize("late", [0, 25])
@pytest.mark.parametrize("period", [2, 3, 5])
def test_heads_that_take_turns_are_measured(variant: str, late: int, period: int) -> None:
    """However their turns and the regular steps with statistics fall together."""
    torch.manual_seed(0)
    model = Heads(period)
    with GRNG(model, variant, curvature=Curvature(burn_in=10)) as optimizer:
        train(model, optimizer, range(200), lambda t: t % period if t >= late else 0)
        for head in model.heads:
            state = optimizer.state[head.weight]
            assert late or "exp_avg" not in state, "the fallback trains none, but at the first step it is seen at"
            if variant != "kalman":
                assert (state["Lambda.count"] >= 175 / EVERY / (2 if late else 1.5)).all()
        measured = float(optimizer.diagnostics["refreshes"])
    if variant != "kalman":
        assert measured < 10 + period * 200 / EVERY + 20, "no more often than that takes"


def test_a_layer_that_comes_once_is_measured_when_it_comes_again() -> None:
    model = Heads()
    with GRNG(model, "kfac", curvature=Curvature(burn_in=0)) as optimizer:
        train(model, optimizer, range(60), lambda t: int(t in (13, 47)))
        assert (optimizer.state[model.heads[1].weight]["Lambda.count"] == 1).all()


@pytest.mark.parametrize("period", [2, 3])
def test_heads_that_take_turns_with_gradients_of_zero(period: int) -> None:
    """Under zero_grad(set_to_none=False) all have a gradient at every step."""
    model = Heads(period)
    with GRNG(model, "kfac") as optimizer:
        for t in range(150):
            optimizer.zero_grad(set_to_none=False)
            cross_entropy(model(torch.randn(6, 4), t % period), torch.randint(3, (6,))).backward()
            optimizer.step()
        assert all((optimizer.state[head.weight]["Lambda.count"] >= 10).all() for head in model.heads)
        assert float(optimizer.diagnostics["refreshes"]) < 75


def test_what_is_used_no_more_is_looked_for_ever_more_rarely() -> None:
    """A head that has gradients of zero from some step on."""
    model = Heads(2)
    with GRNG(model, "kfac", curvature=Curvature(inverse_every=50)) as optimizer:
        for t in range(400):
            optimizer.zero_grad(set_to_none=False)
            cross_entropy(model(torch.randn(6, 4), t % 2 if t < 30 else 0), torch.randint(3, (6,))).backward()
            optimizer.step()
        assert float(optimizer.diagnostics["refreshes"]) < 85, "40 regular steps, the first ones, and a few more"


def test_every_step_alike_makes_no_appointments() -> None:
    model = Heads()
    with GRNG(model, "kfac", curvature=Curvature(burn_in=5)) as optimizer:
        train(model, optimizer, range(40), lambda t: 0)
        assert float(optimizer.diagnostics["refreshes"]) == 5 + 3


def test_appointments_survive_a_checkpoint() -> None:
    torch.manual_seed(0)
    first, second = Heads(), Heads()
    whole = GRNG(first, "kfac")
    train(first, whole, range(43), lambda t: t % 2)
    second.load_state_dict(first.state_dict())
    resumed = GRNG(second, "kfac")
    resumed.load_state_dict(deepcopy(whole.state_dict()))
    for model, optimizer in ((first, whole), (second, resumed)):
        train(model, optimizer, range(43, 90), lambda t: t % 2)
    assert torch.equal(vector(first), vector(second))


def test_checkpoints_of_before_can_be_read() -> None:
    layers = [type("Layer", (), {"active": True, "parameters": [i]})() for i in range(3)]
    visits = Visits(layers, EVERY)
    visits.note(0, {0, 1}, layers[:2])  # type: ignore[arg-type]
    assert not visits.state()["grng_visits"][0].equal(visits.state()["grng_visits"][2])
    visits.load_state({})
    assert not any(visits.expected(t) for t in range(30))


# Passes that are no part of a step.


def attacked(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> Tensor:
    """Projected gradient descent on the input."""
    x = x.clone()
    for _ in range(steps):
        x.requires_grad_()
        (g,) = torch.autograd.grad(cross_entropy(model(x), y), x)
        x = (x + 0.01 * g.sign()).detach()
    return x


@pytest.mark.parametrize("capture", ["hooks", "backpack"])
@pytest.mark.parametrize(("variant", "size"), [("kfac", 1), ("kalman", 6), ("ring", 6)])
@pytest.mark.parametrize("zeroed", ["before", "after"])
def test_attacks_are_not_counted(variant: str, size: int, zeroed: str, capture: str) -> None:
    """The same as with inputs that came from somewhere else."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second = deepcopy(first)
    pair = [GRNG(m, variant, curvature=Curvature(capture=capture)) for m in (first, second)]
    for _ in range(4):
        x, y = torch.randn(size, 4).double(), torch.randint(3, (size,))
        x = attacked(deepcopy(second), x, y)
        for m, optimizer in zip((first, second), pair, strict=True):
            if zeroed == "before":
                optimizer.zero_grad()
            if m is first:
                attacked(m, x, y)
            if zeroed == "after":
                optimizer.zero_grad()
            cross_entropy(m(x), y).backward()
            optimizer.step()
    assert all(row.verified == "yes" for row in pair[0].coverage())
    assert torch.equal(vector(first), vector(second))
    if variant == "kalman":
        assert pair[0].posterior.seen == pytest.approx(pair[1].posterior.seen)


def test_what_is_not_counted_is_by_the_backward_pass_not_the_forward_one() -> None:
    """The graph of an attack is gone through again, this time for the step."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second = deepcopy(first)
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    for m in (first, second):
        optimizer = GRNG(m, "kfac")
        given = x.clone().requires_grad_(m is first)
        loss = cross_entropy(m(given), y)
        if m is first:
            torch.autograd.grad(loss, given, retain_graph=True)
        loss.backward()
        optimizer.step()
        assert all(row.verified == "yes" for row in optimizer.coverage())
    assert torch.equal(vector(first), vector(second))


# Layers that are called several times by the same samples.


class Twice(nn.Module):
    """l(x) + l(x), or the same function by one call: l(x) * 2."""

    def __init__(self, layer: nn.Module, calls: int) -> None:
        super().__init__()
        self.layer, self.calls, self.head = layer, calls, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.layer(x) for _ in range(self.calls)]
        out = torch.stack(found).sum(0) * (2 / self.calls)
        return self.head(torch.tanh(out.flatten(1) if out.ndim == 2 else out.mean(1)))  # type: ignore[no-any-return]


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda size: torch.randn(size, 6).double()),
    "positions": (lambda: nn.Linear(6, 4), lambda size: torch.randn(size, 3, 6).double()),
    "embedding": (lambda: nn.Embedding(7, 4), lambda size: torch.randint(7, (size, 3))),
    "norm": (lambda: nn.LayerNorm(4), lambda size: torch.randn(size, 4).double()),
}
QUANTITIES: dict[str, tuple[str, dict[str, str], str]] = {
    "diagonal": ("ring", {"preconditioner": "diagonal"}, "fisher"),
    "ekfac": ("ekfac", {}, "second"),
    "kalman": ("kalman", {}, "p"),
}
TRUE = ("diagonal", "ekfac")  # those that go by true labels too


@pytest.mark.parametrize(("quantity", "fisher"), [*((q, "mc") for q in QUANTITIES), *((q, "empirical") for q in TRUE)])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("layer", LAYERS)
def test_calls_by_the_same_samples_belong_together(quantity: str, layer: str, size: int, fisher: str) -> None:
    """A sample's gradient is the sum over its calls: l(x) + l(x) is 2 l(x)."""
    make, draw = LAYERS[layer]
    torch.manual_seed(0)
    once = Twice(make(), 1).double()
    twice = Twice(deepcopy(once.layer), 2).double()
    twice.load_state_dict(once.state_dict())
    x, y, before = draw(size), torch.randint(3, (size,)), vector(once)
    variant, settings, name = QUANTITIES[quantity]
    found = []
    for model in (once, twice):
        optimizer = GRNG(model, variant, curvature=Curvature(fisher=fisher, capture="hooks"), **settings)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        assert all(row.verified == "yes" for row in optimizer.coverage())
        state = optimizer.state[next(model.layer.parameters())]
        found.append((vector(model) - before, state[name].flatten()))
    for twice_called, once_called in zip(found[1], found[0], strict=True):
        assert relative(twice_called, once_called) < 1e-9


def test_reduced_positions_include_calls() -> None:
    torch.manual_seed(0)
    once = Twice(nn.Linear(6, 4), 1).double()
    twice = Twice(deepcopy(once.layer), 2).double()
    twice.load_state_dict(once.state_dict())
    x, y = torch.randn(5, 6).double(), torch.randint(3, (5,))
    found = []
    for model in (once, twice):
        optimizer = GRNG(model, "kfac", curvature=Curvature(sharing="reduce", capture="hooks"))
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(optimizer.state[model.layer.weight]["Gamma"].flatten())
    assert relative(found[1], found[0]) < 1e-9


# Calls that a layer's kind does not promise.


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(self.bag(index, offsets))  # type: ignore[no-any-return]


def test_a_verified_layer_that_is_called_otherwise_is_given_up_visibly() -> None:
    model = Bags()
    optimizer = GRNG(model, "kfac")
    for t in range(4):
        optimizer.zero_grad()
        index, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
        if t < 2:
            cross_entropy(model(index), y).backward()
        elif t == 2:
            with pytest.warns(UserWarning, match=r"trains bag by the first-order fallback: its calls cannot be read"):
                cross_entropy(model(index.flatten(), torch.arange(0, 15, 3)), y).backward()
        else:
            cross_entropy(model(index.flatten(), torch.arange(0, 15, 3)), y).backward()
        before = model.bag.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, model.bag.weight)
    treatment = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert treatment["bag.weight"] == "adamw"
    assert treatment["head.weight"] == "kfac"


@pytest.mark.filterwarnings("ignore:GRNG takes weight and bias of 2 for one matrix")
@pytest.mark.parametrize("capture", ["hooks", "backpack"])
def test_parameters_outside_of_layers_may_be_frozen_later(capture: str) -> None:
    blocks = [nn.Linear(4, 4), nn.PReLU() if capture == "hooks" else nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*blocks)
    optimizer = GRNG(model, "kalman", curvature=Curvature(capture=capture))
    for t in range(5):
        optimizer.zero_grad()
        mse_loss(model(torch.randn(6, 4)), torch.randn(6, 3)).backward()
        optimizer.step()
        if t == 1:
            frozen = next(itertools.islice(model.parameters(), 2, 3))  # PReLU's, or the last layer's weight
            frozen.requires_grad_(False)
            held = frozen.detach().clone()
    assert torch.equal(held, frozen)


@pytest.mark.parametrize("capture", ["hooks", "backpack"])
@pytest.mark.parametrize(("variant", "size"), [("kfac", 1), ("kalman", 6), ("ekfac", 6)])
@pytest.mark.parametrize("step", [0, 1, 10])
def test_what_came_with_dropped_gradients_is_dropped(variant: str, size: int, step: int, capture: str) -> None:
    """A batch is thrown away by model.zero_grad(), of which the optimizer is not told."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second = deepcopy(first)
    settings = Curvature(capture=capture, fisher="exact")
    pair = [GRNG(m, variant, curvature=settings) for m in (first, second)]
    for t in range(12):
        x, y = torch.randn(size, 4).double(), torch.randint(3, (size,))
        for m, optimizer in zip((first, second), pair, strict=True):
            if m is first and t == step:
                for _ in range(2):
                    cross_entropy(m(100 * x), y).backward()
                m.zero_grad()
            cross_entropy(m(x), y).backward()
            optimizer.step()
            m.zero_grad()
    assert all(row.verified == "yes" for row in pair[0].coverage())
    assert torch.equal(vector(first), vector(second))


@pytest.mark.parametrize("outside", [False, True])
def test_passes_take_gradients_away_and_give_them_back(outside: bool) -> None:
    """Micro-batches around passes(), whose gradients are of one step."""
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    ends = []
    for micro in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        settings = Curvature(fisher="exact")
        rule = GNP(0.0)
        optimizer = (
            Regularized(GRNG(model, "kfac", curvature=settings), rule)
            if outside
            else GRNG(model, "kfac", curvature=settings, regularizer=rule)
        )
        for _ in range(3):
            model.zero_grad()
            count = 3 if micro else 1
            for a, b in zip(x.chunk(count), y.chunk(count), strict=True):
                for each in optimizer.passes():
                    with each:
                        (cross_entropy(model(a), b) * len(a) / len(x)).backward()
            optimizer.step()
        ends.append(vector(model))
    assert torch.allclose(*ends, rtol=0, atol=1e-10)
