"""Which settings there are, for whom, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG
from grng.regularizers import (
    AGR,
    ASAM,
    GNP,
    SAM,
    ClipNorm,
    Explicit,
    Regularized,
    Schedule,
    gnp_repository,
    make_regularizers,
)

from ..optimizer.cases import closure_of, live_hooks, mlp, stream, vector

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: GNP(-0.1), r"r must be a finite number >= 0.*-0\.1"),
    (lambda: GNP(float("nan")), r"r must be a finite number >= 0.*nan"),
    (lambda: GNP(0.1, alpha=float("inf")), r"alpha must be a finite number >= 0.*inf"),
    (lambda: GNP(0.1, alpha=0.5, lam=0.1), r"lam must be None where alpha is given.*0\.1"),
    (lambda: GNP(0.0, lam=0.1), r"r must be > 0 where lam is given.*0\.0"),
    (lambda: GNP(first="both"), r"first 'both'.*raw, unit"),
    (lambda: SAM(alpha=0.5), r"alpha and lam must be left alone.*0\.5"),
    (lambda: ASAM(rule="mine"), r"rule 'mine'.*official, common"),
    (lambda: Explicit(mode="finite"), r"mode 'finite'.*forward, backward, central, double, ggn"),
    (lambda: Explicit(penalty="l1"), r"penalty 'l1'.*squared, norm"),
    (lambda: Explicit(eps=0.0), r"eps must be a finite number > 0.*0\.0"),
    (lambda: Explicit(warmup="r", warmup_steps=3), r"warmup must be .*for Explicit.*'r'"),
    (lambda: AGR(scope="layer"), r"scope 'layer'.*tensor, row, group, global"),
    (lambda: AGR(strength=1.5), r"strength must be a finite number >= 0 and <= 1.*1\.5"),
    (lambda: AGR(min_numel=0), r"min_numel must be a whole number >= 1.*0"),
    (lambda: AGR(warmup="r", warmup_steps=3), r"warmup must be .*for AGR.*'r'"),
    (lambda: ClipNorm(0.0), r"max_norm must be a finite number > 0.*0\.0"),
    (lambda: GNP(exclude="norms"), r"rule to exclude 'norms'.*norm, bias, embedding, vector"),
    (lambda: GNP(precision="bf16"), r"precision 'bf16'.*float32, parameter"),
    (lambda: Schedule(warmup="cosine"), r"warmup 'cosine'.*none, r, lambda, zero"),
    (lambda: Schedule(warmup="r"), r"warmup_steps and warmup_epochs must be one number.*'r'"),
    (lambda: Schedule(warmup="r", warmup_steps=2, warmup_epochs=1, steps_per_epoch=2), "must be one number"),
    (lambda: Schedule(warmup_steps=5), r'warmup must be "r", "lambda" or "zero".*\'none\''),
    (lambda: Schedule(warmup="zero", warmup_epochs=2), r"steps_per_epoch must be .*None"),
    (lambda: Schedule(warmup="zero", warmup_steps=-1), r"warmup_steps must be a number > 0.*-1"),
    (lambda: Schedule(probability=1.5), r"probability must be in \[0, 1\].*1\.5"),
    (lambda: Schedule(probability=lambda t: 2.0).acts(7), r"probability must be in \[0, 1\].*step 7.*2\.0"),
    (lambda: Schedule(interval=0), r"interval must be a whole number >= 1.*0"),
    (lambda: Schedule(interval=2, probability=0.5), r"interval must be 1 where a probability is given.*2"),
    (lambda: make_regularizers("gpn"), r"regularizer 'gpn'.*gnp.*Did you mean 'gnp'"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def sgd(*params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(params) or [nn.Parameter(torch.zeros(2))], lr=0.1)


CHAINS: list[tuple[Callable[[nn.Module], Any], type[Exception], str]] = [
    (lambda m: [ClipNorm(), GNP()], ValueError, "begins with GNP.*ruins their difference"),
    (lambda m: [AGR(), SAM()], ValueError, "begins with SAM"),
    (lambda m: [GNP(), SAM()], ValueError, "one takes further passes"),
    (lambda m: [], ValueError, "at least one"),
    (lambda m: "gnp", TypeError, "one of grng.regularizers.*'gnp'"),
    (lambda m: ASAM(), ValueError, "parameters' names.*named_parameters"),
    (lambda m: GNP(exclude=lambda name, p: "bias" in name), ValueError, "parameters' names.*named_parameters"),
    (lambda m: GNP(exclude="norm"), ValueError, r"model must be the model.*model=model"),
    (lambda m: Explicit(mode="ggn"), ValueError, r"model must be the model"),
    (lambda m: GNP(sync=False), ValueError, "DistributedDataParallel"),
]


@pytest.mark.parametrize(("rule", "error", "message"), CHAINS, ids=[m[:30] for _, _, m in CHAINS])
def test_chains_are_refused(rule: Any, error: type[Exception], message: str) -> None:
    model = mlp(4, 5, 3)
    with pytest.raises(error, match=message):
        Regularized(sgd(*model.parameters()), rule(model))


def test_bases_are_refused() -> None:
    model = mlp(4, 5, 3)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer.*Sequential"):
        Regularized(model, GNP())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LBFGS"):
        Regularized(torch.optim.LBFGS(model.parameters()), AGR())
    with GRNG(model, "reng") as reng, pytest.raises(ValueError, match=r"GRNG\(\.\.\., regularizer=\.\.\.\)"):
        Regularized(reng, AGR())
    with pytest.raises(ValueError, match=r"without passes for reng.*mode='ggn'"):
        GRNG(model, "reng", regularizer=GNP())
    with pytest.raises(ValueError, match="begins with GNP"):
        GRNG(model, regularizer=[AGR(), GNP()])
    with pytest.raises(ValueError, match=r"setting of a param group's 'regularizer' 'radius'.*alpha, lam, r"):
        GRNG(model, params=[{"params": model.parameters(), "regularizer": {"radius": 1}}], regularizer=GNP())
    assert live_hooks(model) == 0
    with GRNG(model, "reng", regularizer=AGR()) as reng:  # goes together
        reng.step(closure_of(reng, model, stream(1)))


@pytest.mark.parametrize("rule", [SAM(0.1), GNP(0.1), Explicit(0.1)])
def test_what_is_maximised_is_refused(rule: Any) -> None:
    """Their displacement goes up the loss: down what is maximised."""
    model = mlp(4, 3)
    with pytest.raises(
        ValueError, match=r"maximize must be False under a regularizer that takes passes.*negate the loss"
    ):
        Regularized(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), rule, model=model)
    Regularized(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), AGR(), model=model)


def test_groups_are_checked_when_they_are_added() -> None:
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Regularized(sgd(first), GNP())
    with pytest.raises(ValueError, match=r"r must be a finite number >= 0"):
        optimizer.add_param_group({"params": [second], "regularizer": {"r": -1.0}})
    with pytest.raises(ValueError, match="a dict of alpha, lam, r, or False"):
        optimizer.add_param_group({"params": [second], "regularizer": 3})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], "regularizer": {"r": 0.2}})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 2


class Net(nn.Module):
    """An embedding, a norm, weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).mean(1)))


