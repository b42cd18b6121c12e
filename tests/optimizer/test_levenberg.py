"""Damping that follows how well the quadratic model foretold what steps did to the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from grng import GRNG, Curvature, check
from grng.damping import adapted
from grng.preconditioners import KFAC

from .cases import METHODS, Loss, Method, closure_of, methods, mixed, mlp, relative, stream, tensors_of, train, vector
from .test_first_step import as_matrices, as_vector, kron, measure

LM: Any = "levenberg-marquardt"
W = 19 / 20
MODELLED = ("ring", "ring-factored", "ring-newton", "reng-double", "reng-finite", "reng-ggn", "kfac", "ekfac")


def comparisons(optimizer: GRNG) -> list[tuple[float, float]]:
    """What the damping is told from now on: how the loss changed, and how its model said it would."""
    seen: list[tuple[float, float]] = []
    adapt = optimizer._damping.adapt

    def watch(actual: Tensor, predicted: Tensor) -> None:
        seen.append((actual.item(), predicted.item()))
        adapt(actual, predicted)

    optimizer._damping.adapt = watch  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("ratio", "every", "change"),
    [
        (0.76, 5, W**5),
        (0.74, 5, 1.0),
        (0.26, 5, 1.0),
        (0.24, 5, W**-5),
        (-3.0, 2, W**-2),
        (2.0, 1, W),
        (float("nan"), 5, W**-5),
        (float("-inf"), 5, W**-5),
    ],
)
@pytest.mark.parametrize("predicted", [-1e-9, -2.0, -1e9])
def test_rule(ratio: float, every: int, change: float, predicted: float) -> None:
    one = torch.tensor(3.0, dtype=torch.float64)
    foretold = torch.tensor(predicted).double()
    assert adapted(one, ratio * foretold, foretold, every).item() == pytest.approx(3 * change)


@pytest.mark.parametrize("predicted", [0.0, 1.0])
@pytest.mark.parametrize(
    ("actual", "change"), [(-1.0, 1.0), (0.0, 1.0), (1e-9, W**-5), (5.0, W**-5), (float("nan"), W**-5)]
)
def test_where_no_descent_is_foretold(predicted: float, actual: float, change: float) -> None:
    one = torch.tensor(1.0).double()
    assert adapted(one, actual * one, predicted * one).item() == pytest.approx(change)


def test_bounds() -> None:
    factor = torch.tensor(1.0).double()
    for ratio, bound in ((-1.0, 1e-6), (1.0, 1e6)):
        f = factor
        for _ in range(100):
            f = adapted(f, torch.tensor(ratio).double(), torch.tensor(-1.0).double())
        assert f.item() == pytest.approx(bound)


@pytest.mark.parametrize("lr", [0.5, 1.5])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("B", [6, 40])
def test_a_quadratic_loss_is_foretold(B: int, C: int, momentum: float, weight_decay: float, lr: float) -> None:
    """Linear regression: F is the Hessian, and the model the loss itself, whatever the step was."""
    generator = torch.Generator().manual_seed(B)
    x, y = (torch.randn(B, n, generator=generator).double() for n in (4, C))
    model = mlp(4, C)
    curvature = Curvature("exact", damping=LM, stats_every=1)
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    with GRNG(model, "kfac", curvature=curvature, **settings) as optimizer:
        seen = comparisons(optimizer)
        train(optimizer, model, [(x, y)] * 10, mse_loss)
        good = sum(1 if predicted < 0 else -1 for _, predicted in seen)
        assert optimizer._damping.factor.item() == pytest.approx(W ** (5 * good), rel=1e-12)
    assert len(seen) == 2
    for actual, predicted in seen:
        assert actual == pytest.approx(predicted, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("B", [7, 24])
def test_against_the_dense_model(B: int, momentum: float) -> None:
    """g^T delta + 1/2 delta^T F delta with the dense blocks, and the loss before and after."""
    x, y = stream(1, B, 5)[0]
    model = mlp(5, 4, 3)
    curvature = Curvature("exact", damping=LM, stats_every=1)
    with GRNG(model, "kfac", lr=2.0, momentum=momentum, curvature=curvature) as optimizer:
        optimizer._damping.every = 1
        seen = comparisons(optimizer)
        for _ in range(3):
            blocks = measure(model, x, y, "exact")
            optimizer._preconditioner.Lambda.decay = optimizer._preconditioner.Gamma.decay = 0.0
            before, value = vector(model), cross_entropy(model(x), y).item()
            train(optimizer, model, [(x, y)])
            delta = vector(model) - before
            g = as_vector([b.gradient for b in blocks])
            F = torch.block_diag(*(kron(b) for b in blocks))
            rows = torch.cat([M.flatten() for M in as_matrices(delta, blocks)])
            expected = g @ delta + rows @ F @ rows / 2
            actual, predicted = seen[-1]
            assert predicted == pytest.approx(expected.item(), rel=1e-9)
            assert actual == pytest.approx(cross_entropy(model(x), y).item() - value, rel=1e-9)


class Noisy(nn.Module):
    """Dropout, batch statistics, and parameters without factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = mixed()
        self.norm, self.drop = nn.BatchNorm1d(3).double(), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.inner(x)))


