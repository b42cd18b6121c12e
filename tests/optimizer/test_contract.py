"""What torch.optim promises: groups, schedules, closures, hooks, gradients; and what a second pass must leave alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from grng import GRNG, Curvature

from .cases import (
    METHODS,
    ONE_PASS,
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

TWO_PASS = ["reng-double", "reng-finite"]


@methods()
def test_is_an_optimizer(method: Method) -> None:
    with method(mixed()) as optimizer:
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert "GRNG" in repr(optimizer)
        assert "lr:" in repr(optimizer)
        assert set(optimizer.defaults) == {"lr", "momentum", "weight_decay", "fallback_lr"}


@methods()
def test_group_with_lr_zero_stays(method: Method) -> None:
    """No step, no decay, and the fallback's rate is scaled alike."""
    model = mixed()
    before = [p.detach().clone() for p in model.parameters()]
    groups = [
        {"params": [*model[0].parameters(), *model[1].parameters()], "lr": 0.0, "weight_decay": 0.3},
        {"params": model[3].parameters(), "lr": 0.1},
        {"params": model[5].weight, "momentum": 0.0},
    ]
    with method(model, params=groups) as optimizer:
        train(optimizer, model, stream(3))
    still = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert still == [True] * 4 + [False] * 3


def test_lr_zero_from_the_start_keeps_the_fallback_still() -> None:
    """A schedule that begins at lr = 0 holds the fallback too."""
    model = mixed()
    with GRNG(model, "kfac", lr=0.0) as optimizer:
        before = vector(model)
        train(optimizer, model, stream(1))
        assert torch.equal(vector(model), before)


