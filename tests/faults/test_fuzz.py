"""Arguments, models and loops that nobody thought of: an error that says what is wrong, or an optimizer that works.

A fixed, small number of examples in every run of the tests; thousands of new ones by

    GRNG_FUZZ=long pytest tests/faults/test_fuzz.py
"""

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature, GRNGWarning
from grng.preconditioners import EKFAC, KFAC, Kalman
from grng.regularizers import GNP, SAM, ClipNorm

from ..optimizer.cases import METHODS, live_hooks, mlp, vector

NAN, INF = float("nan"), float("inf")
ANY_TIME = settings(suppress_health_check=list(HealthCheck))

# Arguments, valid and not.

NUMBERS = st.sampled_from([0, 0.0, 0.05, 0.5, 1, 1.0, 1e-8, 3.0, -1.0, -0.1, NAN, INF, 1e20, True, torch.tensor(0.1)])
STRANGE = st.sampled_from(["fast", "", (), [], [0.1], {}, 1j, b"x", torch.ones(2), object(), int])
COUNTS = st.sampled_from([0, 1, 2, 7, 10**6, -1, 1.0, 0.5, NAN, True])


def mostly(values: Any) -> Any:
    return st.one_of(values, values, values, st.none(), STRANGE)


ARGUMENTS = {
    "variant": st.sampled_from(["ring", "reng", "kalman", "kfac", "ekfac", "Ring", "", 3, None]),
    "lr": mostly(NUMBERS),
    "rho": mostly(st.one_of(NUMBERS, st.just("auto"))),
    "strength": mostly(NUMBERS),
    "momentum": mostly(NUMBERS),
    "weight_decay": mostly(NUMBERS),
    "mode": mostly(st.sampled_from(["double", "finite", "ggn"])),
    "norm": mostly(st.sampled_from(["global", "layer"])),
    "regularizer": mostly(
        st.sampled_from([ClipNorm(1.0), GNP(), SAM(), [ClipNorm(1.0), SAM()], [GNP(), ClipNorm()], 3])
    ),
    "preconditioner": mostly(st.sampled_from(["kfac", "ekfac", "kalman", "diagonal", "identity", "kfak", 3, KFAC])),
    "curvature": mostly(st.sampled_from([Curvature(fisher="exact"), Curvature(capture="hooks"), 3])),
    "fallback": mostly(st.sampled_from(["adamw", "sgd"])),
    "fallback_lr": mostly(NUMBERS),
    "params": mostly(st.sampled_from([3, "abc", nn.Linear(2, 2).parameters()])),
}
CURVATURE = {
    "fisher": mostly(st.sampled_from(["mc", "empirical", "exact"])),
    "draws": mostly(COUNTS),
    "likelihood": mostly(st.sampled_from(["auto", "categorical", "gaussian", "bernoulli"])),
    "loss_scale": mostly(st.sampled_from(["sum", 1.0, 2, NAN, -1.0])),
    "noise": mostly(st.sampled_from(["auto", "scalar", "diagonal", "full", 1.0, 0.0, INF])),
    "capture": mostly(st.sampled_from(["auto", "backpack", "hooks"])),
    "ema": mostly(NUMBERS),
    "stats_every": mostly(COUNTS),
    "inverse_every": mostly(COUNTS),
    "burn_in": mostly(COUNTS),
    "damping": mostly(NUMBERS),
    "floor": mostly(NUMBERS),
    "kl_clip": mostly(st.one_of(NUMBERS, st.just("auto"))),
    "step_clip": mostly(st.one_of(NUMBERS, st.just("auto"))),
    "relative_to": mostly(st.sampled_from(["auto", "model", "layer"])),
    "max_dim": mostly(st.sampled_from([None, 1, 5, 8192])),
    "sharing": mostly(st.sampled_from(["expand", "reduce"])),
    "dtype": mostly(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    "seed": mostly(st.sampled_from([0, 7, -1, 2.5])),
}
KALMAN = {
    "p0": mostly(NUMBERS),
    "gamma": mostly(NUMBERS),
    "covariance": mostly(st.sampled_from(["diag", "kron"])),
    "columns": mostly(st.sampled_from(["auto", "grouped", "sample"])),
    "groups": mostly(COUNTS),
    "projection": mostly(st.sampled_from(["vd", "fd"])),
    "gain": mostly(st.sampled_from(["trace", "exact"])),
    "penalty": mostly(st.sampled_from(["ring", "fading"])),
    "process_noise": mostly(NUMBERS),
    "p_max": mostly(NUMBERS),
}
MAKERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "GRNG": (lambda model, **given: GRNG(model, **given), ARGUMENTS),
    "Curvature": (lambda model, **given: GRNG(model, "ring", curvature=Curvature(**given)), CURVATURE),
    "Kalman": (lambda model, **given: GRNG(model, "kalman", preconditioner=Kalman(**given)), KALMAN),
    "KFAC": (lambda model, **given: GRNG(model, "kfac", preconditioner=KFAC(**given)), {"solver": STRANGE}),
    "EKFAC": (lambda model, **given: GRNG(model, "kfac", preconditioner=EKFAC(**given)), {"solver": STRANGE}),
}


