"""What every preconditioner owes the optimizer, as one function that a test calls."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng.curvature import Capture, Curvature, Layer
from grng.curvature.plan import find_layers
from grng.preconditioners.base import Preconditioner, make_groups
from grng.preconditioners.registry import make_preconditioner

DAMPING = 0.1
BATCHES, SAMPLES = 3, 40  # more samples than inputs: a null space has no basis that rounding does not turn
Which = str | Preconditioner | Callable[[], Preconditioner]


def check_preconditioner(which: Which, *, dtype: torch.dtype = torch.float64) -> None:
    """Check a preconditioner on three small models: an MLP, a grouped convolution, and an embedding.

    1. Directions, masks and scalars have the shapes and dtypes of the protocol, and are finite; gradients stay as
       they were.
    2. It descends: <direction, gradient> < 0 over the whole model.
    3. A batch that is not valid changes nothing that is saved, nor do observations that are discarded.
    4. What is saved is all there is: a fresh one with the loaded state gives the same directions, to the bit.
    5. What is measured does not depend on whether the loss is a mean or a sum.
    6. A layer that was never observed does no harm.

    Args:
        which: a registered name, an instance that no optimizer has used, or a function that makes one (a class, say).
        dtype: of parameters and factors.

    Raises:
        AssertionError: a check fails; the message names the class, the model and what was found.

    >>> check_preconditioner("kfac")
    >>> class Ascent(Preconditioner):
    ...     def observe(self, layer, statistics): pass
    ...     def refresh(self, batch, decompose): pass
    ...     def precondition(self, gradients, damping): return [g / d for g, d in zip(gradients, damping)]
    >>> check_preconditioner(Ascent)
    Traceback (most recent call last):
        ...
    AssertionError: Ascent on the MLP does not descend: <direction, gradient> is not below 0
    """
    with torch.random.fork_rng(devices=[]):
        for what in MODELS:
            for check in (_shapes_and_descent, _invalid_batch, _discarded, _state, _reduction, _unobserved):
                check(lambda what=what, **options: _Bench(which, what, dtype, **options))


Make = Callable[..., "_Bench"]


def _mlp() -> tuple[nn.Module, Tensor]:
    """Two layers of one shape, and one without bias."""
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return nn.Sequential(*layers), torch.randn(BATCHES, SAMPLES, 4)


def _convolution() -> tuple[nn.Module, Tensor]:
    layers = (nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    return nn.Sequential(*layers), torch.randn(BATCHES, SAMPLES, 4, 3, 3)


def _embedding() -> tuple[nn.Module, Tensor]:
    layers = (nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3))
    return nn.Sequential(*layers), torch.randint(5, (BATCHES, SAMPLES, 3))


MODELS = {"the MLP": _mlp, "the grouped convolution": _convolution, "the embedding": _embedding}


class _Idle(nn.Module):
    """A model beside layers that it does not use, of a shape that is in use and of one that is not."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.twin = deepcopy(next(m for m in body.modules() if isinstance(m, nn.Linear)))
        self.other, self.body = nn.Linear(7, 2), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class _Bench:
    """A preconditioner on a model, as the optimizer drives it."""

    def __init__(self, which: Which, what: str, dtype: torch.dtype, idle: bool = False) -> None:
        torch.manual_seed(0)
        self.what = what
        model, self.inputs = MODELS[what]()
        self.labels = torch.randint(3, (BATCHES, SAMPLES))
        self.model = (_Idle(model) if idle else model).to(dtype)
        self.inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        if isinstance(which, str):
            self.preconditioner = make_preconditioner(which)
        else:
            self.preconditioner = deepcopy(which) if isinstance(which, Preconditioner) else which()
        config = Curvature(capture="hooks", likelihood="categorical", dtype=dtype if dtype == torch.float64 else None)
        self.layers, _ = find_layers(self.model, set(self.model.parameters()), self.preconditioner.takes_others)
        self.groups = make_groups(self.layers, config)
        self.preconditioner.setup(self.groups, config)
        self.capture = Capture(self.model, self.layers, config, self.preconditioner.observe)
        self.gradients: list[Tensor] = []

    def backward(self, i: int, reduction: str = "mean", spoil: bool = False) -> None:
        """Batch i is observed."""
        self.model.zero_grad()
        loss = cross_entropy(self.model(self.inputs[i]), self.labels[i], reduction=reduction)
        (loss * torch.nan if spoil else loss).backward()

    def step(self, i: int, reduction: str = "mean", spoil: bool = False) -> list[Tensor]:
        """Directions for batch i; of one that is spoiled the gradients are not finite."""
        self.backward(i, reduction, spoil)
        batch = self.capture.batch
        assert batch is not None
        batch.valid = torch.tensor(not spoil)
        with torch.no_grad():
            self.preconditioner.refresh(batch, True)
            self.gradients = [torch.zeros(g.size, g.n_out, g.n_in, dtype=g.dtype) for g in self.groups]
            for layer in self.layers:
                layer.put(self.gradients[layer.group][layer.slots], lambda p: None if spoil else p.grad)
            damping = [torch.full((g.size, 1, 1), DAMPING, dtype=g.dtype) for g in self.groups]
            given = [g.clone() for g in self.gradients]
            directions = self.preconditioner.precondition(given, damping)
        self.capture.finish_step(True)
        same = all(map(torch.equal, given, self.gradients))
        self.require(same, "changes the gradients that it was given: they belong to the caller")
        return directions

    def saved(self) -> dict[str, Tensor]:
        """A copy of everything that is saved."""
        found = [(layer, self.preconditioner.state(layer)) for layer in self.layers]
        return {f"{layer.name}.{name}": value.clone() for layer, state in found for name, value in state.items()}

    def require(self, condition: bool, message: str) -> None:
        if not condition:
            raise AssertionError(f"{type(self.preconditioner).__name__} on {self.what} {message}")

    def require_finite(self, directions: list[Tensor], when: str) -> None:
        self.require(all(bool(d.isfinite().all()) for d in directions), f"gives directions that are not finite {when}")

    def require_same_state(self, before: dict[str, Tensor], by: str) -> None:
        after = self.saved()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        self.require(not changed, f"lets {by} change {', '.join(changed)}")