@methods(*MODELLED)
def test_the_second_look_leaves_nothing_behind(method: Method) -> None:
    """Until the factor first acts, steps, buffers, gradients and random numbers are those of a run without it; the loss
    is compared with the same random numbers."""

    def run(damping: Any) -> tuple[list[Tensor], list[tuple[float, float]], list[float]]:
        model = Noisy()
        curvature = Curvature(damping=damping, stats_every=2)
        found, seen, changes = [], [], []
        with method(model, curvature=curvature) as optimizer:
            if damping:
                seen = comparisons(optimizer)
            for batch in stream(5, B=9):
                state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
                closure = closure_of(optimizer, model, [batch])
                value = optimizer.step(closure)
                found += [vector(model), torch.get_rng_state()]
                found += [t.detach().clone() for t in (*model.buffers(), *(p.grad for p in model.parameters()))]
                # The loss by hand, where the optimizer looked at it.
                with torch.random.fork_rng(), optimizer.paused(), torch.no_grad():
                    after = [b.clone() for b in model.buffers()]
                    for b, old in zip(model.buffers(), buffers, strict=True):
                        b.copy_(old)
                    torch.set_rng_state(state)
                    changes.append((cross_entropy(model(batch[0]), batch[1]) - value).item())
                    for b, new in zip(model.buffers(), after, strict=True):
                        b.copy_(new)
        return found, seen, changes

    plain, _, _ = run(None)
    adaptive, seen, changes = run(LM)
    assert len(seen) == 1
    assert seen[0][0] == pytest.approx(changes[4], rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(plain, adaptive, strict=True))


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ring", "ring-newton"])
@pytest.mark.parametrize(
    ("lr", "damping", "every", "steps", "calls", "factor"),
    [
        (1e-3, LM, 5, 11, 13, W**10),
        (1e-3, LM, 2, 5, 7, W**4),
        (300.0, LM, 1, 1, 2, 1 / W),
        (1e-3, None, 5, 11, 11, 1.0),
    ],
)
def test_less_damping_after_short_steps_and_more_after_long_ones(
    name: str, lr: float, damping: Any, every: int, steps: int, calls: int, factor: float
) -> None:
    """In lam0 too; the closure runs once more every so many steps."""
    model = mlp(4, 6, 3)
    counted = []
    curvature = Curvature(damping=damping, step_clip=None, relative_to="model", stats_every=1)
    with METHODS[name](model, lr=lr, momentum=0.0, rho=0.0, curvature=curvature) as optimizer:
        optimizer._damping.every = every
        for batch in [stream(1, B=20)[0]] * steps:
            inner = closure_of(optimizer, model, [batch])
            optimizer.step(lambda inner=inner: counted.append(1) or inner())
        found = optimizer._damping
        assert len(counted) == calls
        assert found.factor.item() == pytest.approx(factor, rel=1e-12)
        assert found.floor.item() == pytest.approx(factor * found.variant.floor * found.largest.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [cross_entropy, lambda f, y: mse_loss(f, one_hot(y, 3).to(f))], ids=["ce", "mse"])