@st.composite
def calls(draw: Any) -> tuple[str, dict[str, Any]]:
    """A constructor, and up to three of its arguments."""
    maker = draw(st.sampled_from(["GRNG", "GRNG", "GRNG", "Curvature", "Curvature", "Kalman", "KFAC", "EKFAC"]))
    values = MAKERS[maker][1]
    names = draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True))
    return maker, {name: draw(values[name]) for name in names}


def steps(optimizer: GRNG, model: nn.Module, count: int) -> None:
    x, y = torch.randn(6, 3), torch.randint(3, (6,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def named(error: Exception, texts: Iterable[str]) -> None:
    """The message holds one of the texts."""
    assert any(text in str(error) for text in texts), (error, texts)


@ANY_TIME
@given(calls())
def test_arguments(call: tuple[str, dict[str, Any]]) -> None:
    """An error names an argument that was given; without an error it trains."""
    name, arguments = call
    model = mlp(3, 4, 3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GRNGWarning)
        try:
            optimizer = MAKERS[name][0](model, **arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            named(error, arguments)
            assert live_hooks(model) == 0
            return
        with optimizer:
            try:
                steps(optimizer, model, 3)
            except (ValueError, RuntimeError, TypeError) as error:  # what only a gradient shows
                named(error, arguments)
            optimizer.load_state_dict(optimizer.state_dict())
            assert len(str(optimizer.coverage()).splitlines()) >= 6
        large = any(isinstance(v, float) and v > 1e6 for v in arguments.values())
        assert large or vector(model).isfinite().all(), arguments


# Models and loops.

WIDTH, CLASSES = 4, 3
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "in-place relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "gelu": nn.GELU,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH, momentum=0.5),
    "dropout": lambda: nn.Dropout(0.2),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, WIDTH)
    ),
    "residual": lambda: Residual(nn.Linear(WIDTH, WIDTH)),
    "scale": lambda: Scale(),
}


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Scale(nn.Module):
    """A parameter of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@st.composite
def models(draw: Any) -> nn.Sequential:
    """A stack of layers and a head; a layer may stand in it twice, another be frozen."""
    parts = [LAYERS[name]() for name in draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=5))]
    if parts and draw(st.booleans()):
        parts.append(draw(st.sampled_from(parts)))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *parts, nn.Linear(WIDTH, CLASSES))
    frozen = draw(st.sampled_from([None, *range(len(parts) + 1)]))
    if frozen is not None:
        model[frozen].requires_grad_(False)
    return model


# What may come out of an order of calls that makes no sense: of torch, and of ours.
DOCUMENTED = (
    "no gradient: call loss.backward() first",
    "takes a second pass",
    "modified by an inplace operation",
    "backward through the graph a second time",
    "does not require grad",
    "one backward() a closure",
)
OPERATIONS = ("step", "step", "step", "forward", "backward", "bare step", "zero_grad", "model.zero_grad", "eval pass",
              "no_grad pass", "save and load", "joint", "closure", "batch of 1", "batch of 9", "empty batch", "freeze",
              "unfreeze", "accumulate", "clip")  # fmt: skip


class Loop:
    """A training loop whose parts come in any order."""

    def __init__(self, model: nn.Sequential, method: str) -> None:
        self.model, self.pending = model, list[Tensor]()
        self.optimizer = METHODS[method](model, curvature=Curvature(stats_every=2, burn_in=2))

    def loss(self, B: int = 6) -> Tensor:
        x, y = torch.randn(B, WIDTH), torch.randint(CLASSES, (B,))
        self.model.train(B > 1)  # a batch norm cannot train on one sample
        return cross_entropy(self.model(x), y, reduction="mean" if B else "sum")

    def full(self, B: int = 6, parts: int = 1) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            losses = [self.loss(B) / parts for _ in range(parts)]
            for loss in losses:
                loss.backward()
            return sum(loss.detach() for loss in losses)  # type: ignore[return-value]

        if self.optimizer.requires_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def do(self, operation: str, index: int) -> None:
        model, optimizer = self.model, self.optimizer
        if operation == "step":
            self.full()
        elif operation == "forward":
            self.pending.append(self.loss())
        elif operation == "backward":
            for loss in self.pending:
                loss.backward()
            self.pending.clear()
        elif operation == "bare step":
            optimizer.step()
        elif operation == "zero_grad":
            optimizer.zero_grad()
        elif operation == "model.zero_grad":
            model.zero_grad()
        elif operation == "eval pass":
            model.eval()(torch.randn(5, WIDTH))
            model.train()
        elif operation == "no_grad pass":
            with torch.no_grad():
                self.loss(3)
        elif operation == "save and load":
            optimizer.load_state_dict(optimizer.state_dict())
        elif operation == "joint":
            optimizer.zero_grad()
            (self.loss(4) + self.loss(5)).backward()
        elif operation == "closure":
            optimizer.step(lambda: self._closure())
        elif operation == "batch of 1":
            self.full(1)
        elif operation == "batch of 9":
            self.full(9)
        elif operation == "empty batch":
            self.full(0)
        elif operation in ("freeze", "unfreeze"):
            model[index % len(model)].requires_grad_(operation == "unfreeze")
        elif operation == "accumulate":
            self.full(4, parts=2)
        else:
            with suppress(RuntimeError):  # there is no gradient
                nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)

    def _closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


@ANY_TIME
@given(
    models(),
    st.sampled_from(sorted(METHODS)),
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5)), max_size=14),
)
def test_loops(model: nn.Sequential, method: str, operations: list[tuple[str, int]]) -> None:
    """Documented errors only; everything stays finite; in the end every parameter that has a gradient moves."""
    torch.manual_seed(len(operations))
    loop = Loop(model, method)
    with warnings.catch_warnings(), loop.optimizer as optimizer:
        warnings.simplefilter("ignore")
        for operation, index in operations:
            try:
                loop.do(operation, index)
            except RuntimeError as error:
                named(error, DOCUMENTED)
            assert vector(model).isfinite().all(), operation
        model.requires_grad_(True)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in trained]
        slope = [torch.zeros_like(p) for p in trained]
        for _ in range(4):
            loop.full(7)
            for p, size in zip(trained, slope, strict=True):
                size += 0 if p.grad is None else p.grad.abs()
        moved = [not torch.equal(p, old) for p, old in zip(trained, before, strict=True)]
        assert [bool(size.max() > 1e-6) <= here for size, here in zip(slope, moved, strict=True)] == [True] * len(moved)
        assert vector(model).isfinite().all()
    assert live_hooks(model) == 0
