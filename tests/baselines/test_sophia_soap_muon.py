"""Sophia, SOAP and Muon against their formulas written out, over ten steps; labels, checkpoints, bad input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grng.baselines import SOAP, Muon, SophiaG, SophiaH, make_optimizer
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from grng import GRNG
from grng.regularizers import GNP, Regularized

STEPS = 10


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def flat(values: Any) -> Tensor:
    return torch.cat([v.detach().flatten() for v in values])


# Sophia


def sophia_step(w: Tensor, m: Tensor, bs_h: Tensor, lr: float, rho: float, weight_decay: float, eps: float) -> Tensor:
    """The authors' code, line by line; m is this step's."""
    return w * (1 - lr * weight_decay) - lr * m.sign() * (m.abs() / (rho * bs_h + eps)).clamp(max=1)


class Labels:
    """Notes what SophiaG squares: the gradient of the summed loss with drawn labels."""

    def __init__(self, optimizer: SophiaG) -> None:
        self.seen: list[dict[Tensor, Tensor]] = []
        move = optimizer._move

        def note(measured: dict[Tensor, Tensor], late: bool) -> None:
            self.seen.append({p: g.clone() for p, g in optimizer._sampled.items()})
            move(measured, late)

        optimizer._move = note  # type: ignore[method-assign]


@pytest.mark.parametrize("B", [1, 4, 9])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sophia_g(B: int, interval: int, micro: int, reduction: str) -> None:
    """Ten steps with the noted samples; estimates enter after the interval-th steps, times the predictions."""
    model = net()
    settings = {"lr": 0.02, "rho": 0.05, "weight_decay": 0.3}
    optimizer = SophiaG(model, betas=(0.9, 0.8), interval=interval, **settings)
    labels = Labels(optimizer)
    w = flat(model.parameters())
    m, bs_h = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(STEPS):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = torch.randn(B, 4), torch.randint(3, (B,))
            (cross_entropy(model(x), y, reduction=reduction) / micro).backward()  # type: ignore[arg-type]
        g = flat(p.grad for p in model.parameters())
        optimizer.step()
        m = 0.9 * m + 0.1 * g
        w = sophia_step(w, m, bs_h, eps=1e-15, **settings)
        assert (flat(model.parameters()) - w).abs().max() < 1e-12
        measured = t % interval == interval - 1
        assert bool(labels.seen[-1]) == measured
        if measured:
            mean = flat(labels.seen[-1][p] for p in model.parameters()) / (B * micro)
            bs_h = 0.8 * bs_h + 0.2 * B * micro * mean.square()


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (cross_entropy, lambda f: torch.randint(3, f.shape[:1])),
        (binary_cross_entropy_with_logits, lambda f: torch.randint(2, f.shape).double()),
        (mse_loss, torch.randn_like),
    ],
)
def test_sophia_g_estimates_the_gauss_newton_diagonal(loss: Callable[..., Tensor], target: Callable[..., Any]) -> None:
    """In the mean over draws B ghat^2 is the diagonal of J^T H J / predictions, of the loss summed over predictions."""
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    optimizer = SophiaG(model, lr=0.0, interval=1, betas=(0.0, 0.0), weight_decay=0.0)
    y, found = target(model(x)), []
    for _ in range(3000):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        found.append(optimizer.state[model.weight]["hessian"].clone())
    f = model(x).detach()
    if loss is cross_entropy:
        p = f.softmax(1)
        H, count = p * (1 - p), 6
    elif loss is mse_loss:
        H, count = torch.full_like(f, 2.0), 18
    else:
        H, count = f.sigmoid() * (1 - f.sigmoid()), 18
    expected = H.T @ x.square() / count
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 3000**0.5
    assert ((mean - expected).abs() < 5 * error).all()


def test_sophia_g_before_its_first_estimate() -> None:
    """Every entry moves by lr, whatever its gradient."""
    model = net()
    optimizer = SophiaG(model, lr=0.01, weight_decay=0.0)
    for _ in range(3):
        before = flat(model.parameters())
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(5, 4)), torch.randint(3, (5,))).backward()
        optimizer.step()
        torch.testing.assert_close((flat(model.parameters()) - before).abs(), torch.full_like(before, 0.01))


def test_sophia_g_under_gnp_measures_the_first_pass() -> None:
    """A second pass of the same step adds nothing."""
    model = net()
    base = SophiaG(model, lr=0.01, interval=1)
    labels, optimizer = Labels(base), Regularized(base, [GNP(r=0.1)], model=model)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    other = net()
    plain = SophiaG(other, lr=0.01, interval=1)
    alone = Labels(plain)
    cross_entropy(other(x), y).backward()
    plain.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(labels.seen[0][p], alone.seen[0][q])


def test_sophia_g_says_what_it_lacks() -> None:
    model = net()
    optimizer = SophiaG(model, interval=1)
    model[2](model[1](model[0](torch.ones(2, 4)))).sum().backward()
    with pytest.raises(RuntimeError, match="saw no forward pass"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="empirical"):
        cross_entropy(model(torch.randn(2, 4)).mul_(2), torch.tensor([0, 1])).backward()  # the output is overwritten
    with pytest.raises(RuntimeError, match="could not draw labels"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="attached"):
        GRNG(model)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)
    optimizer.close()
    GRNG(model).close()


def product(loss: Tensor, w: list[Tensor], z: list[Tensor]) -> list[Tensor]:
    g = torch.autograd.grad(loss, w, create_graph=True)
    inner = torch.stack([(a * b).sum() for a, b in zip(g, z, strict=True)]).sum()
    return [b * Hz for b, Hz in zip(z, torch.autograd.grad(inner, w), strict=True)]


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("interval", [1, 3])
def test_sophia_h(distribution: str, interval: int) -> None:
    """Ten steps with the z that it draws; the estimate enters before the first, fourth ... step."""
    model, other = net(), net()
    optimizer = SophiaH(
        model.parameters(), lr=0.02, betas=(0.9, 0.8), rho=0.05, interval=interval, distribution=distribution
    )
    w = list(other.parameters())
    m, h = torch.zeros_like(flat(w)), torch.zeros_like(flat(w))
    for t in range(STEPS):
        x, y = torch.randn(5, 4), torch.randint(3, (5,))
        draw = optimizer._drawing()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        loss = cross_entropy(other(x), y)
        g = flat(torch.autograd.grad(loss, w, retain_graph=True))
        m = 0.9 * m + 0.1 * g
        if t % interval == 0:
            z = [draw(p) for p in w]
            h = 0.8 * h + 0.2 * flat(product(cross_entropy(other(x), y), w, z))
        step = (m / (0.05 * h).clamp(min=1e-12)).clamp(-1, 1)
        nn.utils.vector_to_parameters(flat(w) * (1 - 0.02 * 0.1) - 0.02 * step, w)
        assert (flat(model.parameters()) - flat(w)).abs().max() < 1e-12
        assert optimizer.hessian_products == t // interval + 1


def test_sophia_h_takes_a_closure() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="closure"):
        SophiaH([w]).step()
    assert make_optimizer("sophia-h", net()).requires_closure  # type: ignore[attr-defined]


# SOAP


class SoapByHand:
    """The authors' order of operations, M kept in the basis and turned at every change of it."""

    def __init__(self, w: Tensor, lr: float, b: tuple[float, float], wd: float, interval: int, axes: list[int]) -> None:
        self.w, self.lr, self.b, self.wd, self.interval, self.axes = w.clone(), lr, b, wd, interval, axes
        self.t = -1

    def rotate(self, G: Tensor, back: bool = False) -> Tensor:
        for axis, Q in self.Q.items():
            G = torch.einsum("i...,ij->j...", G.transpose(0, axis), Q.T if back else Q).transpose(0, axis)
        return G

    def factors(self, G: Tensor) -> None:
        for axis in self.axes:
            other = [i for i in range(G.ndim) if i != axis]
            outer = torch.tensordot(G, G, dims=(other, other))
            self.L[axis] = self.b[1] * self.L.get(axis, torch.zeros_like(outer)) + (1 - self.b[1]) * outer

    def step(self, G: Tensor) -> None:
        self.t += 1
        if self.t == 0:
            self.L: dict[int, Tensor] = {}
            self.factors(G)
            self.Q = {axis: torch.linalg.eigh(L)[1].flip(1) for axis, L in self.L.items()}
            self.M, self.V = torch.zeros_like(G), torch.zeros_like(G)
            return
        b1, b2 = self.b
        rotated = self.rotate(G)
        self.M = b1 * self.M + (1 - b1) * rotated
        self.V = b2 * self.V + (1 - b2) * rotated**2
        size = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        self.w = self.w - size * self.rotate(self.M / (self.V.sqrt() + 1e-8), back=True)
        self.w = self.w - self.lr * self.wd * self.w
        self.M = self.rotate(self.M, back=True)
        self.factors(G)
        if self.t % self.interval == 0:
            for axis, L in self.L.items():
                Q = self.Q[axis]
                order = (Q.T @ L @ Q).diagonal().argsort(descending=True)
                self.V = self.V.index_select(axis, order)
                self.Q[axis] = torch.linalg.qr(L @ Q[:, order])[0]
        self.M = self.rotate(self.M)