def _shapes_and_descent(make: Make) -> None:
    bench = make()
    for i in range(3):
        directions = bench.step(i)
        method, groups = bench.preconditioner, bench.groups
        expected = [((g.size, g.n_out, g.n_in), g.dtype) for g in groups]
        found = [(tuple(d.shape), d.dtype) for d in directions]
        bench.require(found == expected, f"gives directions of shapes and dtypes {found}: {expected} are expected")
        bench.require_finite(directions, "on an ordinary batch")
        product = torch.stack([(d * g).sum() for d, g in zip(directions, bench.gradients, strict=True)]).sum()
        bench.require(bool(product < 0), "does not descend: <direction, gradient> is not below 0")
        masks = [(tuple(mask.shape), mask.dtype) for mask in method.measured()]
        right = masks == [((g.size, 1, 1), torch.bool) for g in groups]
        bench.require(right, f"gives a wrong measured(): {masks}, one bool (k, 1, 1) a group is expected")
        scales = [tuple(scale.shape) for scale in method.scales()]
        right = scales == [(g.size, 1, 1) for g in groups]
        bench.require(right, f"gives wrong scales(): of shapes {scales}, (k, 1, 1) a group is expected")
        scale = method.largest_curvature()
        right = scale.ndim == 0 and bool(scale.isfinite()) and bool(scale >= 0)
        bench.require(right, f"gives a wrong largest_curvature(): {scale}, a finite scalar >= 0 is expected")


def _invalid_batch(make: Make) -> None:
    bench = make()
    bench.step(0)
    before = bench.saved()
    bench.step(1, spoil=True)
    bench.require_same_state(before, "a batch that is not valid")
    bench.require_finite(bench.step(2), "after a batch that is not valid")


def _discarded(make: Make) -> None:
    bench, plain = make(), make()
    for each in (bench, plain):
        each.step(0)
    before = bench.saved()
    with _same_draws(bench):
        bench.backward(1)
        bench.preconditioner.discard()
        bench.capture.finish_step(True)
    bench.require_same_state(before, "observations that were discarded")
    same = all(map(torch.equal, bench.step(2), plain.step(2)))
    bench.require(same, "counts observations that were discarded: override discard() to forget them")


@contextmanager
def _same_draws(bench: _Bench) -> Iterator[None]:
    """The labels drawn inside are drawn again after it."""
    generator = bench.capture.fisher.generator(torch.device("cpu"))
    state = generator.get_state()
    yield
    generator.set_state(state)


def _state(make: Make) -> None:
    bench, fresh = make(), make()
    for i in range(2):
        bench.step(i)
    kept = {layer.name: {n: v.clone() for n, v in bench.preconditioner.state(layer).items()} for layer in bench.layers}
    for layer in fresh.layers:
        fresh.preconditioner.load_state(layer, kept[layer.name])
    fresh.capture.fisher.load_state(bench.capture.fisher.state(torch.device("cpu")), torch.device("cpu"))
    same = all(map(torch.equal, bench.step(2), fresh.step(2)))
    bench.require(same, "has state that is not saved: after load_state() its directions differ")


def _reduction(make: Make) -> None:
    mean, total = make(), make()
    for i in range(2):
        mean.step(i)
        total.step(i, reduction="sum")
    ours, theirs = mean.saved(), total.saved()
    limit = 1e3 * max([torch.finfo(v.dtype).eps for v in ours.values() if v.is_floating_point()], default=0.0)
    differ = [n for n, v in ours.items() if float((v - theirs[n]).norm()) > limit * float(v.norm())]
    mean.require(not differ, f"measures with a summed loss another {', '.join(differ)} than with its mean")


def _unobserved(make: Make) -> None:
    bench, plain = make(idle=True), make()
    for i in range(2):
        directions, expected = bench.step(i), plain.step(i)
        bench.require_finite(directions, "where a layer is not observed")
    for layer in plain.layers:
        same_layer = next(other for other in bench.layers if other.name == f"body.{layer.name}")
        ours, theirs = _part(directions, same_layer), _part(expected, layer)
        limit = 1e3 * torch.finfo(ours.dtype).eps
        same = float((ours - theirs).norm()) <= limit * float(theirs.norm())
        bench.require(same, f"lets layers that are not observed change the direction of layer {layer.name}")


def _part(stacks: list[Tensor], layer: Layer) -> Tensor:
    return stacks[layer.group][layer.slots]