def test_settings_of_groups() -> None:
    """Each group's own lr, momentum and weight decay, against the same settings for a model of that layer alone."""
    model, batches = mlp(4, 4, 3), stream(3)
    own = [{"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1}, {"lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}]
    groups = [{"params": model[i].parameters(), **o} for i, o in zip((0, 2), own, strict=True)]
    theta = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in theta]
    with GRNG(model, "kfac", preconditioner="identity", params=groups, curvature=settings()) as optimizer:
        for batch in batches:
            train(optimizer, model, [batch])
            for i, p in enumerate(model.parameters()):
                o = own[i // 2]
                assert p.grad is not None
                buffers[i] = o["momentum"] * buffers[i] - p.grad
                theta[i] = (1 - o["lr"] * o["weight_decay"]) * theta[i] + o["lr"] * buffers[i]
                assert relative(p.detach(), theta[i]) < 1e-12


@pytest.mark.parametrize("named", [False, True])
@methods("ring", "kalman-vd")
def test_params_as_tensors_or_pairs(method: Method, named: bool) -> None:
    """(name, tensor) pairs are what model.named_parameters() gives; a part of the model can be trained."""
    ends = []
    for pairs in (None, named):
        model = mixed()
        chosen = list(model[3].named_parameters()) if pairs else list(model[3].parameters())
        with method(model, params=chosen) as optimizer:
            assert [row.parameter for row in optimizer.coverage()] == ["3.weight", "3.bias"]
            train(optimizer, model, stream(3))
        ends.append(vector(model))
    assert torch.equal(*ends)
    fresh = mixed()
    assert torch.equal(ends[0][:28], vector(fresh)[:28])
    assert not torch.equal(ends[0], vector(fresh))


@methods()
def test_frozen_bias_and_frozen_layer(method: Method) -> None:
    """They stay; a layer without its bias, or with the bias alone, is still covered."""
    model = mixed()
    model[0].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    model[5].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with method(model) as optimizer:
        losses = train(optimizer, model, stream(1) * 5)
        rows = {row.parameter: row.treatment for row in optimizer.coverage()}
        name = optimizer._preconditioner.name
    other = name if method.kalman else "adamw"
    assert rows == {"0.weight": name, "1.weight": other, "1.bias": other, "3.bias": name}
    for parameter, p in model.named_parameters():
        assert torch.equal(p, before[parameter]) == (parameter not in rows), parameter
    assert losses[-1] < losses[0]


# Learning rates that change.

SCHEDULES = {
    "cosine": lambda o: CosineAnnealingLR(o, 6),
    "warm-up": lambda o: LambdaLR(o, lambda t: (t + 1) / 4),
    "from zero": lambda o: LambdaLR(o, lambda t: t / 4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@methods("ring", "kalman-vd")
def test_schedulers(method: Method, schedule: str) -> None:
    """A scheduler does what setting every group's lr by hand does, and the fallback's rate follows."""
    ends = []
    for by_hand in (False, True):
        model = mixed()
        with method(model, lr=0.1, fallback_lr=0.02, momentum=0.5) as optimizer:
            scheduler = SCHEDULES[schedule](optimizer)
            rates = []
            for batch in stream(5):
                rates.append(optimizer.param_groups[0]["lr"])
                if by_hand:
                    rate, optimizer.param_groups[0]["lr"] = rates[-1], rates[-1]
                    optimizer.param_groups[0]["fallback_lr"] = 0.02 * rate / 0.1
                    optimizer.param_groups[0]["base_lr"] = rate
                train(optimizer, model, [batch])
                if by_hand:
                    optimizer.param_groups[0].update(fallback_lr=0.02, base_lr=0.1)
                scheduler.step()
            assert len(set(rates)) == 5
        ends.append(vector(model))
    assert relative(ends[0], ends[1]) < 1e-12


def test_fallback_rate_follows_the_schedule() -> None:
    """Half of lr, half of the fallback's step; Adam's first step is its rate, element by element."""
    for factor in (1.0, 0.5, 0.0):
        model = mixed()
        before = model[1].weight.detach().clone()
        with GRNG(model, "kfac", lr=0.1, fallback_lr=0.02) as optimizer:
            optimizer.param_groups[0]["lr"] = factor * 0.1
            train(optimizer, model, stream(1))
        moved = (model[1].weight.detach() - before).abs()
        assert moved.tolist() == pytest.approx([factor * 0.02] * 4, rel=1e-4)


def test_one_cycle_moves_the_momentum() -> None:
    """Schedulers that look for "momentum" in the groups find it."""
    model = mixed()
    with GRNG(model, "ring") as optimizer:
        scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
        seen = set()
        for batch in stream(5):
            train(optimizer, model, [batch])
            seen.add(optimizer.param_groups[0]["momentum"])
            scheduler.step()
        assert len(seen) == 5


@methods()
def test_tensor_lr(method: Method) -> None:
    """A 0-dimensional tensor as lr is a number, also where a scheduler fills it anew."""
    ends = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        model = mixed()
        with method(model, lr=lr, weight_decay=0.1) as optimizer:
            scheduler = LambdaLR(optimizer, lambda t: 1 / (t + 1))
            for batch in stream(4):
                train(optimizer, model, [batch])
                scheduler.step()
            assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
        ends.append(vector(model))
    assert relative(ends[0], ends[1]) < 1e-12


# The loop.


@methods(*ONE_PASS)
def test_closure_equals_plain_step(method: Method) -> None:
    """step(closure) does what loss.backward(); step() does, to the bit."""
    ends = []
    for closed in (False, True):
        model = mixed()
        with method(model) as optimizer:
            for x, y in stream(4):
                closure = closure_of(optimizer, model, [(x, y)])
                if closed:
                    optimizer.step(closure)
                else:
                    closure()
                    assert optimizer.step() is None
        ends.append(vector(model))
    assert torch.equal(*ends)


LOOPS = ["zero first", "zero last", "zero between", "module zeroes", "keep zeros"]


@pytest.mark.parametrize("first", ["fine", "not finite"])
@methods(*ONE_PASS)
def test_places_of_zero_grad(method: Method, first: str) -> None:
    """Before the forward pass, after the step, between forward and backward; by the optimizer or by the module; to
    None or to zeros: the same updates, and every layer's capture is verified."""
    batches, ends = stream(4), []
    if first == "not finite":
        batches[0][0][0, 0] = float("nan")
    for loop in LOOPS:
        model = mixed()
        with method(model) as optimizer:
            for x, y in batches:
                if loop in ("zero first", "keep zeros"):
                    optimizer.zero_grad(set_to_none=loop == "zero first")
                loss = cross_entropy(model(x), y)
                if loop == "zero between":
                    optimizer.zero_grad()
                elif loop == "module zeroes":
                    model.zero_grad()
                loss.backward()
                optimizer.step()
                if loop == "zero last":
                    optimizer.zero_grad()
            assert {row.verified for row in optimizer.coverage()} == ({"yes"} if method.kalman else {"yes", "-"})
        ends.append(vector(model))
    for loop, end in zip(LOOPS[1:], ends[1:], strict=True):
        assert torch.equal(end, ends[0]), loop


@methods()
def test_closure_is_called_once_and_its_loss_returned(method: Method) -> None:
    """Once (twice by the finite difference), with gradients on, also under no_grad; any loss object comes back."""
    model, (x, y), calls = mixed(), stream(1)[0], []

    class Result:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    def closure() -> Result:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return Result(loss)

    with method(model) as optimizer, torch.no_grad():
        first = optimizer.step(closure)
        assert calls == [True] * (2 if method.name == "reng-finite" else 1)
        assert torch.equal(first.loss.detach(), cross_entropy(mixed()(x), y))
        assert not torch.is_grad_enabled()


@methods()
def test_step_hooks_fire_once_and_in_order(method: Method) -> None:
    """Global pre, own pre, the step, own post, global post."""
    model, events = mixed(), []
    with method(model) as optimizer:
        handles = [
            register_optimizer_step_pre_hook(lambda *_: events.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: events.append("global post")),
        ]
        try:
            optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
            optimizer.register_step_post_hook(lambda *_: events.append("post"))
            train(optimizer, model, stream(2))
        finally:
            for handle in handles:
                handle.remove()
    assert events == ["global pre", "pre", "post", "global post"] * 2


def test_state_dict_hooks() -> None:
    """Hooks of a checkpoint see it before it is checked, and the optimizer after it is restored."""
    model = mixed(torch.bfloat16)
    with GRNG(model, "ring") as optimizer:
        train(optimizer, model, stream(1, dtype=torch.bfloat16))
        optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
        saved, seen = optimizer.state_dict(), []
        optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["wrapped"])
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model[0].weight]["Lambda"].dtype))
        optimizer.load_state_dict(saved)
    assert seen == [torch.float32]