# First factors of corank one at most: of a larger null space, which basis is taken is rounding's choice.
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    ("shape", "settings", "axes"),
    [
        ((4, 5), {}, [0, 1]),
        ((4, 7), {"max_dim": 5}, [0]),
        ((6,), {}, []),
        ((2,), {"precondition_1d": True}, [0]),
        ((3, 2, 2, 2), {}, [0, 1, 2, 3]),
        ((), {}, []),
    ],
)
def test_soap(shape: tuple[int, ...], settings: dict[str, Any], axes: list[int], interval: int) -> None:
    w = nn.Parameter(torch.randn(shape))
    optimizer = SOAP([w], lr=0.05, betas=(0.9, 0.8), weight_decay=0.1, interval=interval, **settings)
    by_hand = SoapByHand(w.detach(), 0.05, (0.9, 0.8), 0.1, interval, axes)
    for _ in range(STEPS):
        w.grad = torch.randn(shape)
        by_hand.step(w.grad)
        optimizer.step()
        assert (w.detach() - by_hand.w).abs().max() < 1e-12
    if not axes:
        assert optimizer.state[w]["factors"] == [] or optimizer.state[w]["factors"][0].numel() == 0


def test_soap_takes_a_closure_with_gradients() -> None:
    """The authors' code calls it under no_grad."""
    w = nn.Parameter(torch.randn(3, 2))
    optimizer = SOAP([w], normalize=True, lr=0.1, weight_decay=0.0, correct_bias=False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = w.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert (w.detach() - before).square().mean().sqrt() == pytest.approx(0.1)


# Muon


def test_muon_is_both() -> None:
    """Hidden matrices move as torch's Muon moves them, all others as AdamW does."""
    model, other = net(), net()
    optimizer = Muon(model, lr=0.02, weight_decay=0.1)
    hidden = [other[0].weight, other[2].weight]
    rest = [p for p in other.parameters() if all(p is not h for h in hidden)]
    parts = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1),
    ]
    for _ in range(STEPS):
        x, y = torch.randn(5, 4), torch.randint(3, (5,))
        for m in (model, other):
            m.zero_grad()
            cross_entropy(m(x), y).backward()
        optimizer.step()
        for part in parts:
            part.step()
        assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    with pytest.raises(RuntimeError, match="cannot be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 5])
def test_muon_takes_kernels_as_matrices(size: int, layout: torch.memory_format) -> None:
    """All but the first move as (outputs, everything else) does under torch's Muon, however they lie in memory."""
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 3)).to(memory_format=layout)
    optimizer = Muon(model, lr=0.02, weight_decay=0.1, momentum=0.9)
    kernels = [model[2].weight, model[3].weight]
    assert [p is k for p, k in zip(optimizer.param_groups[0]["params"], kernels, strict=True)] == [True, True]
    matrices = [nn.Parameter(k.detach().reshape(len(k), -1).clone()) for k in kernels]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(STEPS):
        model.zero_grad()
        x = torch.randn(size, 2, 8, 8).to(memory_format=layout)
        cross_entropy(model(x), torch.randint(3, (size,))).backward()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = kernel.grad.reshape(matrix.shape).clone()
        optimizer.step()
        reference.step()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            assert torch.equal(kernel.reshape(matrix.shape), matrix)
            assert kernel.is_contiguous(memory_format=layout)


