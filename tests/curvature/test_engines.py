"""The two engines: equal where both apply, chosen by what is safe, and right on models that make capture hard."""

import builtins
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature, GRNGWarning
from grng.curvature.backpack import BackpackEngine
from grng.curvature.plan import find_layers

from .harness import ENGINES, Attached, Measured, measure
from .models import CASES, Named
from .reference import matrices, module_of, own_parameters, relative

ENGINE = pytest.mark.parametrize("engine", ENGINES)
BATCHES = pytest.mark.parametrize("B", [1, 3, 8])
FISHERS = pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 2, groups=2, dilation=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def strided() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(9, 3))


def volumes() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 2, 2), nn.Flatten(), nn.Linear(24, 3))


def words() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3))


# model, input of a batch, labels of a batch
BOTH: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "mlp": (mlp, lambda B: torch.randn(B, 4), ()),
    "mlp on positions": (mlp, lambda B: torch.randn(B, 5, 4), (5,)),
    "cnn": (cnn, lambda B: torch.randn(B, 2, 4, 6), ()),
    "conv1d": (strided, lambda B: torch.randn(B, 2, 8), ()),
    "conv3d": (volumes, lambda B: torch.randn(B, 2, 3, 4, 3), ()),
    "embedding": (words, lambda B: torch.randint(7, (B, 5)), ()),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
        lambda B: torch.randn(B + 1, 4),
        (),
    ),
}  # fmt: skip