ALL = {"embed.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
EXCLUDED: dict[str, tuple[Any, set[str]]] = {
    "norm": ("norm", {"norm.weight", "norm.bias"}),
    "bias": (("bias",), {"norm.bias", "head.bias"}),
    "embedding": (["embedding"], {"embed.weight"}),
    "vector": ("vector", {"norm.weight", "norm.bias", "head.bias"}),
    "both": (("norm", "embedding"), {"norm.weight", "norm.bias", "embed.weight"}),
    "function": (lambda name, p: "head" in name, {"head.weight", "head.bias"}),
    "all": (lambda name, p: True, ALL),
}


@pytest.mark.parametrize(("rule", "out"), EXCLUDED.values(), ids=EXCLUDED.keys())
def test_who_is_displaced(rule: Any, out: set[str]) -> None:
    """Who is excluded stays where it is, the others move by r in all, and every parameter feels the penalty."""
    model, x, y = Net(), torch.randint(7, (8, 3)), torch.randint(3, (8,))
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.0), GNP(0.1, exclude=rule), model=model)
    seen: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    if out == ALL:
        assert len(seen) == 1
        return
    moved = {name: seen[1][name] - w for name, w in seen[0].items()}
    assert {name for name, e in moved.items() if not e.any()} == out
    assert float(torch.cat([e.flatten() for e in moved.values()]).norm()) == pytest.approx(0.1)


