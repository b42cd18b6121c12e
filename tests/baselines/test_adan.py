"""Adan against its formula written out, with AGR in the published order, and through checkpoints."""

import copy
import io
import itertools
import math

import pytest
import torch
from grng.baselines import Adan
from torch import Tensor, nn

from grng.regularizers import AGR, ClipNorm, Regularized

STEPS = 10
SHAPES = [[(3,)], [(4, 5), (5,), ()], [(2, 3, 2, 2), (1, 7), (6,)]]
EPS = 1e-8


class ByHand:
    """One parameter: the formula, a line an equation."""

    def __init__(self, w: Tensor, lr: float, betas: tuple[float, ...], wd: float, no_prox: bool) -> None:
        self.w, self.lr, self.betas, self.wd, self.no_prox = w.clone(), lr, betas, wd, no_prox
        self.m = self.v = self.n = torch.zeros_like(w)
        self.previous: Tensor | None = None
        self.t = 0

    def step(self, g: Tensor) -> None:
        b1, b2, b3 = self.betas
        self.t += 1
        d = torch.zeros_like(g) if self.previous is None else g - self.previous
        self.previous = g
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * d
        self.n = b3 * self.n + (1 - b3) * (g + b2 * d) ** 2
        root = self.n.sqrt() / math.sqrt(1 - b3**self.t) + EPS
        step = self.lr * (self.m / (1 - b1**self.t) + b2 * self.v / (1 - b2**self.t)) / root
        if self.no_prox:
            self.w = self.w * (1 - self.lr * self.wd) - step
        else:
            self.w = (self.w - step) / (1 + self.lr * self.wd)


def parameters(shapes, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(shapes, steps: int = STEPS) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(steps)]


def clip_factor(found: list[Tensor], limit: float, eps: float) -> float:
    norm = math.sqrt(sum(float((g * g).sum()) for g in found))
    return min(1.0, limit / (norm + eps)) if limit else 1.0


def close(got, wanted) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, wanted, strict=True))


