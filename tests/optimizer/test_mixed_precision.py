"""Low precision is the user's; factors, averages and decompositions stay in float32 or better."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from grng.kernels.precision import MATMULS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from grng import GRNG, Curvature
from grng.curvature import Batch, Layer, Statistics
from grng.preconditioners import Preconditioner
from grng.regularizers import ClipNorm, Regularized

from .cases import ONE_PASS, Method, methods, mixed, mlp, relative, stream, tensors_of, vector

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# What is kept of a layer, and what the filter believes.
FACTORS = ("Lambda", "Gamma", "second", "fisher", "p", "P_in", "P_out")
SCALES = {"reng-double": 16.0}  # two derivatives of a scaled loss leave float16 sooner
EXACT = Curvature(fisher="exact", stats_every=1)  # drawn labels would hang on the last bit of the outputs


def squared(f: Tensor, y: Tensor) -> Tensor:
    return mse_loss(f, one_hot(y, f.shape[1]).to(f.dtype))


def smoothed(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f, y, label_smoothing=0.1)


READ: dict[str, tuple[str, Any, Curvature, bool]] = {  # variant, loss, curvature; whether a plain scaler.step() can do
    "kalman": ("kalman", cross_entropy, Curvature(), True),
    "kalman of a squared error": ("kalman", squared, Curvature(), False),
    "kalman of a variance": ("kalman", squared, Curvature(noise=0.3), True),
    "kalman of an estimated variance": ("kalman", squared, Curvature(noise="scalar"), False),
    "kalman of another loss": ("kalman", smoothed, Curvature(), False),
    "ring of a squared error": ("ring", squared, Curvature(), True),
    "ring by true labels": ("ring", squared, Curvature(fisher="empirical"), False),
    "ring by true labels of classes": ("ring", cross_entropy, Curvature(fisher="empirical"), True),
    "ring of another loss": ("ring", smoothed, Curvature(), False),
    "ekfac of another loss": ("ekfac", smoothed, Curvature(), False),
    "kalman told of its scale": ("kalman", squared, Curvature(loss_scale=1.0), False),
}


@pytest.mark.filterwarnings("ignore:GRNG uses the empirical Fisher")
@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("around", [False, True], ids=["alone", "regularized"])
@pytest.mark.parametrize("case", READ)
def test_the_scale_of_the_loss_does_not_matter(case: str, around: bool, size: int) -> None:
    """As without one where it can be told, refused with the remedy where not: N is read off the scaled gradient of some
    losses, and assumed of others."""
    variant, loss, curvature, plain = READ[case]

    def train(way: str) -> Tensor:
        torch.manual_seed(0)
        model = mlp(4, 5, 3)
        own = GRNG(model, variant, curvature=curvature)
        optimizer = Regularized(own, ClipNorm(1e9)) if around else own
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=way != "none")
        before = vector(model)
        for x, y in stream(4, B=size):
            optimizer.zero_grad()
            for each in optimizer.passes(scaler) if way == "passes" else [nullcontext()]:
                with each:
                    scaler.scale(loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return vector(model) - before

    expected = train("none")
    assert relative(train("passes"), expected) < 1e-9
    if plain:
        assert relative(train("plain"), expected) < 1e-9
    else:
        with pytest.raises(RuntimeError, match=r"take the pass by `for each in optimizer.passes\(scaler\):`"):
            train("plain")


class Loop:
    """Training under autocast to `autocast`, and under a GradScaler where there is a scale; `inside`: with the backward
    pass and the step under autocast too."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        scale: float | None = None,
        inside: bool = False,
    ) -> None:
        self.model, self.optimizer = model, method(model, curvature=EXACT)
        self.device = next(model.parameters()).device
        kind = self.device.type
        self.autocast = lambda: nullcontext() if autocast is None else torch.autocast(kind, dtype=autocast)
        self.scaler = torch.amp.GradScaler(kind, init_scale=scale or 1.0, enabled=scale is not None)
        self.scaler.scale(torch.zeros((), device=self.device))  # which makes its scale
        self.around = self.autocast if inside else nullcontext

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        with self.around():
            for each in self.optimizer.passes(self.scaler if self.scaler.is_enabled() else None):
                with each:
                    with self.autocast():
                        loss = cross_entropy(self.model(x), y)
                    self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def train(self, steps: int) -> Tensor:
        """How far the parameters move."""
        before = vector(self.model).double()
        dtype = next(self.model.parameters()).dtype
        for x, y in stream(steps, dtype=dtype):
            self.step(x.to(self.device), y.to(self.device))
        return vector(self.model).double() - before


