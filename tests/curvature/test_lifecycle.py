"""What passes do to each other and what stays behind: nothing."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature, GRNGWarning

from .harness import ENGINES, Attached, Measured, measure
from .models import Named
from .reference import relative

# What BackPACK makes torch say in the user's own passes.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
ENGINE = pytest.mark.parametrize("engine", ENGINES)
FISHERS = pytest.mark.parametrize("fisher", ["exact", "empirical"])
SUMS = ("input_sum", "output_sum", "squared_gradients", "rows")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(B: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 4), torch.randint(3, (B,))


def equal(a: Measured, b: Measured) -> bool:
    assert a.batch.predictions == b.batch.predictions
    assert a.batch.samples == b.batch.samples
    assert {layer.status for layer in a.layers.values()} == {"verified"}
    return all(relative(a.total(name, what), b.total(name, what)) < 1e-12 for name in a.layers for what in SUMS)


def plain(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """What all the others must amount to: forward, backward, forward, backward."""
    for x, y in batches:
        cross_entropy(model(x), y).backward()


def interleaved(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    losses = [cross_entropy(model(x), y) for x, y in batches]
    for loss in losses:
        loss.backward()


def interleaved_backwards(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    losses = [cross_entropy(model(x), y) for x, y in batches]
    for loss in reversed(losses):
        loss.backward()


def evaluated_between(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Forward passes with and without gradients, in train and eval mode, whose outputs nobody differentiates."""
    for x, y in batches:
        model(torch.randn(2, 4))
        loss = cross_entropy(model(x), y)
        model(torch.randn(3, 4))
        with torch.no_grad():
            model(torch.randn(4, 4))
        with torch.inference_mode():
            model(torch.randn(4, 4))
        model.eval()(x)
        model.train()
        loss.backward()


def failed_between(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 7))
        loss.backward()


