"""Checkpointed activations, compiled models, derivatives in the loss, threads: the same statistics, or a clear word."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grng.kernels.precision import MATMULS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from grng import GRNG, Curvature, GRNGWarning

from .cases import METHODS, ONE_PASS, Method, methods, mixed, relative, stream, tensors_of, train, vector

EVERY = Curvature(stats_every=1)


class Checkpointed(nn.Module):
    """Three layers, the one in the middle under activation checkpointing; reentrant None: not at all."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if self.reentrant is None:
            return self.c(self.b(h).tanh())
        return self.c(checkpoint(lambda h: self.b(h).tanh(), h, use_reentrant=self.reentrant))


def trained(method: Method, model: nn.Module, steps: int = 3, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Parameters and state after some steps."""
    with method(model, curvature=Curvature(stats_every=1, **settings)) as optimizer:
        train(optimizer, model, stream(steps))
        return vector(model), tensors_of(optimizer)


def same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-12) -> None:
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(value, b[1][name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
    assert relative(a[0], b[0]) < tolerance


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@methods()
def test_activation_checkpointing(method: Method, fisher: str) -> None:
    """What is computed twice is counted once."""
    same(trained(method, Checkpointed(False), fisher=fisher), trained(method, Checkpointed(None), fisher=fisher))


@methods(*ONE_PASS)
def test_reentrant_checkpointing_leaves_the_true_labels(method: Method) -> None:
    """No nested pass goes through its graph: a warning names the remedy, and training goes on without drawn labels."""
    model = Checkpointed(True)
    with method(model, curvature=Curvature(draws=1)) as optimizer:
        with pytest.warns(GRNGWarning, match=r"uses the empirical Fisher: .* use_reentrant=False"):
            losses = train(optimizer, model, stream(1) * 6)
        assert losses[-1] < losses[0]
        rows = {row.parameter: row.verified for row in optimizer.coverage()}
    assert rows == {name: "no" if name.startswith("b.") else "yes" for name in rows}


def test_reentrant_checkpointing_under_the_empirical_fisher() -> None:
    """It needs no nested pass: the layer inside falls back visibly, the others have a plain model's factors."""
    states = []
    for reentrant in (True, None):
        model = Checkpointed(reentrant)
        with GRNG(model, "kfac", lr=0.0, fallback_lr=0.0, curvature=Curvature(fisher="empirical")) as optimizer:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(optimizer, model, stream(2))
            said = [str(w.message) for w in caught if issubclass(w.category, GRNGWarning)]
            assert [text.startswith("GRNG trains b by the first-order fallback") for text in said] == [True] * bool(
                reentrant
            )
            states.append(tensors_of(optimizer))
    for name in ("0.Lambda", "0.Gamma", "4.Lambda", "4.Gamma"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-12, atol=0)


# Compiled models.


@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@methods("ring", "ekfac", "kalman-vd", "kalman-kron", "reng-finite", "ring-diagonal")
def test_compiled_model(method: Method, backend: str, how: str) -> None:
    """Compiled around the optimizer's hooks: the statistics and the steps of the model as it is."""
    torch._dynamo.reset()
    model = mixed()
    with method(model, curvature=EVERY) as optimizer:
        if how == "model.compile":
            model.compile(backend=backend)
        called = torch.compile(model, backend=backend) if how == "torch.compile" else model
        train(optimizer, called, stream(3))  # type: ignore[arg-type]
        assert {row.verified for row in optimizer.coverage()} <= {"yes", "-"}
        found = vector(model), tensors_of(optimizer)
    same(found, trained(method, mixed()))


def test_compiled_model_has_no_second_derivative() -> None:
    torch._dynamo.reset()
    model = mixed()
    with METHODS["reng-double"](model) as optimizer:
        model.compile(backend="aot_eager")
        before = vector(model)
        with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
            train(optimizer, model, stream(1))
        assert torch.equal(vector(model), before)


# Derivatives of the model in the loss.


def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy and a penalty on its gradient at the inputs."""
    x = x.clone().requires_grad_()
    loss = cross_entropy(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 0.1 * slope.square().sum()


@pytest.mark.parametrize("engine", ["hooks", "backpack"])
@methods("ring", "ekfac", "kalman-vd", "ring-diagonal")
def test_gradient_penalty_from_the_start(method: Method, engine: Any) -> None:
    """The pair of a layer does not make the gradient of such a loss: said, and trained by the fallback."""
    model = mixed()
    with (
        method(model, curvature=Curvature(capture=engine)) as optimizer,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        losses = []
        for x, y in stream(1) * 8:
            optimizer.zero_grad()
            loss = penalised(model, x, y)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        rows = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert any("by the first-order fallback" in str(w.message) for w in caught)
    assert rows["5.weight"] == "adamw"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", ["hooks", "backpack"])
@methods("ring", "ekfac", "ring-diagonal", "ring-factored")
def test_gradient_penalty_that_comes_later(method: Method, engine: Any) -> None:
    """A graph that is differentiated twice is measured once: the statistics of the loss without its penalty."""
    states = []
    for penalty in (False, True):
        model = mixed()
        curvature = Curvature(capture=engine, fisher="exact")
        with method(model, lr=0.0, fallback_lr=0.0, curvature=curvature) as optimizer, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of module hooks that fire once more
            train(optimizer, model, stream(1))
            for x, y in stream(3)[1:]:
                optimizer.zero_grad()
                (penalised(model, x, y) if penalty else cross_entropy(model(x), y)).backward()
                optimizer.step()
            assert optimizer.diagnostics["refreshes"].item() == 3
            found = tensors_of(optimizer)
        states.append({name: found[name] for name in found if name.split(".")[1] in ("Lambda", "Gamma", "fisher")})
    assert states[0]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("engine", ["hooks", "backpack"])
@methods("ring", "ekfac", "kalman-vd", "ring-diagonal")
def test_inputs_that_need_a_gradient(method: Method, engine: Any) -> None:
    """As in adversarial training: no layer is missed, the first neither."""
    ends = []
    for needed in (False, True):
        model = mixed()
        with method(model, curvature=Curvature(capture=engine, stats_every=1)) as optimizer:
            train(optimizer, model, [(x.requires_grad_(needed), y) for x, y in stream(3)])
            assert optimizer._capture.engine.name == engine
            assert {row.verified for row in optimizer.coverage()} <= {"yes", "-"}
        ends.append(vector(model))
    assert relative(ends[1], ends[0]) < 1e-12


# Threads.


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@methods("ring", "ring-factored", "ekfac", "kalman-vd", "kalman-kron", "reng-finite")
def test_a_model_in_each_of_four_threads(method: Method) -> None:
    """The same to the bit as one after the other, and the process's settings are what they were."""
    before = [matmul.fp32_precision for matmul in MATMULS]

    def work(found: dict[int, Tensor], i: int) -> None:
        model = models[i]
        with method(model, curvature=Curvature(capture="hooks", stats_every=1)) as optimizer:
            train(optimizer, model, stream(6))
        found[i] = vector(model)

    ends: list[dict[int, Tensor]] = [{}, {}]
    models = [mixed(seed=i) for i in range(4)]
    for i in range(4):
        work(ends[0], i)
    models = [mixed(seed=i) for i in range(4)]
    in_threads(lambda i: work(ends[1], i), 4)
    for i in range(4):
        assert torch.equal(ends[0][i], ends[1][i])
    assert [matmul.fp32_precision for matmul in MATMULS] == before


@pytest.mark.parametrize("capture", ["hooks", "backpack"])
def test_a_pass_of_another_thread_within_a_forward_pass(capture: str) -> None:
    """An evaluation that begins and ends between two layers of the training pass changes nothing."""
    ends = []
    for beside in (False, True):
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

        def evaluate(i: int, model: nn.Module = model) -> None:
            with torch.no_grad():
                model(torch.ones(5, 4).double())

        def disturb(*args: Any, beside: bool = beside, evaluate: Callable[[int], None] = evaluate) -> None:
            if beside and torch.is_grad_enabled():
                in_threads(evaluate, 1)

        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).roll(i))
        with GRNG(model, "ring", curvature=Curvature(capture=capture, stats_every=1)) as optimizer:
            model[1].register_forward_hook(disturb)
            train(optimizer, model, stream(3))
            assert {row.verified for row in optimizer.coverage()} == {"yes"}
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_passes_of_other_threads_while_training() -> None:
    """Evaluation in threads of its own, without gradients, while the model is trained: finite, and it learns."""
    model, stop = mixed(), threading.Event()
    with GRNG(model, "ring", curvature=Curvature(capture="hooks")) as optimizer:

        def work(i: int) -> None:
            if i == 0:
                try:
                    losses.extend(train(optimizer, model, stream(1) * 30))
                finally:
                    stop.set()
                return
            # The pause hands Python's lock on: threads that never wait take it from the training at every operation.
            while not stop.wait(1e-3):
                with torch.no_grad():
                    model(torch.randn(5, 4).double())
                passes[i] += 1

        losses: list[float] = []
        passes = [0, 0, 0]
        in_threads(work, 3)
    assert losses[-1] < losses[0]
    assert min(passes[1:]) > 0
    assert vector(model).isfinite().all()