def factors(optimizer: GRNG) -> dict[str, Tensor]:
    return {name: t for name, t in tensors_of(optimizer).items() if name.split(".", 1)[1] in FACTORS and t.numel()}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, where NaN stands for what is not settled yet."""
    return a.allclose(b, rtol=0, atol=0, equal_nan=True)


def close(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert relative(value.double(), exact[name].double()) < tolerance, name


def floating(optimizer: GRNG) -> set[torch.dtype]:
    return {t.dtype for t in tensors_of(optimizer).values() if t.is_floating_point()}


@HALF
@methods()
def test_autocast(method: Method, dtype: torch.dtype) -> None:
    """Factors are float32 and those of float32 training up to the rounding of the passes; the update too."""
    scale = SCALES.get(method.name, 256.0) if dtype == torch.float16 else None
    exact, low = Loop(method, mixed(torch.float32)), Loop(method, mixed(torch.float32), dtype, scale)
    moved = exact.train(1), low.train(1)
    assert floating(low.optimizer) <= {torch.float32, torch.float64}
    close(factors(low.optimizer), factors(exact.optimizer), 8 * torch.finfo(dtype).eps)
    assert relative(moved[1], moved[0]) < 16 * torch.finfo(dtype).eps
    assert {row.verified for row in low.optimizer.coverage()} <= {"yes", "-"}
    low.train(4)
    assert low.optimizer.diagnostics["skipped"].item() == 0
    assert vector(low.model).isfinite().all()


@HALF
@methods(*ONE_PASS)
def test_backward_and_step_under_autocast(method: Method, dtype: torch.dtype) -> None:
    """Where the user's autocast surrounds them too, nothing of GRNG's is cast: the same to the bit."""
    loops = [Loop(method, mixed(torch.float32), dtype, inside=inside) for inside in (False, True)]
    moved = [loop.train(3) for loop in loops]
    outside, inside = (tensors_of(loop.optimizer) for loop in loops)
    assert outside.keys() == inside.keys()
    assert [name for name in outside if not outside[name].equal(inside[name])] == []
    assert torch.equal(*moved)


@pytest.mark.parametrize("scale", [1.0, 2.0**12])
@methods()
def test_scale_of_the_loss_does_not_matter(method: Method, scale: float) -> None:
    """A power of two changes no digit of a float32 gradient; N and the gradients are freed of it."""
    plain, scaled = Loop(method, mixed(torch.float32)), Loop(method, mixed(torch.float32), scale=scale)
    moved = plain.train(3), scaled.train(3)
    assert relative(moved[1], moved[0]) < 1e-4
    close(factors(scaled.optimizer), factors(plain.optimizer), 1e-4)


@pytest.mark.parametrize("steps", [0, 2])
@methods()
def test_a_skipped_step_leaves_everything(method: Method, steps: int) -> None:
    """A scale that overflows float16: no parameter and no state moves but the counters, and the scale is halved."""
    loop = Loop(method, mixed(torch.float32), torch.float16, SCALES.get(method.name, 256.0))
    loop.train(steps)
    before, weights = tensors_of(loop.optimizer), vector(loop.model)
    loop.scaler.update(2.0**40)
    loop.train(1)
    after = tensors_of(loop.optimizer)
    changed = {name.split(".", 1)[1] for name in after if name not in before or not same(before[name], after[name])}
    of_the_passes = {"fisher_rng", "likelihood", "loss_scale", "grng_period", "grng_decomposed"}
    assert changed <= of_the_passes | {"grng_steps", "regularizer_steps", "grng_counts"}
    assert torch.equal(vector(loop.model), weights)
    assert loop.optimizer.diagnostics["skipped"].item() == 1
    assert loop.scaler.get_scale() == 2.0**39
    loop.scaler.update(SCALES.get(method.name, 256.0))
    loop.train(2)
    assert loop.optimizer.diagnostics["skipped"].item() == 1
    assert not torch.equal(vector(loop.model), weights)


@methods()
def test_bfloat16_weights(method: Method) -> None:
    """State in float32, and the step of float32 weights of the same values, rounded once."""
    low = mixed(torch.bfloat16)
    high = mixed(torch.float32)
    high.load_state_dict({name: value.float() for name, value in low.state_dict().items()})
    loops = Loop(method, low), Loop(method, high)
    for loop in loops:
        x, y = stream(1, dtype=torch.bfloat16)[0]
        loop.step(x.to(next(loop.model.parameters()).dtype), y)
    assert floating(loops[0].optimizer) <= {torch.float32, torch.float64}
    close(factors(loops[0].optimizer), factors(loops[1].optimizer), 8 * torch.finfo(torch.bfloat16).eps)
    size = vector(high).abs().max()
    assert (vector(low).float() - vector(high)).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * size
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


@methods()
def test_float64(method: Method) -> None:
    """Factors follow the parameters into float64, and float32 training is that up to its rounding."""
    high, low = (
        Loop(method, mlp(4, 4, 4, 3, dtype=torch.float32).to(dtype)) for dtype in (torch.float64, torch.float32)
    )
    moved = high.train(2), low.train(2)
    assert {t.dtype for t in factors(high.optimizer).values()} <= {torch.float64}
    assert relative(moved[1], moved[0]) < 5e-3
    close(factors(low.optimizer), factors(high.optimizer), 5e-3)


# TF32, which is a setting of the process.


@pytest.fixture
def settings_of_the_process() -> Iterator[None]:
    before = [matmul.fp32_precision for matmul in MATMULS]
    yield
    for matmul, value in zip(MATMULS, before, strict=True):
        matmul.fp32_precision = value


class Watching(Preconditioner):
    """Notes in what precision matrices are multiplied while it works."""

    def allocate(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def _look(self) -> None:
        self.seen.append((*(matmul.fp32_precision for matmul in MATMULS), str(torch.is_autocast_enabled("cpu"))))

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        self._look()

    def refresh(self, batch: Batch, decompose: bool) -> None:
        self._look()

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        self._look()
        return [-g for g in gradients]


def raise_in(module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(lambda g: 1 / 0)


@pytest.mark.usefixtures("settings_of_the_process")
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_factor_products_are_not_rounded(setting: str, fisher: Any) -> None:
    """In the passes and in the step, while the user's own setting holds before, between and after, errors included."""
    torch.set_float32_matmul_precision(setting)
    model, watching = mixed(torch.float32), Watching()
    mine = [matmul.fp32_precision for matmul in MATMULS]
    with GRNG(model, "kfac", preconditioner=watching, curvature=Curvature(fisher=fisher)) as optimizer:
        for x, y in stream(2, dtype=torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                cross_entropy(model(x), y).backward()
                assert [matmul.fp32_precision for matmul in MATMULS] == mine
                optimizer.step()
            assert [matmul.fp32_precision for matmul in MATMULS] == mine
        assert len(watching.seen) >= 2 * 5
        assert set(watching.seen) == {("ieee", "ieee", "False")}
        model[0].register_forward_hook(raise_in)
        with pytest.raises(ZeroDivisionError):
            cross_entropy(model(x), y).backward()
        assert [matmul.fp32_precision for matmul in MATMULS] == mine
    assert torch.get_float32_matmul_precision() == setting


class TwoPrecisions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x.bfloat16()).float())  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_every_precision_decay(order: int) -> None:
    """By the same factor, whichever comes first in their group."""
    model = TwoPrecisions()
    params = [p for layer in list(model.children())[::order] for p in layer.parameters()]
    optimizer = GRNG(model, "ring", params=params, lr=0.1, weight_decay=0.01, fallback_lr=0.1)
    before = model.high.weight.detach().clone()
    (0 * model(torch.randn(5, 3)).sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model.high.weight.detach(), before * (1 - 0.001), rtol=1e-6, atol=0)


def test_what_the_scale_keeps_alive_in_float16_is_not_lost() -> None:
    """Unscaled in place, gradients of 1e-7 would be zero."""
    model = mlp(4, 5, 3, dtype=torch.float16)
    optimizer = GRNG(model, "kfac", curvature=Curvature(damping=1e-18, relative_to="model"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for x, y in stream(2, dtype=torch.float16):
        optimizer.zero_grad()
        scaler.scale(1e-7 * cross_entropy(model(x), y)).backward()
        size = torch.stack([p.grad.float().norm() for p in model.parameters()]).norm() / scaler.get_scale()  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
    assert float(optimizer.diagnostics["grad_norm"]) == pytest.approx(float(size), rel=1e-3)
    assert size > 0