@methods()
def test_gradients_are_not_modified(method: Method) -> None:
    """.grad holds the plain gradient of the loss after the step, also where the step took another."""
    model, twin = mixed(), mixed()
    with method(model, weight_decay=0.1, momentum=0.5) as optimizer:
        for x, y in stream(3):
            twin.load_state_dict(model.state_dict())
            twin.zero_grad()
            cross_entropy(twin(x), y).backward()
            train(optimizer, model, [(x, y)])
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                assert relative(p.grad, q.grad) < 1e-12
                assert not p.grad.requires_grad


@methods(*ONE_PASS)
def test_gradients_missing_for_some(method: Method) -> None:
    """A parameter whose gradient is None stays where it is, without decay, and comes back later."""
    model, batches = mixed(), stream(4)
    with method(model, weight_decay=0.1) as optimizer:
        for i, (x, y) in enumerate(batches):
            closure_of(optimizer, model, [(x, y)])()
            if i in (1, 2):
                model[3].weight.grad = model[1].bias.grad = None
            before = [model[3].weight.detach().clone(), model[1].bias.detach().clone(), model[3].bias.detach().clone()]
            optimizer.step()
            after = model[3].weight, model[1].bias, model[3].bias
            same = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
            assert same == ([True, True, False] if i in (1, 2) else [False] * 3)
        assert vector(model).isfinite().all()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.left, self.right = mlp(4, 4, 3), mlp(4, 4, 3, seed=2)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        return (self.left if left else self.right)(x)