def walked_twice(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """A graph that is kept and differentiated again: its labels are drawn and its rows counted once."""
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a second backward", GRNGWarning)
            loss.backward()


def copied_between(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Copies made while attached, before and between passes, do not write into the original's statistics."""
    for x, y in batches:
        other = copy.deepcopy(model)
        loss = cross_entropy(model(x), y)
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for twin in (other, again):
            cross_entropy(twin(x), y).backward()
        loss.backward()


def differentiated_otherwise(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """torch.func on the model, and gradients of its parts that are not a training step."""
    for x, y in batches:
        own = {name: p.detach() for name, p in model.named_parameters()}
        one = lambda p, xb, yb: cross_entropy(torch.func.functional_call(model, p, (xb,)), yb)  # noqa: E731
        loss = cross_entropy(model(x), y)
        torch.func.vmap(torch.func.grad(one), (None, 0, 0))(own, x, y)
        torch.func.jacrev(lambda p, x=x: torch.func.functional_call(model, p, (x,)))(own)
        loss.backward()
        torch.autograd.grad(model[0](x).sum(), model[0].weight)


@ENGINE
@FISHERS
@pytest.mark.parametrize("way", [interleaved, interleaved_backwards, evaluated_between, failed_between, walked_twice,
                                 copied_between, differentiated_otherwise])  # fmt: skip
def test_passes_do_not_disturb_each_other(way: Callable[..., None], fisher: str, engine: str) -> None:
    """The same statistics as one batch after the other; on the first step, with its check, and on a later one."""
    model, batches = mlp(), [data(6), data(6)]
    attached = Attached(model, engine, fisher=fisher)
    for _ in range(2):
        model.zero_grad()
        seen = attached.step(lambda: way(model, batches))
        model.zero_grad()
        assert equal(seen, attached.step(lambda: plain(model, batches)))
    assert attached.capture.engine.name == engine
    attached.capture.close()
    fresh = Attached(model, engine, fisher=fisher)
    assert equal(fresh.step(lambda: way(model, batches)), seen)
    fresh.capture.close()


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("engine", ["auto", "backpack", "hooks"])
def test_two_forward_passes_in_one_backward_pass(engine: str, fisher: str) -> None:
    """Hooks tell them apart. BackPACK's do not where true gradients are wanted: it hands over to hooks, visibly, and
    counts nothing of that step."""
    model, batches = mlp(), [data(6), data(6)]

    def joint() -> None:
        sum(cross_entropy(model(x), y) for x, y in batches).backward()

    attached = Attached(model, engine, fisher=fisher)
    if engine == "backpack":
        with pytest.warns(GRNGWarning, match="captures by hooks, not BackPACK: two forward passes met"):
            first = attached.step(joint)
    else:
        first = attached.step(joint)
    if engine != "hooks":
        assert first.batch is None
        assert {layer.status for layer in first.layers.values()} == {"pending"}
    model.zero_grad()
    seen = attached.step(joint)
    assert attached.capture.engine.name == "hooks"
    attached.capture.close()
    if fisher != "mc":
        reference = Attached(model, "hooks", fisher=fisher)
        model.zero_grad()
        assert equal(seen, reference.step(lambda: plain(model, batches)))
        reference.capture.close()


@ENGINE
def test_a_step_that_is_not_due_measures_nothing(engine: str) -> None:
    model, (x, y) = mlp(), data()
    attached = Attached(model, engine)
    attached.step(lambda: cross_entropy(model(x), y).backward(), collect_next=False)
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    assert seen.batch is None
    assert not seen.uses
    assert not hasattr(model[0], "_backpack_extend")
    assert len(attached.step(lambda: cross_entropy(model(x), y).backward()).uses) == 2
    with attached.capture.paused():
        seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    assert not seen.uses
    attached.capture.close()


# Memory.


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Whatever dies must die by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def holders(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)


def with_value_head() -> nn.Module:
    """A layer after the output that is read: its place in the graph lies beyond the hook that must not keep it."""

    def run(m: nn.Module, x: Tensor) -> Any:
        f = m.a(x)
        return f, m.b(f.tanh())

    return Named(run, a=nn.Linear(4, 3), b=nn.Linear(3, 1))


def with_cast_output() -> nn.Module:
    """What is read lies behind a cast, and both are returned."""

    def run(m: nn.Module, x: Tensor) -> Any:
        f = m.a(x)
        return f.float(), f.sum()

    return Named(run, a=nn.Linear(4, 3))


PINS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "mlp": (mlp, ENGINES),
    "a layer alone": (lambda: nn.Linear(4, 3), ("hooks",)),
    "value head": (with_value_head, ("hooks",)),
    "cast output": (with_cast_output, ("hooks",)),
}


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize(
    ("case", "engine"), [(case, engine) for case, (_, engines) in PINS.items() for engine in engines]
)
@pytest.mark.parametrize("when", ["pending", "verified"])
def test_a_forward_pass_without_backward_pins_nothing(when: str, case: str, engine: str, fisher: str) -> None:
    model = PINS[case][0]()
    x, y = data()
    attached = Attached(model, engine, fisher=fisher)
    loss_of = lambda out: cross_entropy(out if isinstance(out, Tensor) else out[0], y)  # noqa: E731
    if when == "verified":
        attached.step(lambda: loss_of(model(x)).backward())
    mine = x.clone()
    storage = mine.untyped_storage()
    before = holders(storage)
    output = model(mine)
    assert holders(storage) > before
    del output
    assert holders(storage) == before
    attached.capture.close()


@pytest.mark.usefixtures("no_gc")
@ENGINE
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_after_the_backward_pass_nothing_is_pinned(fisher: str, engine: str) -> None:
    """Although the user still holds the loss and the output."""
    model, (x, y) = mlp(), data()
    attached = Attached(model, engine, fisher=fisher)
    attached.step(lambda: cross_entropy(model(x), y).backward())
    mine = x.clone()
    storage = mine.untyped_storage()
    before = holders(storage)
    output = model(mine)
    loss = cross_entropy(output, y)
    loss.backward()
    attached.uses.clear()
    assert holders(storage) == before
    attached.capture.close()


@pytest.mark.usefixtures("no_gc")
@ENGINE
def test_an_optimizer_that_is_dropped_lets_go(engine: str) -> None:
    """Without close(): hooks, statistics and the optimizer itself go with the last reference."""
    model, (x, y) = mlp(), data()
    optimizer = GRNG(model, curvature=Curvature(capture=engine))
    cross_entropy(model(x), y).backward()
    optimizer.step()
    cross_entropy(model(x), y).backward()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not hooks_of(model)


# What stays on the model.


def hooks_of(model: nn.Module) -> list[Any]:
    """Every hook on any module or parameter."""
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if "hooks" in name and value:
                found.append((name, value))
    for p in model.parameters():
        found += [*(p._backward_hooks or {}), *(p._post_accumulate_grad_hooks or {})]
    return found


@pytest.mark.parametrize("stop", ["attached", "forward", "backward", "step"])
@pytest.mark.parametrize("engine", ["hooks", "backpack"])
def test_close_leaves_nothing_behind(engine: str, stop: str) -> None:
    """Wherever in the step it is called: no hooks, no attributes, BackPACK's global list as long as before."""
    from backpack.context import CTX

    model, (x, y) = mlp(), data()
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    known = list(CTX.hook_handles)
    optimizer = GRNG(model, curvature=Curvature(capture=engine))
    if stop != "attached":
        loss = cross_entropy(model(x), y)
    if stop in ("backward", "step"):
        loss.backward()
    if stop == "step":
        optimizer.step()
        cross_entropy(model(x), y).backward()
    optimizer.close()
    assert not hooks_of(model)
    assert CTX.hook_handles == known
    assert CTX.active_exts == ()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    if stop == "forward":
        loss.backward()  # the user's own pass still runs
    optimizer.close()


@ENGINE
def test_an_error_in_the_backward_pass_leaves_a_working_optimizer(engine: str) -> None:
    from backpack.context import CTX

    model, (x, y) = mlp(), data()
    attached = Attached(model, engine, fisher="exact")

    def broken() -> None:
        f = model(x)
        f.register_hook(lambda g: 1 / 0)
        cross_entropy(f, y).backward()

    with pytest.raises(ZeroDivisionError):
        attached.step(broken)
    attached.capture.finish_step(True)
    assert CTX.active_exts == ()
    model.zero_grad()
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    attached.capture.close()
    assert equal(seen, measure(model, x, lambda f: cross_entropy(f, y), engine, fisher="exact"))


# Beside somebody else's BackPACK.


def batch_gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The user's own use of BackPACK, and what it should give."""
    from backpack import backpack
    from backpack.extensions import BatchGrad

    model.zero_grad()
    for p in model.parameters():
        p.grad_batch = None
    with backpack(BatchGrad()):
        cross_entropy(model(x), y, reduction="sum").backward()
    return [p.grad_batch.sum(0) for p in model.parameters()]


@pytest.mark.parametrize("engine", ["auto", "backpack", "hooks"])
def test_backpack_stays_usable(engine: str) -> None:
    """By the user on the same model before, while GRNG is attached, and after it was closed; and on another model."""
    from backpack import extend
    from backpack.context import CTX

    (x, y), other = data(), extend(mlp())
    model = extend(mlp())
    assert batch_gradients(model, x, y)
    known = len(CTX.hook_handles)
    optimizer = GRNG(model, lr=0.0, fallback_lr=0.0, curvature=Curvature(capture=engine))
    for _ in range(2):
        for use in (model, other):
            for p, found in zip(use.parameters(), batch_gradients(use, x, y), strict=True):
                torch.testing.assert_close(found, p.grad)
        assert len(CTX.hook_handles) == known
        batch_gradients(model, x, y)
        optimizer.step()
    assert {row.verified for row in optimizer.coverage()} == {"yes"}
    optimizer.close()
    for p, found in zip(model.parameters(), batch_gradients(model, x, y), strict=True):
        torch.testing.assert_close(found, p.grad)


def test_a_model_can_be_extended_after_grng_let_it_go() -> None:
    """The flag that would make extend() a silent no-op does not stay."""
    from backpack import extend

    model, (x, y) = mlp(), data()
    measure(model, x, lambda f: cross_entropy(f, y), "backpack")
    extend(model)
    for p, found in zip(model.parameters(), batch_gradients(model, x, y), strict=True):
        torch.testing.assert_close(found, p.grad)


@ENGINE
def test_two_models_side_by_side(engine: str) -> None:
    first, second, (x, y) = mlp(), mlp(), data()
    alone = [measure(m, x, lambda f: cross_entropy(f, y), engine, fisher="exact") for m in (first, second)]
    attached = [Attached(m, engine, fisher="exact") for m in (first, second)]
    first.zero_grad()
    second.zero_grad()
    (cross_entropy(first(x), y) + cross_entropy(second(x), y)).backward()
    for each, expected in zip(attached, alone, strict=True):
        assert len(each.uses) == 6
        each.capture.verify()
        assert {layer.status for layer in each.layers.values()} == {"verified"}
        total = torch.stack([s.output_sum() for name, s in each.uses if name == "0"]).sum(0)
        assert relative(total, expected.total("0", "output_sum")) < 1e-12
        each.capture.close()