@pytest.mark.parametrize("parts", [1, 3])
def test_micro_batches(parts: int, loss: Loss) -> None:
    """A batch in parts is compared as a whole."""
    x, y = stream(1, B=12)[0]
    found = []
    for n in (1, parts):
        model = mlp(4, 5, 3)
        scale = 1 / n if loss is not cross_entropy else None  # a squared error does not show its scale
        curvature = Curvature("exact", damping=LM, stats_every=1, loss_scale=scale)
        with GRNG(model, "kfac", curvature=curvature) as optimizer:
            seen = comparisons(optimizer)
            for _ in range(5):
                pieces = list(zip(x.chunk(n), y.chunk(n), strict=True))
                optimizer.step(closure_of(optimizer, model, pieces, loss))
        found.append(torch.tensor(seen))
    assert relative(found[1], found[0]) < 1e-8


def test_resume() -> None:
    """The factor is in the checkpoint, and one without it is refused."""
    curvature = Curvature(damping=LM, stats_every=2)
    batches = stream(13)
    whole, first, second, plain = (mixed() for _ in range(4))
    with GRNG(whole, "kfac", curvature=curvature) as a, GRNG(first, "kfac", curvature=curvature) as b:
        train(a, whole, batches)
        train(b, first, batches[:7])
        saved = first.state_dict(), b.state_dict()
        assert b._damping.factor.item() != 1
        second.load_state_dict(saved[0])
        with GRNG(second, "kfac", curvature=curvature) as c:
            c.load_state_dict(saved[1])
            train(c, second, batches[7:])
            assert torch.equal(vector(whole), vector(second))
            ends = tensors_of(a), tensors_of(c)
            assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with GRNG(plain, "kfac") as without, GRNG(mixed(), "kfac", curvature=curvature) as other:
        train(without, plain, batches[:2])
        with pytest.raises(ValueError, match="grng_damping_factor"):
            other.load_state_dict(without.state_dict())


def test_a_second_look_that_fails() -> None:
    """An exception in it ends a step that was made: nothing else is lost, and training goes on."""
    batch = stream(1)[0]
    model = mixed()
    with GRNG(model, "kfac", curvature=Curvature(damping=LM)) as optimizer:
        inner, calls = closure_of(optimizer, model, [batch]), []

        def closure() -> Tensor:
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return inner()

        for _ in range(4):
            optimizer.step(closure)
        before = vector(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert not torch.equal(before, vector(model))
        assert all(p.grad is not None for p in model.parameters())
        assert optimizer._damping.factor.item() == 1
        assert optimizer.step(closure).isfinite()


def test_a_step_left_out_says_nothing() -> None:
    batches = stream(5)
    batches[4][0][0] = torch.nan
    model = mixed()
    with GRNG(model, "kfac", curvature=Curvature(damping=LM)) as optimizer:
        seen = comparisons(optimizer)
        train(optimizer, model, batches)
        assert len(seen) == 1
        assert optimizer._damping.factor.item() == 1


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no closure": (
        lambda: GRNG(mlp(2, 2), "kfac", curvature=Curvature(damping=LM)).step(),
        r"call step\(closure\)",
    ),
    "the filter": (lambda: GRNG(mlp(2, 2), "kalman", curvature=Curvature(damping=LM)), "variant without a floor"),
    "floor 0": (lambda: GRNG(mlp(2, 2), "kfac", curvature=Curvature(damping=LM, floor=0.0)), "without a floor"),
    "no model of the loss": (
        lambda: GRNG(mlp(2, 2), "ring", preconditioner="identity", curvature=Curvature(damping=LM)),
        "with preconditioner 'identity'",
    ),
    "another word": (lambda: Curvature(damping="lm"), "levenberg-marquardt"),  # type: ignore[arg-type]
    "a number with a floor": (lambda: Curvature(damping=1.0, floor=0.1), "Both set lam0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


@pytest.mark.parametrize("solver", ["eigen", "newton"])
def test_with_a_floor_and_check(solver: str) -> None:
    """`floor=` is where it starts; `grng.check` takes the settings as they are."""
    model = mixed()
    curvature = Curvature(damping=LM, floor=0.3)
    with GRNG(model, "kfac", preconditioner=KFAC(solver), curvature=curvature) as optimizer:
        train(optimizer, model, stream(1))
        assert optimizer._damping.floor.item() == pytest.approx(0.3 * optimizer._damping.largest.item())
    found = check(mixed(), stream(1)[0][0], variants=["kfac"], curvature=curvature)
    assert found.ok, found