def test_strength_of_a_group() -> None:
    """r and alpha of a group are its own; a group without a regularizer stays where it is; AGR leaves it alone."""
    a, b, c = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "regularizer": {"r": 0.4}}, {"params": [c], "regularizer": False}]
    optimizer, seen = Regularized(torch.optim.SGD(groups, lr=0.0), GNP(0.1)), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append([p.detach().clone() for p in (a, b, c)])
        loss = a.square().sum() + b.square().sum() + 3 * c.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    distances = [float((after - before).norm()) for before, after in zip(*seen, strict=True)]
    assert distances == pytest.approx([0.1 / 2**0.5, 0.4 / 2**0.5, 0.0])
    groups = [{"params": [a]}, {"params": [b], "regularizer": {"strength": 0.5}}, {"params": [c], "regularizer": False}]
    optimizer = Regularized(torch.optim.SGD(groups, lr=1.0), AGR())
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [float(1 - p.detach()[0]) for p in (a, b, c)] == pytest.approx([2 / 3, 5 / 6, 1.0])


def test_the_order_is_the_lists() -> None:
    """Clipping before AGR or after it: the result tells."""
    g, ends = torch.tensor([3.0, 4.0], dtype=torch.float64), []
    for rule in ([ClipNorm(1.0), AGR()], [AGR(), ClipNorm(1.0)]):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = g.clone()
        Regularized(torch.optim.SGD([p], lr=1.0), rule).step()
        ends.append(-p.detach())
        assert torch.equal(p.grad, g)
    clipped = g / (5 + 1e-6)
    assert torch.allclose(ends[0], clipped * (1 - clipped.abs() / clipped.abs().sum()))
    shrunk = g * (1 - g.abs() / 7)
    assert torch.allclose(ends[1], shrunk / (shrunk.norm() + 1e-6))


def test_the_preset_of_the_authors_code() -> None:
    """Unit first term, then clipping: (1 - alpha) g1/|g1| + alpha g2, scaled down to norm 5."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    params, w = list(model.parameters()), vector(model)

    def gradient() -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(100 * cross_entropy(model(x), y), params)])

    g = gradient()
    nn.utils.vector_to_parameters(w + 0.1 * g / g.norm(), params)
    expected = 0.2 * g / g.norm() + 0.8 * gradient()
    nn.utils.vector_to_parameters(w.clone(), params)  # which makes them views of it
    assert expected.norm() > 5
    optimizer = Regularized(torch.optim.SGD(params, lr=1.0), gnp_repository(0.1, 0.8))
    optimizer.step(closure_of(optimizer, model, [(x, y)], lambda f, y: 100 * cross_entropy(f, y)))
    assert torch.allclose(w - vector(model), 5 * expected / (expected.norm() + 1e-6))


def test_schedulers_over_wrapper_and_base() -> None:
    model, batches = mlp(4, 5, 3), stream(4)
    for over_base in (False, True):
        optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.1), GNP())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer.base if over_base else optimizer, 1, 0.5)
        for batch in batches:
            optimizer.step(closure_of(optimizer, model, [batch]))
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 16)
        assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_plain_checkpoint() -> None:
    """Refused, with the way that works; and a regularised one goes into the base alone."""
    model = mlp(4, 5, 3)
    optimizer = Regularized(torch.optim.AdamW(model.parameters()), GNP())
    optimizer.step(closure_of(optimizer, model, stream(1)))
    plain = optimizer.base.state_dict()
    with pytest.raises(ValueError, match=r"optimizer\.base\.load_state_dict"):
        optimizer.load_state_dict(plain)
    optimizer.base.load_state_dict(plain)
    torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())
    state = GRNG(mlp(4, 5, 3)).state_dict()
    with GRNG(model, regularizer=GNP()) as inside, pytest.raises(ValueError, match="written without regularizers"):
        inside.load_state_dict(state)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.1), GNP())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"dense gradients.*\(5, 3\).*sparse=False"):
        optimizer.step(closure)


def test_copies() -> None:
    """deepcopy and pickle of a regularised torch optimizer go on to the bit."""
    import copy
    import pickle

    model = mlp(4, 5, 3)
    optimizer = Regularized(torch.optim.AdamW(model.parameters()), GNP(warmup="r", warmup_steps=4))
    for batch in stream(2):
        optimizer.step(closure_of(optimizer, model, [batch]))
    optimizer.zero_grad()
    ends = []
    for again in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        net, other = again((model, optimizer))
        for batch in stream(4)[2:]:
            other.step(closure_of(other, net, [batch]))
        ends.append(vector(net))
    for batch in stream(4)[2:]:
        optimizer.step(closure_of(optimizer, model, [batch]))
    assert all(torch.equal(end, vector(model)) for end in ends)