def train(optimizer, params, sequence) -> None:
    for found in sequence:
        for p, g in zip(params, found, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


BETAS = (0.98, 0.92, 0.99)
TABLE = list(itertools.product(SHAPES, (False, True), (0.0, 0.1), (0.0, 0.5, 100.0), (BETAS, (0.5, 0.0, 0.9))))


@pytest.mark.parametrize(("shapes", "no_prox", "wd", "limit", "betas"), TABLE)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_first_steps_are_the_formula(shapes, no_prox, wd, limit, betas, lr):
    params = parameters(shapes)
    start = [p.detach().clone() for p in params]
    hands = [ByHand(p.detach(), 0.05, betas, wd, no_prox) for p in params]
    optimizer = Adan(params, lr, betas, EPS, wd, no_prox=no_prox, max_grad_norm=limit)
    for found in gradients(shapes):
        c = clip_factor(found, limit, EPS)
        for hand, g in zip(hands, found, strict=True):
            hand.step(c * g)
        train(optimizer, params, [found])
        assert close(params, [hand.w for hand in hands])
        assert all(torch.equal(p.grad, g) for p, g in zip(params, found, strict=True)), "gradients are left alone"
    assert not close(params, start)


def test_param_groups_have_settings_of_their_own():
    first, second = parameters([(3,), (2, 2)])
    hands = [ByHand(first.detach(), 0.1, (0.9,) * 3, 0.2, True), ByHand(second.detach(), 0.01, BETAS, 0, False)]
    own = {"params": [first], "lr": 0.1, "betas": (0.9, 0.9, 0.9), "weight_decay": 0.2, "no_prox": True}
    optimizer = Adan([own, {"params": [second]}], lr=0.01)
    sequence = gradients([(3,), (2, 2)])
    train(optimizer, [first, second], sequence)
    for found in sequence:
        for hand, g in zip(hands, found, strict=True):
            hand.step(g)
    assert close([first, second], [hand.w for hand in hands])


def test_a_late_gradient_starts_with_no_difference_and_its_own_count():
    shapes = [(3,), (2,)]
    params = parameters(shapes)
    hands = [ByHand(p.detach(), 0.05, BETAS, 0.1, False) for p in params]
    optimizer = Adan(params, 0.05, weight_decay=0.1)
    for i, (early, late) in enumerate(gradients(shapes)):
        late = late if i >= 4 and i != 7 else None
        train(optimizer, params, [[early, late]])
        hands[0].step(early)
        if late is not None:
            hands[1].step(late)
        if i < 4:
            assert params[1] not in optimizer.state
        assert close(params, [hand.w for hand in hands])
    assert [float(optimizer.state[p]["step"]) for p in params] == [10, 5]


@pytest.mark.parametrize("limit", [0.5, 100.0])
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_order_published_with_agr(shapes, limit):
    """c from the plain gradient, then Psi, then c Psi(g), which the difference is taken of."""
    params = parameters(shapes)
    hands = [ByHand(p.detach(), 0.05, BETAS, 0.02, False) for p in params]
    adan = Adan(params, 0.05, weight_decay=0.02, max_grad_norm=0.0)
    optimizer = Regularized(adan, [ClipNorm(limit), AGR()])  # which leaves single elements alone
    for found in gradients(shapes):
        c = clip_factor(found, limit, 1e-6)
        for hand, g in zip(hands, found, strict=True):
            hand.step(c * g if g.numel() == 1 else c * (1 - g.abs() / g.abs().sum()) * g)
        train(optimizer, params, [found])
        assert close(params, [hand.w for hand in hands])
        assert close([adan.state[p]["previous_grad"] for p in params], [hand.previous for hand in hands])


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_a_resumed_run_is_the_same_to_the_bit(limit):
    shapes = SHAPES[2]
    sequence = gradients(shapes)

    def made():
        params = [nn.Parameter(p.detach().float()) for p in parameters(shapes)]
        return params, Adan(params, 0.05, weight_decay=0.1, max_grad_norm=limit)

    sequence = [[g.float() for g in found] for found in sequence]
    params, optimizer = made()
    train(optimizer, params, sequence[:5])
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), params), file)
    train(optimizer, params, sequence[5:])
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    resumed, other = made()
    with torch.no_grad():
        for p, w in zip(resumed, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(saved)
    train(other, resumed, sequence[5:])
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert all(isinstance(value, Tensor) for state in other.state.values() for value in state.values())


def test_a_copy_goes_on_alike():
    params = parameters(SHAPES[0])
    optimizer = Adan(params, 0.05)
    sequence = gradients(SHAPES[0])
    train(optimizer, params, sequence[:3])
    twins, twin = copy.deepcopy((params, optimizer))
    train(optimizer, params, sequence[3:])
    train(twin, twins, sequence[3:])
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_the_closure_is_called_with_gradients_on():
    (w,) = parameters([(3,)])
    optimizer = Adan([w], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > w.square().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_trains_in_every_precision(dtype):
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(SHAPES[1])]
    optimizer = Adan(params, 0.01, eps=1e-4, max_grad_norm=1.0)
    before = sum(float(p.detach().square().sum()) for p in params)
    for _ in range(20):
        optimizer.zero_grad()
        sum(p.square().sum() for p in params).backward()
        optimizer.step()
    assert sum(float(p.detach().square().sum()) for p in params) < before
    assert {value.dtype for state in optimizer.state.values() for k, value in state.items() if k != "step"} == {dtype}


def test_a_schedule_reaches_it():
    (w,) = parameters([(2,)])
    optimizer = Adan([w], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1)
    w.grad = torch.ones_like(w)
    optimizer.step()
    schedule.step()
    before = w.detach().clone()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0
    assert torch.equal(w, before)


BAD = [
    ({"lr": -1.0}, "lr must be a finite number >= 0, but is: -1.0"),
    ({"lr": "1"}, "lr must be"),
    ({"lr": math.nan}, "lr must be"),
    ({"lr": torch.tensor([1.0, 2.0])}, "lr must be"),
    ({"lr": torch.tensor(-1.0)}, "lr must be"),
    ({"betas": (0.9, 0.99)}, r"betas must be three numbers in \[0, 1\), but is: \(0.9, 0.99\)"),
    ({"betas": (0.9, 0.9, 1.0)}, "betas must be"),
    ({"betas": (0.9, "x", 0.9)}, "betas must be"),
    ({"betas": 0.9}, "betas must be"),
    ({"eps": -1e-8}, "eps must be"),
    ({"weight_decay": math.inf}, "weight_decay must be"),
    ({"weight_decay": True}, "weight_decay must be"),
    ({"no_prox": 1}, "no_prox must be True or False, but is: 1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Adan(parameters([(2,)]), **settings)
    optimizer = Adan(parameters([(2,)]))
    with pytest.raises(ValueError, match="max_grad_norm" if "max_grad_norm" in settings else message):
        optimizer.add_param_group({"params": parameters([(2,)]), **settings})
    assert len(optimizer.param_groups) == 1, "a group that is refused is not added"


def test_clipping_is_of_all_groups():
    with pytest.raises(ValueError, match="by the norm over all groups: give it to the constructor"):
        Adan([{"params": parameters([(2,)]), "max_grad_norm": 1.0}])


def test_complex_and_sparse_are_refused():
    with pytest.raises(ValueError, match=r"dtype of a parameter must be real .* but is: torch.complex64"):
        Adan([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = Adan(layer.parameters())
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state


def test_nothing_to_do_is_no_error():
    optimizer = Adan(parameters([(2,)]), max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state


def test_on_a_gpu_the_host_does_not_wait():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    params = [nn.Parameter(p.detach().float().cuda()) for p in parameters(SHAPES[2])]
    optimizer = Adan(params, torch.tensor(0.01, device="cuda"), weight_decay=0.1, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)
