"""sum e x^T == p.grad: no false alarm where the capture is right, an alarm where it is wrong."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import grng.curvature.geometry as geometry_module
from grng import GRNG, Curvature, GRNGWarning
from grng.curvature import Layer

from .harness import ENGINES, Attached, measure
from .models import CASES

ENGINE = pytest.mark.parametrize("engine", ENGINES)


def statuses(layers: dict[str, Layer]) -> set[str]:
    return {layer.status for layer in layers.values()}


def conv_before_norm() -> nn.Module:
    """The bias of the convolution moves nothing: its gradient is zero up to rounding."""
    parts = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(4, 3))


def dead() -> nn.Module:
    """A layer whose units are all off: its gradient is exactly zero."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(model[0].bias, -100.0)
    return model


def stretched() -> nn.Module:
    """Weights over fourteen orders of magnitude."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-12, 2, 5)[:, None])
    return model


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


EXACT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv bias before a norm": (conv_before_norm, lambda: torch.randn(6, 2, 5, 5)),
    "dead units": (dead, lambda: torch.randn(6, 4)),
    "stretched weights": (stretched, lambda: torch.randn(6, 4)),
    "dropout": (dropped, lambda: torch.randn(6, 4)),
    "large inputs": (CASES["in-place ReLU"].build, lambda: 1e6 * torch.randn(6, 4)),
    "small inputs": (CASES["in-place ReLU"].build, lambda: 1e-9 * torch.randn(6, 4)),
    "LoRA at its start": (CASES["adapted"].build, lambda: torch.randn(6, 4)),
    "many rows": (lambda: nn.Sequential(nn.Linear(4, 3)), lambda: torch.randn(5000, 4)),
    "long sums": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(4000, 3)), lambda: torch.randn(6, 40, 100)),
}


ZERO = ("dead units", "LoRA at its start")  # a layer's gradient is: it is looked at again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EXACT)
def test_no_false_alarm(case: str, dtype: torch.dtype) -> None:
    build, inputs = EXACT[case]
    model, x = build().to(dtype), inputs().to(dtype)
    y = torch.randint(3, (len(x),))
    seen = measure(model, x, lambda f: cross_entropy(f.to(torch.promote_types(dtype, torch.float32)), y))
    assert statuses(seen.layers) == {"verified"} | ({"pending"} if case in ZERO else set())


@pytest.mark.parametrize("case", EXACT)
def test_no_false_alarm_under_autocast(case: str) -> None:
    build, inputs = EXACT[case]
    model, x = build().float(), inputs().float()
    y = torch.randint(3, (len(x),))
    attached = Attached(model)

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x).float(), y)
        loss.backward()

    assert statuses(attached.step(work).layers) == {"verified"} | ({"pending"} if case in ZERO else set())
    attached.capture.close()


@ENGINE
@pytest.mark.parametrize("wrong", [False, True])
def test_nothing_is_verified_by_a_gradient_of_zero(wrong: bool, engine: str) -> None:
    """Behind a last layer that begins at zero, nothing equals nothing: the first gradient decides."""

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self[0](x))
            return self[1](torch.tanh(nn.functional.linear(h, self[0].weight)) if wrong else h)

    model = Twice(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[1].weight)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, "hooks" if wrong else engine)
    work = lambda: cross_entropy(model(x), y).backward()  # noqa: E731
    assert [layer.status for layer in attached.step(work).layers.values()] == ["pending", "verified"]
    nn.init.normal_(model[1].weight)
    model.zero_grad()
    with pytest.warns(GRNGWarning, match="misses the gradient") if wrong else nullcontext():
        after = attached.step(work).layers
    assert [layer.status for layer in after.values()] == ["failed" if wrong else "verified", "verified"]
    attached.capture.close()


@ENGINE
@pytest.mark.parametrize("already", [1e-8, 1.0, 1e8])
def test_no_false_alarm_under_accumulation(already: float, engine: str) -> None:
    """What counts is the change of .grad, whatever was in it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for p in model.parameters():
        p.grad = already * torch.randn_like(p)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, engine)

    def work() -> None:
        for part in (slice(0, 2), slice(2, 6)):
            cross_entropy(model(x[part]), y[part]).backward()

    assert statuses(attached.step(work).layers) == {"verified"}
    attached.capture.close()