@methods()
def test_branches_that_take_turns(method: Method) -> None:
    """What is used moves, and nothing else; layers first measured at a later step are decomposed there, due or not."""
    model, (x, y) = Branches(), stream(1)[0]
    curvature = Curvature(stats_every=4, inverse_every=12, burn_in=0)
    losses: dict[bool, list[float]] = {True: [], False: []}
    with method(model, curvature=curvature) as optimizer:
        for i in range(16):
            left = i % 3 == 0

            def closure(left: bool = left) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(model(x, left), y)
                loss.backward()
                return loss

            used, other = (model.left, model.right) if left else (model.right, model.left)
            before = vector(used), vector(other)
            loss = optimizer.step(closure) if optimizer.requires_closure else closure()
            if not optimizer.requires_closure:
                optimizer.step()
            losses[left].append(loss.item())
            assert not (vector(used) == before[0]).any()
            assert torch.equal(vector(other), before[1])
        assert {row.verified for row in optimizer.coverage()} == {"yes"}
    assert all(found[-1] < found[0] for found in losses.values())


# The second pass of a step.


class Noisy(nn.Module):
    """Dropout, by a mask that is noted, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.masks: list[Tensor] = []
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append((torch.rand(len(x), 6) < 0.5).to(x.dtype))
        return self.second(torch.tanh(self.norm(self.first(x))) * self.masks[-1])


def test_finite_sees_the_same_random_numbers() -> None:
    """Both passes draw the same mask, and the user's stream goes on as after one pass."""
    model, plain, (x, y) = Noisy(), Noisy(), stream(1)[0]
    torch.manual_seed(5)
    with METHODS["reng-finite"](model) as optimizer:
        train(optimizer, model, [(x, y)])
    after = torch.rand(3)
    torch.manual_seed(5)
    plain(x)
    assert torch.equal(torch.rand(3), after)
    assert len(model.masks) == 2
    assert torch.equal(model.masks[0], model.masks[1])
    assert 0 < model.masks[0].mean() < 1


@methods(*TWO_PASS)
def test_batchnorm_is_updated_once(method: Method) -> None:
    model, plain, (x, y) = Noisy(), Noisy(), stream(1)[0]
    torch.manual_seed(5)
    with method(model) as optimizer:
        train(optimizer, model, [(x, y)])
    torch.manual_seed(5)
    plain(x)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    assert model.norm.num_batches_tracked == 1


class SecondPass(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_restores_when_the_second_pass_raises(dtype: torch.dtype) -> None:
    """Parameters, gradients, buffers and random numbers are those of the first pass, to the bit."""
    model = Noisy().to(dtype)
    (batch,) = stream(1, dtype=dtype)
    with METHODS["reng-finite"](model) as optimizer:
        inner, passes = closure_of(optimizer, model, [batch]), []

        def closure() -> Tensor:
            passes.append(vector(model))
            loss = inner()
            if len(passes) == 2:
                raise SecondPass
            buffers.extend(b.clone() for b in model.buffers())
            return loss

        buffers: list[Tensor] = []
        before = vector(model)
        with pytest.raises(SecondPass):
            optimizer.step(closure)
        assert len(passes) == 2
        assert torch.equal(passes[0], before)
        assert not torch.equal(passes[1], before)
        assert torch.equal(vector(model), before)
        assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))


@methods("reng-double", "reng-finite")
def test_statistics_are_those_of_the_first_pass(method: Method) -> None:
    """The second pass is not measured: factors equal K-FAC's."""
    batch, factors = stream(1)[0], []
    for chosen in (METHODS["kfac"], method):
        model = mixed()
        with chosen(model, curvature=Curvature(fisher="exact")) as optimizer:
            train(optimizer, model, [batch])
            states = [optimizer.state[model[i].weight] for i in (0, 3, 5)]
            factors.append([state[name].clone() for state in states for name in ("Lambda", "Gamma")])
    for mine, theirs in zip(*factors, strict=True):
        assert relative(mine, theirs) < 1e-12


