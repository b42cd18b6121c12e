"""Preconditioners of one's own: by decorator, by entry point, by instance; and the conformance test they call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grng import GRNG, Curvature, register_preconditioner
from grng.preconditioners import (
    EKFAC,
    KFAC,
    Diagonal,
    Kalman,
    Preconditioner,
    available_preconditioners,
    check_preconditioner,
    make_preconditioner,
    registry,
)

from .cases import Root, mlp, relative, stream, train, vector


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def test_registered_by_decorator() -> None:
    """It is found by name, trains, says its name in the coverage report, and resumes."""
    register_preconditioner("root")(Root)
    assert "root" in available_preconditioners()
    model, batches = mlp(4, 5, 3), stream(4)
    with GRNG(model, "kfac", preconditioner="root", lr=0.02) as optimizer:
        losses = train(optimizer, model, batches[:1] * 20)
        assert {row.treatment for row in optimizer.coverage()} == {"root"}
        saved = optimizer.state_dict()
    assert losses[-1] < losses[0] - 0.01
    again = mlp(4, 5, 3)
    again.load_state_dict(model.state_dict())
    with GRNG(again, "kfac", preconditioner="root", lr=0.02) as optimizer:
        optimizer.load_state_dict(saved)
        second = optimizer.state[again[0].weight]["second"]
        assert torch.equal(second, saved["state"][0]["second"])


def test_registering_twice() -> None:
    """The same class again is fine (a module that is reloaded); another one under its name is not."""
    register_preconditioner("root")(Root)
    register_preconditioner("root")(Root)

    class Other(Root):
        pass

    with pytest.raises(ValueError, match=r"'root' is registered already, by .*\.Root"):
        register_preconditioner("root")(Other)
    with pytest.raises(ValueError, match=r"'kfac' is registered already, by grng.*\.KFAC"):
        register_preconditioner("kfac")(Other)
    assert isinstance(make_preconditioner("kfac"), KFAC)


@pytest.mark.parametrize("what", [lambda: None, torch.nn.Linear, Root()], ids=["function", "class", "instance"])
def test_registering_what_is_none(what: Any) -> None:
    with pytest.raises(TypeError, match=r"must derive from grng\.preconditioners\.Preconditioner, but is: "):
        register_preconditioner("mine")(what)
    assert "mine" not in available_preconditioners()


class Point:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.load = name, load


def offer(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    def entry_points(*, group: str) -> list[Point]:
        assert group == "grng.preconditioners"
        return list(points)

    monkeypatch.setattr(registry, "entry_points", entry_points)


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed without being imported, loaded when asked for, once."""
    loads: list[str] = []

    def load() -> type[Root]:
        loads.append("root")
        return Root

    offer(monkeypatch, Point("root", load), Point("broken", lambda: 1 / 0))
    assert {"root", "broken", "kfac"} <= set(available_preconditioners())
    assert loads == []
    for _ in range(2):
        assert type(make_preconditioner("root")) is Root
    assert loads == ["root"]
    model = mlp(4, 5, 3)
    with GRNG(model, preconditioner="root") as optimizer:
        train(optimizer, model, stream(1))
    with pytest.raises(ZeroDivisionError):
        make_preconditioner("broken")
    with pytest.raises(ValueError, match=r"'rot'.*broken, .*root.*Did you mean 'root'"):
        make_preconditioner("rot")


def test_entry_point_that_is_no_preconditioner(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, Point("mine", lambda: torch.nn.Linear))
    with pytest.raises(TypeError, match="must derive from"):
        make_preconditioner("mine")


def test_instance() -> None:
    """An instance is used as it is, with its own settings."""
    chosen, batches = Kalman(p0=0.02, gamma=0.0), stream(3)
    model = mlp(4, 5, 3)
    with GRNG(model, "kalman", preconditioner=chosen, rho=0.0) as optimizer:
        train(optimizer, model, batches)
        p = optimizer.state[model[0].weight]["p"]
    assert bool((p < 0.02).all())
    assert relative(vector(model), vector(mlp(4, 5, 3))) > 1e-3


def test_without_curvature_of_its_own() -> None:
    """The trust region of a method that knows no F takes -<D, g> in its place."""
    model = mlp(4, 5, 3)
    options = {"lr": 1.0, "momentum": 0.0, "curvature": Curvature(kl_clip=1e-4)}
    with GRNG(model, "kfac", preconditioner=Root(), **options) as optimizer:  # type: ignore[arg-type]
        before = vector(model)
        train(optimizer, model, stream(1))
        moved = vector(model) - before
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        nu = optimizer.diagnostics["kl_scale"].item()
    assert nu < 1
    assert nu**2 * float(-(moved / nu) @ grads) == pytest.approx(1e-4, rel=1e-9)