@ENGINE
@pytest.mark.parametrize("to_none", [True, False])
def test_no_false_alarm_where_gradients_are_zeroed_after_the_forward_pass(to_none: bool, engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    cross_entropy(model(x), y).backward()
    attached = Attached(model, engine)

    def work() -> None:
        loss = cross_entropy(model(x), y)
        model.zero_grad(set_to_none=to_none)
        loss.backward()

    assert statuses(attached.step(work).layers) == {"verified"}
    attached.capture.close()


@ENGINE
@pytest.mark.parametrize("to_none", [True, False])
def test_no_false_alarm_where_a_first_backward_pass_is_thrown_away(to_none: bool, engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, engine)

    def work() -> None:
        for _ in range(2):
            model.zero_grad(set_to_none=to_none)
            cross_entropy(model(x), y).backward()

    assert statuses(attached.step(work).layers) == {"verified"}
    attached.capture.close()


@ENGINE
def test_clipping_and_unscaling_come_too_late_to_matter(engine: str) -> None:
    """The check compares what the backward pass left, not what somebody made of it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, engine)

    def work() -> None:
        (65536 * cross_entropy(model(x), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    assert statuses(attached.step(work).layers) == {"verified"}
    attached.capture.close()


@ENGINE
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_no_verdict(poison: float, engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, engine)
    seen = attached.step(lambda: (poison * cross_entropy(model(x), y)).backward())
    assert statuses(seen.layers) == {"pending"}
    model.zero_grad()
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    attached.capture.close()
    assert statuses(seen.layers) == {"verified"}


@ENGINE
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_patches_that_ignore_the_padding_mode_are_found(
    mode: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = geometry_module.conv_windows

    def with_zeros(module: nn.Module, x: Tensor) -> Tensor:
        plain = nn.Conv2d(2, 4, 3, padding=1)
        return known(plain, x)

    monkeypatch.setattr(geometry_module, "conv_windows", with_zeros)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3))
    x, y = torch.randn(6, 2, 4, 5), torch.randint(3, (6,))
    with pytest.warns(GRNGWarning, match=r"trains 0 by the first-order fallback: .* misses the gradient by 0\.\d+"):
        seen = measure(model, x, lambda f: cross_entropy(f, y), engine)
    assert (seen.layers["0"].status, seen.layers["3"].status) == ("failed", "verified")


def transposed(x: Tensor) -> Tensor:
    return x.flip(-1)


def scaled(x: Tensor) -> Tensor:
    return 1.01 * x


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def lost_row(x: Tensor) -> Tensor:
    return torch.cat([x[:-1], 0 * x[-1:]])


@ENGINE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wrong", [transposed, scaled, shifted, lost_row])
def test_a_wrong_input_is_found(
    wrong: Callable[[Tensor], Tensor], dtype: torch.dtype, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one in a hundred in one layer's rows is far above the tolerance."""
    known = Layer.statistics
    monkeypatch.setattr(
        Layer, "statistics", lambda self, x, *rest: known(self, wrong(x) if self.name == "2" else x, *rest)
    )
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(6, 4, dtype=dtype), torch.randint(3, (6,))
    with pytest.warns(GRNGWarning, match="trains 2 by the first-order fallback"):
        seen = measure(model, x, lambda f: cross_entropy(f, y), engine)
    assert {name: layer.status for name, layer in seen.layers.items()} == {"0": "verified", "2": "failed"}


@ENGINE
def test_a_layer_is_checked_once(engine: str) -> None:
    """Once all are verified, the hooks on the parameters are gone and nothing is compared again."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model, engine)
    for hooks in (1, 1, 0):
        assert all(len(p._post_accumulate_grad_hooks or ()) == hooks for p in model.parameters())
        attached.step(lambda: cross_entropy(model(x), y).backward())
        assert not attached.capture._check._before
        assert not attached.capture._check._after
    attached.capture.close()


def test_a_model_whose_forward_is_not_called_is_said() -> None:
    """A loop that calls a part of the model trains by the fallback, with a warning, and the report says "pending"."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    with GRNG(model) as optimizer:
        before = [p.detach().clone() for p in model.parameters()]
        nn.functional.cross_entropy(model[2](model[1](model[0](x))), y).backward()
        with pytest.warns(GRNGWarning, match="saw no forward pass of the model"):
            optimizer.step()
        assert {row.verified for row in optimizer.coverage()} == {"pending"}
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@ENGINE
@pytest.mark.parametrize("variant", ["ring", "kalman"])
@pytest.mark.parametrize("boundary", [5, 9], ids=["other batch size", "same batch size"])
def test_derivatives_of_the_model_in_the_loss_fall_back(boundary: int, variant: str, engine: str) -> None:
    """A physics-informed loss: layers are seen twice, once along with their own derivatives. Nothing crashes, the
    capture is found to miss the gradient, and every parameter is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    before = [p.detach().clone() for p in model.parameters()]
    with GRNG(model, variant, curvature=Curvature(capture=engine)) as optimizer:  # type: ignore[arg-type]
        for _ in range(4):
            optimizer.zero_grad()
            x = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
            u = model(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            bend = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0][:, :1]
            loss = bend.square().mean() + (model(torch.rand(boundary, 2).double()) - 1).square().mean()
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
        rows = optimizer.coverage().rows
        assert {row.reason.partition(" by ")[0] for row in rows} == {"the captured pair misses the gradient"}
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