def test_diagnostics() -> None:
    """Tensors on the device, and what they say."""
    model, batches = mixed(), stream(3)
    with GRNG(model, "ring", rho=2.0, curvature=Curvature(damping=0.1, stats_every=2, burn_in=0)) as optimizer:
        train(optimizer, model, batches)
        found = optimizer.diagnostics
        square = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        assert all(isinstance(value, Tensor) and value.ndim == 0 for value in found.values())
        assert found["grad_norm"].item() == pytest.approx(float(square) ** 0.5, rel=1e-12)
        assert found["lam"].item() == pytest.approx(2 * float(square) + 0.1, rel=1e-12)
        assert (found["refreshes"].item(), found["skipped"].item(), found["rho"].item()) == (2, 0, 2.0)
        assert 0 < found["kl_scale"].item() <= 1


def outputs(kind: str, f: Tensor) -> Any:
    class Output:
        logits = f

    return {"tuple": (f, None), "dict": {"logits": f}, "object": Output()}[kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "object"])
@methods("ring", "kalman-vd", "ekfac")
def test_outputs_that_are_no_tensor(method: Method, kind: str) -> None:
    """A tuple, a dict or an object with .logits trains as the tensor in it does."""
    ends = []
    for wrap in (False, True):

        class Model(nn.Module):
            def __init__(self, wrap: bool = wrap) -> None:
                super().__init__()
                self.body, self.wrap = mixed(), wrap

            def forward(self, x: Tensor) -> Any:
                return outputs(kind, self.body(x)) if self.wrap else self.body(x)

        model = Model()
        with method(model) as optimizer:
            for x, y in stream(3):
                optimizer.zero_grad()
                f = model(x)
                if wrap:
                    f = f[0] if kind == "tuple" else f["logits"] if kind == "dict" else f.logits
                cross_entropy(f, y).backward()
                optimizer.step()
        ends.append(vector(model))
    assert torch.equal(*ends)


CASTS: dict[str, Callable[[Tensor], Tensor]] = {"once": Tensor.double, "twice": lambda f: f.double().float()}


class Cast(nn.Module):
    """Returns a cast of its output, and the cross-entropy of what was cast; `cast` None: of none."""

    def __init__(self, cast: str | None) -> None:
        super().__init__()
        self.body, self.cast = mixed(torch.float32), cast

    def forward(self, x: Tensor, y: Tensor) -> Any:
        f = self.body(x.float())
        return {"loss": cross_entropy(f, y), "logits": f if self.cast is None else CASTS[self.cast](f)}


def run_cast(method: Method, cast: str | None, loss: str, fisher: Any = "mc") -> tuple[Tensor, dict[str, Tensor], GRNG]:
    model = Cast(cast)
    optimizer = method(model, curvature=Curvature(stats_every=1, fisher=fisher))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        output = model(x, y)
        value = output["loss"] if loss == "inside" else cross_entropy(output["logits"].double(), y)
        value.backward()
        return value

    for x, y in stream(3):
        optimizer.step(partial(loss_of, x, y))
    optimizer.close()
    return vector(model), tensors_of(optimizer), optimizer


@pytest.mark.parametrize("cast", list(CASTS))
@methods()
def test_a_loss_that_does_not_go_through_the_cast_that_is_returned(method: Method, cast: str) -> None:
    """As under accelerate in mixed precision with a model that computes its own loss: the same to the bit."""
    plain, casts = run_cast(method, None, "inside"), run_cast(method, cast, "inside")
    assert {row.verified for row in casts[2].coverage()} <= {"yes", "-"}
    assert torch.equal(plain[0], casts[0])
    assert plain[1].keys() == casts[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(casts[1][name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("cast", list(CASTS))
@methods("ring", "ekfac", "reng-double")
def test_a_loss_of_the_cast_is_measured_once(method: Method, cast: str) -> None:
    """By the gradient in the precision of the cast; where labels drawn in that are others, under the exact Fisher."""
    fisher = "mc" if cast == "twice" else "exact"
    plain, casts = (run_cast(method, which, "outside", fisher) for which in (None, cast))
    assert {row.verified for row in casts[2].coverage()} <= {"yes", "-"}
    assert relative(casts[0], plain[0]) < 1e-5