BUILT_IN: dict[str, Any] = {
    "identity": "identity",
    "diagonal": "diagonal",
    "kfac": "kfac",
    "kfac factored": lambda: KFAC(solver="factored"),
    "kfac newton": KFAC(solver="newton"),
    "ekfac": EKFAC,
    "kalman vd": "kalman",
    "kalman fd": lambda: Kalman(projection="fd", p0=1e-2),
    "root": Root,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", BUILT_IN)
def test_conformance(which: str, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    check_preconditioner(BUILT_IN[which], dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)


# One deliberate mistake each, and what the conformance test says of it.


class Ascent(Root):
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [-d for d in super().precondition(gradients, damping)]


class Flat(Root):
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [d.flatten(1) for d in super().precondition(gradients, damping)]


class Missing(Root):
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return super().precondition(gradients, damping)[:-1]


class Half(Root):
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [d.half() for d in super().precondition(gradients, damping)]


class Undamped(Root):
    """0 / 0 in a row of a measured layer where nothing was seen: a word that did not occur."""

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        seen = [s.sum((1, 2), keepdim=True) > 0 for s in self.second.values]
        pairs = zip(gradients, self.second.values, seen, strict=True)
        return [-g / torch.where(any_, s.sqrt(), 1.0) for g, s, any_ in pairs]


class InPlace(Root):
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [g.div_(s.sqrt() + d).neg_() for g, s, d in zip(gradients, self.second.values, damping, strict=True)]


class Mask(Root):
    def measured(self) -> list[Tensor]:
        return [m.flatten() for m in super().measured()]


class Scale(Root):
    def largest_curvature(self) -> Tensor:
        return -torch.stack([s.amax() for s in self.second.stacks]).amax()


class Shapeless(Root):
    def scales(self) -> list[Tensor]:
        return [s.amax() for s in self.second.values]


class Counting(Root):
    """Counts a batch that is not valid."""

    def allocate(self) -> None:
        super().allocate()
        self.steps = self.buffer("steps", lambda group: ())

    def refresh(self, batch: Any, decompose: bool) -> None:
        super().refresh(batch, decompose)
        for stack in self.steps.stacks:
            stack += 1


class Poisoned(Root):
    """Keeps sums of a batch that is not valid for the next."""

    def allocate(self) -> None:
        super().allocate()
        self.last: dict[Any, Tensor] = {}

    def observe(self, layer: Any, statistics: Any) -> None:
        super().observe(layer, statistics)
        self.last[layer] = self.last.get(layer, 0) + statistics.gradient()

    def refresh(self, batch: Any, decompose: bool) -> None:
        if not bool(batch.valid):
            self.last = dict.fromkeys(self.last, torch.tensor(torch.nan))
        super().refresh(batch, decompose)

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        bad = any(bool(value.isnan().any()) for value in self.last.values())
        return [d * torch.nan if bad else d for d in super().precondition(gradients, damping)]


class Hoarding(Root):
    """Saves at once what is observed."""

    def observe(self, layer: Any, statistics: Any) -> None:
        self.second.of(layer).add_(statistics.squared_gradients())
        super().observe(layer, statistics)

    def refresh(self, batch: Any, decompose: bool) -> None:
        if bool(batch.valid):
            super().refresh(batch, decompose)


class Forgetful(Root):
    """Does not forget what is discarded."""

    def discard(self) -> None:
        pass


class Unsaved(Root):
    """A count of steps that is not saved."""

    def allocate(self) -> None:
        super().allocate()
        self.steps = 0

    def refresh(self, batch: Any, decompose: bool) -> None:
        super().refresh(batch, decompose)
        self.steps += 1

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [d / self.steps for d in super().precondition(gradients, damping)]


class Scaled(Root):
    """Undoes the reduction of the loss, which has been undone."""

    def refresh(self, batch: Any, decompose: bool) -> None:
        batch.predictions = batch.predictions / batch.normaliser
        super().refresh(batch, decompose)


class Mean(Root):
    """Divides by the mean over all layers, also of those that were not observed."""

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        mean = torch.stack([s.mean() for s in self.second.values]).mean()
        return [-g / (mean.sqrt() + d) for g, d in zip(gradients, damping, strict=True)]


class Unseen(Root):
    """0 / 0 in a whole layer where that was not observed."""

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        shares = [s / s.sum((1, 2), keepdim=True) for s in self.second.values]
        return [-g / (s + d) for g, s, d in zip(gradients, shares, damping, strict=True)]


BROKEN: list[tuple[type[Preconditioner], str]] = [
    (Ascent, r"MLP does not descend: <direction, gradient> is not below 0"),
    (Flat, r"gives directions of shapes and dtypes"),
    (Missing, r"gives directions of shapes and dtypes"),
    (Half, r"gives directions of shapes and dtypes .*float16"),
    (Undamped, r"embedding gives directions that are not finite on an ordinary batch"),
    (InPlace, r"changes the gradients that it was given"),
    (Mask, r"gives a wrong measured\(\)"),
    (Scale, r"gives a wrong largest_curvature\(\)"),
    (Shapeless, r"gives wrong scales\(\)"),
    (Counting, r"lets a batch that is not valid change 0\.steps"),
    (Poisoned, r"gives directions that are not finite after a batch that is not valid"),
    (Hoarding, r"lets .* change 0\.second"),
    (Forgetful, r"counts observations that were discarded"),
    (Unsaved, r"has state that is not saved"),
    (Scaled, r"measures with a summed loss another 0\.second"),
    (Mean, r"lets layers that are not observed change the direction of layer 0"),
    (Unseen, r"gives directions that are not finite where a layer is not observed"),
]


@pytest.mark.parametrize(("kind", "message"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
def test_conformance_finds_the_mistake(kind: type[Preconditioner], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{kind.__name__} on the .*{message}"):
        check_preconditioner(kind)


def test_conformance_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown preconditioner 'rot'"):
        check_preconditioner("rot")


def test_documented_example() -> None:
    """The example of the protocol's docstring, word for word, trains and conforms."""
    doc = Preconditioner.__doc__
    assert doc is not None
    lines = [line.strip(" ")[4:] for line in doc.splitlines() if line.strip().startswith((">>>", "..."))]
    assert len(lines) <= 20
    scope: dict[str, Any] = {}
    exec("\n".join(lines), scope)
    kind = scope["RMS"]
    check_preconditioner(kind)
    assert kind.name in available_preconditioners()
    assert not issubclass(kind, Diagonal)