def test_muon_leaves_embeddings_and_tied_heads_to_adamw() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(5, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 5)})
    model["out"].weight = model["in"].weight
    groups = Muon(model).param_groups
    assert [p is model["mid"].weight for p in groups[0]["params"]] == [True]
    assert len(groups[1]["params"]) == 3
    assert len(Muon(nn.Linear(2, 2)).param_groups) == 1
    with pytest.raises(ValueError, match="no trainable parameter"):
        Muon(nn.Linear(2, 2).requires_grad_(False))


# All of them


@pytest.mark.parametrize("name", ["sophia-g", "sophia-h", "soap", "muon"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resume(name: str, stop: int) -> None:
    """Continuing from a checkpoint, at any phase, is not stopping, to the bit; schedulers see the groups."""
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(9)]
    settings = {} if name == "muon" else {"interval": 3}

    def run(model: nn.Module, optimizer: Any, scheduler: Any, part: list[Any]) -> None:
        for x, y in part:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            if getattr(optimizer, "requires_closure", False):
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            scheduler.step()

    def start() -> tuple[nn.Module, Any, Any]:
        model = net()
        optimizer = make_optimizer(name, model, lr=0.05, **settings)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    whole = start()
    run(*whole, batches)
    first = start()
    run(*first, batches[:stop])
    second = start()
    for own, theirs in zip(second, first, strict=True):
        own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    run(*second, batches[stop:])
    assert torch.equal(flat(second[0].parameters()), flat(whole[0].parameters()))


@pytest.mark.parametrize("name", ["sophia-h", "soap", "muon"])
def test_copies(name: str) -> None:
    """A deep copy of model and optimizer goes on alike and apart."""
    model = net()
    optimizer = make_optimizer(name, model, lr=0.05)
    pair = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), pair):

        def closure(m: nn.Module = m, o: Any = o) -> Tensor:
            o.zero_grad()
            loss = cross_entropy(m(torch.ones(2, 4)), torch.tensor([0, 2]))
            loss.backward()
            return loss

        for _ in range(3):
            o.step(closure)
    assert torch.equal(flat(model.parameters()), flat(pair[0].parameters()))
    assert not torch.equal(flat(model.parameters()), flat(net().parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SophiaH(p, lr=-1.0), "lr"),
        (lambda p: SophiaH(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: SophiaH(p, interval=0), "interval"),
        (lambda p: SophiaH(p, distribution="cauchy"), "rademacher"),
        (lambda p: SOAP(p, lr=math.nan), "lr"),
        (lambda p: SOAP(p, betas=(0.9, -0.1)), "betas"),
        (lambda p: SOAP(p, interval=1.5), "interval"),  # type: ignore[arg-type]
        (lambda p: SOAP(p, max_dim=0), "max_dim"),
    ],
)
def test_bad_settings(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize("kind", [SophiaH, SOAP])
def test_sparse_gradients_are_refused(kind: Any) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = kind(table.parameters(), interval=2)
    if kind is SophiaH:
        optimizer.state[table.weight]["step"] = torch.ones(())  # no product is due

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step(closure)


@pytest.mark.parametrize(  # model.zero_grad(set_to_none=False) leaves gradients, which nothing tells from a batch's
    ("zeroed_by", "to_none"), [("model", True), ("optimizer", True), ("optimizer", False)]
)
def test_sophia_g_drops_what_came_with_gradients_that_were_dropped(zeroed_by: str, to_none: bool) -> None:
    """A batch is thrown away after its backward pass, as under a GradScaler that skips the step."""
    found = []
    for wasted in (True, False):
        model = net()
        optimizer = SophiaG(model, lr=0.01, interval=1, seed=3)
        labels = Labels(optimizer)
        x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])
        if wasted:
            state = optimizer._capture.fisher.generator(torch.device("cpu")).get_state()
            (float("nan") * cross_entropy(model(10 * x), y)).backward()
            cross_entropy(model(10 * x), y).backward()
            (model if zeroed_by == "model" else optimizer).zero_grad(set_to_none=to_none)
            optimizer._capture.fisher.generator(torch.device("cpu")).set_state(state)
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append([labels.seen[0][p] for p in model.parameters()] + list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["sophia-g", "sophia-h"])
def test_sophia_has_one_interval(name: str) -> None:
    """A param group of its own is refused, and a checkpoint's is the one that counts."""
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "interval": 3}]
    build: Any = SophiaG if name == "sophia-g" else lambda model, groups: SophiaH(groups)
    with pytest.raises(ValueError, match=r"interval must be the same in all param groups, 10, but is: 3"):
        build(model, groups)
    written, read = make_optimizer(name, net(), interval=3), make_optimizer(name, net())
    read.load_state_dict(written.state_dict())
    assert read.interval == 3  # type: ignore[attr-defined]


def test_sophia_h_beside_frozen_parameters() -> None:
    model = net()
    optimizer = SophiaH(model.parameters(), lr=0.01, interval=1)
    model[2].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 1]))
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SOAP([nn.Parameter(torch.ones(2))], betas=0.9), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: SOAP([nn.Parameter(torch.ones(2))], betas=(0.9,)), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: SOAP([nn.Parameter(torch.ones(2))], betas=(0.9, None)), "betas must be two"),  # type: ignore[arg-type]
        (lambda: SOAP([nn.Parameter(torch.ones(2))], shampoo_beta=1.0), r"shampoo_beta must be in \[0, 1\), or None"),
        (lambda: SophiaH([nn.Parameter(torch.ones(2))], betas=0.9), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: SophiaH([nn.Parameter(torch.ones(2))], distribution="cauchy"), 'distribution must be "gaussian"'),
        (lambda: SophiaH([nn.Parameter(torch.ones(2))], seed=0.5), "seed must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