def token_loss(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda f: cross_entropy(f.flatten(0, -2), y.flatten())


@BATCHES
@FISHERS
@pytest.mark.parametrize("case", BOTH)
def test_engines_are_equal(case: str, fisher: str, B: int) -> None:
    """The same uses in the same order within a layer, and every sum equal to the bit."""
    build, inputs, positions = BOTH[case]
    model, x = build(), inputs(B)
    loss = token_loss(torch.randint(3, (len(x), *positions)))
    hooks, backpack = (measure(model, x, loss, engine, fisher=fisher) for engine in ENGINES)
    assert hooks.layers.keys() == backpack.layers.keys() == {name for name, _ in backpack.uses}
    assert len(hooks.uses) == len(backpack.uses)
    for name in hooks.layers:
        for what in ("input_sum", "output_sum", "gradient", "squared_gradients", "rows"):
            assert torch.equal(hooks.total(name, what), backpack.total(name, what))
        assert hooks.layers[name].status == backpack.layers[name].status == "verified"
    assert torch.equal(hooks.batch.predictions, backpack.batch.predictions)
    assert torch.equal(hooks.batch.normaliser, backpack.batch.normaliser)


def frozen_biases() -> nn.Module:
    """Of a layer, and of a norm."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    for i in (0, 1):
        model[i].bias.requires_grad_(False)
    return model


def tied_sequential() -> nn.Module:
    first = nn.Linear(4, 4)
    return nn.Sequential(first, nn.Tanh(), first)


def extended_by_user() -> nn.Module:
    import backpack

    return backpack.extend(mlp())


def frozen_weight() -> nn.Module:
    model = mlp()
    model[2].weight.requires_grad_(False)
    return model


AUTO: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "mlp": (mlp, None),
    "cnn": (cnn, None),
    "embedding": (words, None),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)), None),
    "no bias": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), None),
    "frozen bias": (frozen_biases, None),
    "in-place ReLU": (CASES["in-place ReLU"].build, "1 is a ReLU that works in place"),
    "own container": (CASES["residual"].build, "the model is a Named, not a chain of known layers"),
    "subclass": (CASES["subclass"].build, "0 is a OwnLinear, not a chain of known layers"),
    "attention": (CASES["attention"].build, "the model is a Named, not a chain"),
    "recurrent": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), "1 is a LSTM, not a chain"),
    "used twice": (tied_sequential, "2 is used more than once"),
    "one layer": (lambda: nn.Linear(4, 3), "the model is itself a layer"),
    "extended": (extended_by_user, "was extended by somebody else"),
    "frozen weight": (frozen_weight, "2 has a frozen weight"),
    "parametrized": (CASES["parametrized weight"].build, "0 is a ParametrizedLinear, not a chain"),
}


@pytest.mark.parametrize("build", [frozen_biases, AUTO["no bias"][0]])
@BATCHES
def test_engines_are_equal_whatever_is_frozen(build: Callable[[], nn.Module], B: int) -> None:
    torch.manual_seed(0)
    model, x, loss = build(), torch.randn(B, 4), token_loss(torch.randint(3, (B,)))
    hooks, backpack = (measure(model, x, loss, engine) for engine in ENGINES)
    for name in hooks.layers:
        for what in ("input_sum", "output_sum", "gradient"):
            assert torch.equal(hooks.total(name, what), backpack.total(name, what))
        assert hooks.layers[name].status == backpack.layers[name].status == "verified"


@pytest.mark.parametrize("case", AUTO)
def test_auto_chooses_what_is_safe_and_says_why(case: str) -> None:
    build, obstacle = AUTO[case]
    with GRNG(build()) as optimizer:
        engine, report = optimizer._capture.engine.name, str(optimizer.coverage())
    if obstacle is None:
        assert engine == "backpack"
        assert "engine: backpack (every module is one that BackPACK carries)" in report
    else:
        assert engine == "hooks"
        assert "engine: hooks (not BackPACK: " in report
        assert obstacle in report


@pytest.mark.parametrize("name", ["hooks", "backpack"])
def test_an_engine_can_be_asked_for(name: str) -> None:
    with GRNG(mlp(), curvature=Curvature(capture=name)) as optimizer:
        assert f"engine: {name} (asked for)" in str(optimizer.coverage())


@pytest.fixture
def without_backpack(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "backpack":
            raise ImportError(f"No module named {name!r}")
        return known(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.usefixtures("without_backpack")
def test_without_backpack() -> None:
    """Asked for, an error that says how to install it; otherwise hooks, and the report says so."""
    with pytest.raises(ImportError, match="pip install --no-deps backpack-for-pytorch"):
        GRNG(mlp(), curvature=Curvature(capture="backpack"))
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    with GRNG(model) as optimizer:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        report = optimizer.coverage()
    assert "engine: hooks (not BackPACK: it is not installed)" in str(report)
    assert {row.treatment for row in report} == {"kfac"}


# Models that make capture hard.


def alone(model: nn.Module, layer: str, x: Tensor, cotangent: Tensor) -> Tensor:
    """J_b^T v_b for every sample b, from a forward and a backward pass of its own: (B, k, n_out, n_in)."""
    own = own_parameters(model, layer)
    rows = []
    for b in range(len(x)):
        grads = torch.autograd.grad(model(x[b : b + 1]), list(own.values()), cotangent[b : b + 1])
        rows.append(matrices(module_of(model, layer), dict(zip(own, grads, strict=True))))
    return torch.stack(rows)


def expectation(case: str) -> AbstractContextManager[Any]:
    """A warning where a layer must fail; where none must, a warning is an error."""
    return pytest.warns(GRNGWarning, match="first-order fallback") if CASES[case].failed else nullcontext()


def check(case: str, model: nn.Module, x: Tensor, seen: Measured, cotangent: Tensor) -> None:
    failed = {name for name, layer in seen.layers.items() if layer.status == "failed"}
    assert failed == CASES[case].failed
    for name in seen.layers.keys() - failed:
        moves = any(p.grad is not None and bool(p.grad.any()) for p in own_parameters(model, name).values())
        assert seen.layers[name].status == ("verified" if moves else "pending")
    for name in seen.layers.keys() - failed:
        expected = alone(model, name, x, cotangent)
        assert torch.allclose(seen.total(name, "columns", len(x)), expected, rtol=1e-10, atol=1e-12)


@BATCHES
@pytest.mark.parametrize("case", CASES)
def test_hooks_measure_hard_models(case: str, B: int) -> None:
    """Every use of a layer is seen by the nested pass: with the columns of the exact Fisher as output gradients, the
    gradients of single samples are those of a pass of their own. What is not covered falls back with a warning."""
    model, x = CASES[case].build(), CASES[case].inputs(B)
    f = model(x).detach()
    y = torch.randint(f.shape[-1], (B,))
    with expectation(case):
        seen = measure(model, x, lambda f: cross_entropy(f, y), "hooks", fisher="exact")
    likelihood = seen.capture.fisher.likelihood
    columns = torch.stack(list(likelihood.columns(f, torch.ones_like(f))))
    check(case, model, x, seen, columns.sum(0))
    assert seen.batch.predictions == B
    if not CASES[case].reused:
        for name in seen.layers.keys() - CASES[case].failed:
            scores = torch.stack([alone(model, name, x, column) for column in columns])
            squares = seen.total(name, "squared_gradients")
            assert torch.allclose(squares, scores.square().sum((0, 1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_hooks_take_the_true_gradients_of_hard_models(case: str) -> None:
    model, x = CASES[case].build(), CASES[case].inputs(5)
    f = model(x).detach()
    y = torch.randint(f.shape[-1], (5,))
    attached = Attached(model, "hooks", fisher="empirical")
    work = lambda: cross_entropy(model(x), y).backward()  # noqa: E731
    with expectation(case):
        attached.step(work)
    seen = attached.step(work)  # failed layers are out of it now
    attached.capture.close()
    assert not {name for name, _ in seen.uses} & CASES[case].failed
    leaf = f.requires_grad_()
    check(case, model, x, seen, torch.autograd.grad(cross_entropy(leaf, y, reduction="sum"), leaf)[0])


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_of_a_hard_model_is_reported(case: str) -> None:
    """One row a trainable parameter; parameters without factors and layers that failed say why, and still train."""
    model, x = CASES[case].build(), CASES[case].inputs(6)
    y = torch.randint(model(x).shape[-1], (6,))
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with GRNG(model, curvature=Curvature(capture="hooks")) as optimizer:
        cross_entropy(model(x), y).backward()
        with expectation(case):
            optimizer.step()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows.keys() == trained.keys()
    for name, row in rows.items():
        layer = name.rpartition(".")[0]
        if name in CASES[case].unseen:
            assert (row.treatment, row.verified) == ("adamw", "-")
            assert row.reason.startswith(CASES[case].unseen[name])
        elif layer in CASES[case].failed:
            assert (row.treatment, row.verified) == ("adamw", "no")
            assert any(
                words in row.reason for words in ("its weights are used outside", "misses the gradient", "offsets")
            )
        else:
            assert (row.treatment, row.verified) == ("kfac", "yes")
        assert not torch.equal(model.get_parameter(name), trained[name])


def test_an_output_that_the_loss_does_not_see_falls_back_visibly() -> None:
    """Two heads with a loss each: the second is not reached from the output that is read, so nothing can be drawn."""

    def heads(m: nn.Module, x: Tensor) -> Any:
        h = m.trunk(x).tanh()
        return m.first(h), m.second(h)

    model = Named(heads, trunk=nn.Linear(4, 5), first=nn.Linear(5, 3), second=nn.Linear(5, 2))
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    with pytest.warns(GRNGWarning, match="second by the first-order fallback: .*, but not through the model's output"):
        seen = measure(model, x, lambda out: cross_entropy(out[0], y) + cross_entropy(out[1], y))
    assert {name: layer.status for name, layer in seen.layers.items()} == {
        "trunk": "verified",
        "first": "verified",
        "second": "failed",
    }


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("change", [lambda f: f.mul_(2), lambda f: f.add_(1), lambda f: f.tanh_()])
def test_an_output_modified_in_place_falls_back_visibly(change: Callable[[Tensor], Tensor], first: bool) -> None:
    """What the gradient belongs to is gone: nothing is read off it, and the mean over rows is taken for N."""
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model)
    if not first:
        attached.step(lambda: cross_entropy(model(x), y).backward())
    with pytest.warns(GRNGWarning, match="modified in place before the loss"):
        attached.step(lambda: cross_entropy(change(model(x)), y).backward())
    seen = attached.step(lambda: cross_entropy(change(model(x)), y).backward())
    attached.capture.close()
    assert {layer.status for layer in seen.layers.values()} == {"verified"}
    f = model(x).detach().requires_grad_()
    e = torch.autograd.grad(cross_entropy(change(f.clone()), y, reduction="sum"), f)[0]
    assert relative(seen.total("4", "output_sum")[0], e.T @ e) < 1e-12


def test_a_layer_that_gets_no_gradient_waits() -> None:
    """Unused in this step, or without a path to the loss: no verdict, no warning; seen later, it is verified then."""
    model = Named(lambda m, x: m.b(m.a(x) if m.open else x), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    attached = Attached(model)
    model.open = False
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    assert (seen.layers["a"].status, seen.layers["b"].status) == ("pending", "verified")
    model.open = True
    seen = attached.step(lambda: cross_entropy(model(x), y).backward())
    attached.capture.close()
    assert seen.layers["a"].status == "verified"
    assert {name for name, _ in seen.uses} == {"a", "b"}


def test_reentrant_checkpointing_falls_back_visibly() -> None:
    from torch.utils.checkpoint import checkpoint

    recomputed = lambda m, x: m.b(checkpoint(lambda h: m.a(h).tanh(), x, use_reentrant=True))  # noqa: E731
    model = Named(recomputed, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(3, (6,))
    with pytest.warns(GRNGWarning, match="a by the first-order fallback"):
        seen = measure(model, x, lambda f: cross_entropy(f, y))
    assert (seen.layers["a"].status, seen.layers["b"].status) == ("failed", "verified")


def test_asked_for_where_it_cannot_work_backpack_says_so() -> None:
    """BackPACK's own limits surface as an error in the user's forward pass; auto keeps away from them."""
    model, x = CASES["in-place ReLU"].build(), torch.randn(6, 4)
    with GRNG(model, curvature=Curvature(capture="backpack")), pytest.raises(RuntimeError, match="modified inplace"):
        model(x)


def test_layers_of_backpack_are_those_of_hooks() -> None:
    model = cnn()
    layers, _ = find_layers(model, set(model.parameters()))
    attached = Attached(model, "backpack")
    assert isinstance(attached.capture.engine, BackpackEngine)
    assert [layer.name for layer in layers] == list(attached.layers)
    attached.capture.close()
    gc.collect()
