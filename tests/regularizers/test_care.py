"""What a second pass must leave as it was: weights, gradients, buffers, random numbers, hooks, curvature."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grng import GRNG, Curvature
from grng.regularizers import AGR, ASAM, GNP, SAM, ClipNorm, Explicit, Regularized

from ..optimizer.cases import closure_of, cnn, mixed, mlp, stream, vector

RULES: dict[str, Callable[[], Any]] = {
    "gnp": lambda: GNP(0.05),
    "sam": lambda: SAM(0.05),
    "asam": lambda: ASAM(0.5, rule="common"),
    "central": lambda: Explicit(0.1, "central"),
    "double": lambda: Explicit(0.1, "double"),
    "chain": lambda: [GNP(0.05), AGR()],
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def sgd(net: nn.Module, rule: Any, lr: float = 0.1, **settings: Any) -> Regularized:
    return Regularized(torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9), rule, **settings)


@rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_restored(rule: Any, dtype: torch.dtype) -> None:
    """With learning rate 0 nothing moves, to the bit; and the gradient that is left is the plain one."""
    model, (x, y) = mixed(dtype), stream(1, dtype=dtype)[0]
    before = vector(model)
    optimizer = sgd(model, rule(), lr=0.0)
    optimizer.step(closure_of(optimizer, model, [(x, y)]))
    assert torch.equal(vector(model), before)
    assert {p.dtype for p in model.parameters()} == {dtype}
    left = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    closure_of(optimizer, model, [(x, y)])()
    assert all(torch.equal(a, p.grad) for a, p in zip(left, model.parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_weights_are_restored_after_an_exception(at: int) -> None:
    model, (x, y), calls = mlp(4, 5, 3), stream(1)[0], []
    optimizer, before = sgd(model, Explicit(0.1, "central")), vector(model)
    gradient = [torch.full_like(p, 7.0) for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(vector(model))
        if len(calls) == at:
            raise KeyboardInterrupt
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for p, g in zip(model.parameters(), gradient, strict=True):
        p.grad = g.clone()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(vector(model), before)
    assert all(torch.equal(call, before) == (i == 0) for i, call in enumerate(calls))
    assert len(optimizer.state) == 0
    at = 99
    optimizer.step(closure)  # and on it goes
    assert not torch.equal(vector(model), before)


class Router(nn.Module):
    """Uses one of two experts, by the sign of a weight that a step uphill changes."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
        self.gate = nn.Parameter(torch.tensor(-1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(self.gate > 0)](x) * (1 - self.gate)


def test_a_gradient_that_vanishes_or_appears_in_the_second_pass() -> None:
    torch.manual_seed(0)
    model = Router()
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    x = x * 3
    gate = torch.autograd.grad(cross_entropy(model(x), y), model.gate)[0]
    if gate < 0:  # the gate must climb over zero
        model.gate.data.neg_()
    start = int(model.gate > 0)
    before = vector(model)
    optimizer = sgd(model, GNP(0.5, alpha=0.8), lr=0.0)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(int(model.gate > 0))
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen == [start, 1 - start]
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize(("precision", "good"), [("float32", True), ("parameter", False)])
def test_low_precision_weights_are_displaced_in_float32(precision: str, good: bool) -> None:
    """Inside the second pass they are w + r u to float32; "parameter" keeps their precision, and loses most of it."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Embedding(11, 16), block, nn.Flatten(), nn.Linear(80, 3)).bfloat16()
    x, y = torch.randint(11, (8, 5)), torch.randint(3, (8,))
    optimizer, weights, gradients = sgd(model, SAM(0.01, precision=precision), lr=0.0), [], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights.append([p.detach().clone() for p in model.parameters()])
        loss = cross_entropy(model(x).float(), y)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        return loss

    optimizer.step(closure)
    (w, moved), g = weights, gradients[0]
    norm = torch.stack([t.float().square().sum() for t in g]).sum().sqrt()
    wanted = torch.cat([(0.01 * t.float() / norm).flatten() for t in g])
    found = torch.cat([(m.float() - v.float()).flatten() for m, v in zip(moved, w, strict=True)])
    error = (found - wanted).norm() / wanted.norm()
    assert (error < 1e-4) == good
    assert {m.dtype for m in moved} == {torch.float32 if good else torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(closure)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("known", [True, False], ids=["model", "no model"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batchnorm_is_updated_once(known: bool, momentum: float | None) -> None:
    """Statistics are those of the first pass of each step, as without a regularizer; nested regularizers too."""
    x, y = torch.randn(8, 1, 6, 6), torch.randint(3, (8,))
    models = [cnn(), cnn()]
    for model in models:
        model[1].momentum = momentum
    plain = torch.optim.SGD(models[0].parameters(), lr=0.0)
    optimizer = sgd(models[1], Explicit(0.1, "central"), lr=0.0, **({"model": models[1]} if known else {}))
    for _ in range(3):
        plain.step(closure_of(plain, models[0], [(x, y)]))
        optimizer.step(closure_of(optimizer, models[1], [(x, y)]))
    for (name, ours), theirs in zip(models[1].named_buffers(), models[0].buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert int(models[1][1].num_batches_tracked) == 3


@pytest.mark.parametrize("same", [True, False])
def test_random_numbers(same: bool) -> None:
    """Both passes see one dropout mask, or each its own; with one, later draws are those after a single pass."""
    masks: list[Tensor] = []
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    model[1].register_forward_hook(lambda m, args, out: masks.append(out.detach() == 0))
    (x, y), optimizer = stream(1)[0], sgd(model, SAM(0.05, same_rng=same))
    torch.manual_seed(0)
    optimizer.step(closure_of(optimizer, model, [(x, y)]))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model(x)
    assert torch.equal(masks[0], masks[1]) == same
    assert torch.equal(after, torch.get_rng_state()) == same


@pytest.mark.parametrize("registered_on", ["wrapper", "base"])
def test_hooks_fire_once(registered_on: str) -> None:
    model, (x, y), events = mlp(4, 5, 3), stream(1)[0], []
    optimizer = sgd(model, GNP())
    where = optimizer if registered_on == "wrapper" else optimizer.base
    handles = [
        register_optimizer_step_pre_hook(lambda *_: events.append("global before")),
        register_optimizer_step_post_hook(lambda *_: events.append("global after")),
    ]
    where.register_step_pre_hook(lambda *_: events.append("before"))
    where.register_step_post_hook(lambda *_: events.append("after"))
    where.register_state_dict_post_hook(lambda o, state: events.append("regularizer_steps" in state["state"][0]))
    try:
        optimizer.step(closure_of(optimizer, model, [(x, y)]))
    finally:
        for handle in handles:
            handle.remove()
    assert events == ["global before", "before", "after", "global after"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert events[4:] == [True]


@rules
@pytest.mark.parametrize("capture", ["hooks", "backpack"])
def test_curvature_is_that_of_the_first_pass(rule: Any, capture: Any) -> None:
    """Factors equal those of a plain run on the same weights, every layer is verified, inside as outside."""
    (x, y), rate = stream(1)[0], 0.0
    factors = []
    for build in (
        lambda m: GRNG(m, lr=rate, curvature=Curvature(capture=capture)),
        lambda m: Regularized(GRNG(m, lr=rate, curvature=Curvature(capture=capture)), rule()),
        lambda m: GRNG(m, lr=rate, regularizer=rule()),
    ):
        model = mlp(4, 5, 3)
        optimizer = build(model)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, model, [(x, y)]))
        assert {row.verified for row in optimizer.coverage()} == {"yes"}
        state = optimizer.state_dict()["state"][0]
        factors.append({name: value for name, value in state.items() if name in ("Lambda", "Gamma", "input", "output")})
        factors[-1] |= {n: v for n, v in state.items() if isinstance(v, Tensor) and v.ndim == 3 and n != "momentum"}
    assert factors[0]
    for other in factors[1:]:
        assert all(torch.allclose(other[name], value, atol=1e-12) for name, value in factors[0].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("base", ["sgd", "adamw fused", "ring"])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_a_gradient_that_is_not_finite_skips_the_step(bad: float, base: str, alpha: float) -> None:
    """Also where the second gradient is finite."""
    model, (x, y) = mlp(4, 5, 3, dtype=torch.float32), stream(1, dtype=torch.float32)[0]
    rule = GNP(0.05, alpha)
    optimizer: Any = {
        "sgd": lambda: sgd(model, rule),
        "adamw fused": lambda: Regularized(torch.optim.AdamW(model.parameters(), fused=True), rule),
        "ring": lambda: GRNG(model, regularizer=rule),
    }[base]()
    calls = 0

    def closure(broken: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y) * (bad if broken and calls % 2 else 1.0)
            loss.backward()
            return loss

        return run

    optimizer.step(closure(False))
    before = vector(model)
    optimizer.step(closure(True))
    assert torch.equal(vector(model), before)
    optimizer.step(closure(False))
    assert not torch.equal(vector(model), before)
    assert vector(model).isfinite().all()
    assert int(optimizer.diagnostics["skipped"]) == 1
    if isinstance(optimizer, Regularized):
        assert optimizer.skipped == 1


@pytest.mark.parametrize("empty", [False, True])
def test_a_second_gradient_that_is_finite_does_not_hide_the_first(empty: bool) -> None:
    """Also where the smallest parameter holds nothing that could be marked."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    parameters = [w, *([nn.Parameter(torch.zeros(0))] if empty else [])]
    optimizer, calls = Regularized(torch.optim.SGD(parameters, lr=0.1), SAM(0.05)), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(1)
        loss = sum(p.square().sum() for p in parameters) * (float("nan") if len(calls) == 1 else 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.skipped == 1
    assert w.tolist() == [1.0, 2.0]


def test_a_norm_that_float16_cannot_hold_is_finite() -> None:
    """It ends at 65504; 1000 entries of 20000 have the norm 632456."""
    w = nn.Parameter(torch.zeros(1000, dtype=torch.float16))
    optimizer = Regularized(torch.optim.SGD([w], lr=1e-3), ClipNorm(1e6))
    w.grad = torch.full_like(w, 2e4)
    optimizer.step()
    assert optimizer.skipped == 0
    assert w.detach().float().mean().item() == pytest.approx(-20.0, rel=1e-2)


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_around_everything_keeps_no_weights(rule: Any, dtype: torch.dtype) -> None:
    """It casts every weight once: those of the displaced passes and of the next step are others."""
    ends = []
    for outer in (True, False):
        model = mlp(4, 5, 3, dtype=torch.float32)
        optimizer = sgd(model, rule(), lr=0.5)

        def closure(batch: Any, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(model(batch[0]).float(), batch[1])
            loss.backward()
            return loss

        # One that is not enabled would keep casts too.
        with torch.autocast("cpu", dtype) if outer else nullcontext():
            for batch in stream(2, dtype=torch.float32):
                optimizer.step(lambda batch=batch: closure(batch))
                torch.clear_autocast_cache()  # torch's own optimizers do not
        ends.append(vector(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("mode", ["double", "ggn"])
@pytest.mark.parametrize("variant", [None, "reng"])
def test_products_beside_frozen_parameters(mode: Any, variant: str | None) -> None:
    """Frozen after the optimizer was built: the step is that of one that never knew them."""
    ends = []
    for known in (True, False):
        model, (x, y) = mlp(4, 5, 4, 3), stream(1)[0]
        if not known:
            model[2].requires_grad_(False)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = (
            GRNG(model, "reng", mode=mode)
            if variant
            else Regularized(torch.optim.SGD(params, lr=0.1), Explicit(0.1, mode), model=model)
        )
        model[2].requires_grad_(False)
        before = vector(model[2])
        for _ in range(2):
            optimizer.step(closure_of(optimizer, model, [(x, y)]))
        assert torch.equal(vector(model[2]), before)
        ends.append(vector(model))
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


def test_parameters_of_later_layers_are_known() -> None:
    """What stands in a rule's way is looked at when a group is added."""
    model = mlp(4, 5, 3, dtype=torch.float32)
    optimizer = sgd(model, SAM(0.05, exclude="norm"), model=model)
    model.append(nn.LayerNorm(3))
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    every = optimizer._front._parameters()
    assert every.names[-2:] == ["3.weight", "3.bias"]
    assert optimizer.regularizers[0].takes(every) == [True] * 4 + [False] * 2
