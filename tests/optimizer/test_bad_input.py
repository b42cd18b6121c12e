"""What is refused says what was wrong, what would be right, and what to do; what is not finite does no harm."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from grng import GRNG, Curvature, GRNGWarning
from grng.preconditioners import EKFAC, KFAC, Kalman, make_preconditioner
from grng.regularizers import GNP

from .cases import (
    ONE_PASS,
    Method,
    closure_of,
    live_hooks,
    methods,
    mixed,
    mlp,
    stream,
    tensors_of,
    train,
    vector,
)

NAN, INF = float("nan"), float("inf")

# What is called with what, and what its error must say: the value, and the valid ones or the remedy.
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"variant": "rong"}, r"variant 'rong'.*ring, reng, kalman, kfac, ekfac.*Did you mean 'ring'"),
    ({"variant": "sgd"}, r"variant 'sgd'.*ring, reng, kalman, kfac, ekfac"),
    ({"preconditioner": "kfca"}, r"'kfca'.*diagonal.*ekfac.*identity.*kalman.*kfac.*Did you mean 'kfac'"),
    ({"variant": "reng", "mode": "triple"}, r"mode 'triple'.*double, finite, ggn"),
    ({"variant": "kfac", "mode": "double"}, r"mode must be None for variant 'kfac'.*'double'.*reng"),
    ({"norm": "group"}, r"norm 'group'.*global, layer"),
    ({"fallback": "sgd"}, r"fallback 'sgd'.*adamw"),
    ({"lr": -0.1}, r"lr must be a finite number >= 0.*-0\.1"),
    ({"lr": NAN}, r"lr must be a finite number >= 0.*nan"),
    ({"lr": INF}, r"lr must be a finite number >= 0.*inf"),
    ({"lr": "fast"}, r"lr must be a finite number >= 0.*'fast'"),
    ({"lr": torch.tensor(-1.0)}, r"lr must be a finite number >= 0.*-1"),
    ({"fallback_lr": -1e-3}, r"fallback_lr must be a finite number >= 0.*-0\.001"),
    ({"fallback_lr": NAN}, r"fallback_lr must be a finite number >= 0.*nan"),
    ({"weight_decay": -0.5}, r"weight_decay must be a finite number >= 0.*-0\.5"),
    ({"weight_decay": NAN}, r"weight_decay must be a finite number >= 0.*nan"),
    ({"momentum": -0.1}, r"momentum must be in \[0, 1\).*-0\.1"),
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\).*1\.0"),
    ({"momentum": NAN}, r"momentum must be in \[0, 1\).*nan"),
    ({"momentum": "high"}, r"momentum must be in \[0, 1\).*'high'"),
    ({"rho": -2.0}, r'rho must be a finite number >= 0, or "auto".*-2\.0'),
    ({"rho": NAN}, r'rho must be a finite number >= 0, or "auto".*nan'),
    ({"rho": "big"}, r'rho must be a finite number >= 0, or "auto".*\'big\''),
    ({"rho": 0.1, "strength": 0.2}, r"strength must be None with rho=0\.1.*0\.2"),
    ({"variant": "kfac", "strength": 0.2}, r"strength must be None with rho=0\.0.*0\.2"),
    ({"strength": -1.0}, r"strength must be a finite number >= 0.*-1\.0"),
    ({"variant": "kfac", "rho": 0.5}, r"rho must be 0 for variant 'kfac'.*0\.5.*variant='ring'"),
    ({"variant": "ekfac", "rho": "auto"}, r"rho must be 0 for variant 'ekfac'.*'auto'"),
    ({"curvature": {"fisher": "mc"}}, r"curvature must be a grng\.Curvature"),
    (
        {"preconditioner": Kalman(columns="grouped"), "curvature": Curvature(fisher="exact")},
        r"columns must be .*sample.*'grouped'.*random sign",
    ),
    ({"variant": "ring", "curvature": Curvature(noise="scalar")}, r"noise must be .*auto.*'scalar'.*Only kalman"),
    (
        {"variant": "kalman", "curvature": Curvature(noise="full"), "regularizer": GNP()},
        r"noise must be .*'full'.*passes would not be weighted",
    ),
    ({"params": []}, r"params must be at least one parameter.*nothing trainable"),
    ({"params": [nn.Parameter(torch.ones(2, 7))]}, r"params must be parameters of the model.*\(2, 7\)"),
    ({"params": [{"params": [nn.Parameter(torch.ones(2, 7))]}]}, r"params must be parameters of the model.*\(2, 7\)"),
]


@pytest.mark.parametrize(("wrong", "message"), SETTINGS, ids=[str(s)[:50] for s, _ in SETTINGS])
def test_settings(wrong: dict[str, Any], message: str) -> None:
    """Each is refused before anything is attached to the model."""
    model = mlp(4, 5, 3)
    with pytest.raises(ValueError, match=message):
        GRNG(model, **wrong)
    assert live_hooks(model) == 0
    GRNG(model).close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, r"lr must be a finite number >= 0.*-1\.0"),
        ("weight_decay", NAN, r"weight_decay must be a finite number >= 0.*nan"),
        ("momentum", 1.5, r"momentum must be in \[0, 1\).*1\.5"),
        ("fallback_lr", -1.0, r"fallback_lr must be a finite number >= 0"),
    ],
)
def test_settings_of_a_group(name: str, value: float, message: str) -> None:
    model = mlp(4, 5, 3)
    with pytest.raises(ValueError, match=message):
        GRNG(model, params=[{"params": model[0].parameters()}, {"params": model[2].parameters(), name: value}])
    assert live_hooks(model) == 0


CURVATURE: list[tuple[dict[str, Any], str]] = [
    ({"fisher": "true"}, r"fisher 'true'.*mc, empirical, exact"),
    ({"likelihood": "poisson"}, r"likelihood 'poisson'.*auto, categorical, bernoulli, gaussian"),
    ({"capture": "backpak"}, r"capture 'backpak'.*auto, backpack, hooks.*Did you mean 'backpack'"),
    ({"sharing": "sum"}, r"sharing 'sum'.*expand, reduce"),
    ({"ema": 1.5}, r"ema must be in \[0, 1\].*1\.5"),
    ({"ema": NAN}, r"ema must be in \[0, 1\].*nan"),
    ({"max_dim": 0}, r"max_dim must be a whole number, at least 1, or None.*0"),
    ({"max_dim": 512.0}, r"max_dim must be a whole number, at least 1, or None.*512\.0"),
    ({"stats_every": 0}, r"stats_every must be a whole number of steps, at least 1.*0"),
    ({"stats_every": 2.5}, r"stats_every must be a whole number of steps, at least 1.*2\.5"),
    ({"inverse_every": -1}, r"inverse_every must be a whole number of steps, at least 1.*-1"),
    ({"burn_in": -1}, r"burn_in must be a whole number of steps, at least 0.*-1"),
    ({"floor": -0.1}, r"floor must be a finite number >= 0, or None.*-0\.1"),
    ({"floor": 0.1, "damping": 0.2}, r"floor must be None with damping=0\.2.*0\.1"),
    ({"damping": 0.0}, r"damping must be a finite number > 0, or None.*0\.0"),
    ({"damping": NAN}, r"damping must be a finite number > 0, or None.*nan"),
    ({"kl_clip": -1.0}, r"kl_clip must be a finite number > 0, or None.*-1\.0"),
    ({"kl_clip": "small"}, r'kl_clip must be .*or "auto".*\'small\''),
    ({"step_clip": 0.0}, r"step_clip must be a finite number > 0, or None.*0\.0"),
    ({"relative_to": "block"}, r"relative_to 'block'.*auto, model, layer"),
    ({"loss_scale": 0}, r'loss_scale must be .*or "sum".*0'),
    ({"dtype": torch.bfloat16}, r"dtype must be torch\.float32, torch\.float64 or None.*bfloat16"),
]


@pytest.mark.parametrize(("wrong", "message"), CURVATURE, ids=[str(s) for s, _ in CURVATURE])
def test_curvature_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curvature(**wrong)


PRECONDITIONERS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: KFAC(solver="lu"), ValueError, r"solver 'lu'.*eigen, factored, newton"),  # type: ignore[arg-type]
    (lambda: Kalman(p0=0.0), ValueError, r"p0 must be a finite number > 0.*0\.0"),
    (lambda: Kalman(gamma=1.0), ValueError, r"gamma must be in \[0, 1\).*1\.0"),
    (lambda: Kalman(groups=0), ValueError, r"groups must be a whole number, at least 1.*0"),
    (lambda: Kalman(projection="diag"), ValueError, r"projection 'diag'.*vd, fd"),  # type: ignore[arg-type]
    (lambda: Kalman(p_max=NAN), ValueError, r"p_max must be .*nan"),
    (lambda: Kalman(covariance="full"), ValueError, r"covariance 'full'.*diag, kron"),  # type: ignore[arg-type]
    (lambda: Kalman(columns="samples"), ValueError, r"columns 'samples'.*sample"),  # type: ignore[arg-type]
    (lambda: Kalman(gain="both"), ValueError, r"gain 'both'.*trace, exact"),  # type: ignore[arg-type]
    (lambda: Kalman(penalty="rings"), ValueError, r"penalty 'rings'.*Did you mean 'ring'"),  # type: ignore[arg-type]
    (lambda: Kalman(process_noise=-1.0), ValueError, r"process_noise must be a finite number >= 0.*-1\.0"),
    (lambda: Kalman(covariance="kron", projection="fd"), ValueError, r"projection must be .*'fd'.*KL"),
    (lambda: Curvature(noise=0.0), ValueError, r"noise must be a finite number > 0.*0\.0"),
    (lambda: Curvature(noise="vector"), ValueError, r"noise must be .*full.*'vector'"),  # type: ignore[arg-type]
    (lambda: Curvature(draws=0), ValueError, r"draws must be a whole number, at least 1.*0"),
    (lambda: make_preconditioner(EKFAC(), solver="newton"), TypeError, r"settings \['solver'\].*'ekfac'"),
    (lambda: make_preconditioner("ekfac", solver="newton"), TypeError, r"solver"),
]


@pytest.mark.parametrize(("make", "kind", "message"), PRECONDITIONERS, ids=range(len(PRECONDITIONERS)))
def test_preconditioner_settings(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def frozen() -> nn.Module:
    model = mlp(4, 3)
    return model.requires_grad_(False)


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))


MODELS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: [nn.Parameter(torch.ones(2))], TypeError, r"model must be a torch\.nn\.Module.*list.*params="),
    (lambda: mlp(4, 3).parameters(), TypeError, r"model must be a torch\.nn\.Module.*generator"),
    (nn.Tanh, ValueError, r"model must be a module with parameters.*'Tanh'"),
    (frozen, ValueError, r"model must be one with a trainable parameter.*All are frozen"),
    (sparse, ValueError, r"0\.sparse must be False.*True.*Sparse gradients"),
]


@pytest.mark.parametrize(("make", "kind", "message"), MODELS, ids=["list", "generator", "empty", "frozen", "sparse"])
def test_models(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        GRNG(make())


def test_params_that_is_a_tensor() -> None:
    model = mlp(4, 3)
    with pytest.raises(TypeError, match=r"params must be an iterable.*is a tensor"):
        GRNG(model, params=model[0].weight)


def test_frozen_parameters_given() -> None:
    model = frozen()
    with pytest.raises(ValueError, match=r"params must be at least one parameter with requires_grad=True"):
        GRNG(model, params=list(model.parameters()))


def test_parameter_in_two_groups() -> None:
    model = mlp(4, 3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GRNG(model, params=[{"params": model[0].weight}, {"params": list(model.parameters())}])
    assert live_hooks(model) == 0


@pytest.mark.parametrize("second", ["same", "part", "whole"])
def test_two_optimizers_on_one_model(second: str) -> None:
    """Also where one is on a part of the other's model; the first goes on unharmed."""
    whole = nn.Sequential(mlp(4, 5), mlp(5, 3))
    first = whole[0] if second == "whole" else whole
    other = {"same": whole, "part": whole[1], "whole": whole}[second]
    with GRNG(first, "kfac", params=whole[0].parameters()) as optimizer:
        with pytest.raises(RuntimeError, match=r"another GRNG optimizer is attached.*close\(\).*groups"):
            GRNG(other)
        before = vector(whole[0])
        train(optimizer, whole, stream(1))
        assert not torch.equal(vector(whole[0]), before)
    GRNG(other).close()


@methods(*ONE_PASS)
def test_step_before_backward(method: Method) -> None:
    model = mlp(4, 5, 3)
    before = vector(model)
    with method(model) as optimizer:
        with pytest.raises(RuntimeError, match=r"no gradient: call loss\.backward\(\) first"):
            optimizer.step()
        train(optimizer, model, stream(1))
        optimizer.zero_grad()
        after = vector(model)
        with pytest.raises(RuntimeError, match=r"no gradient: call loss\.backward\(\) first"):
            optimizer.step()
        assert torch.equal(vector(model), after)
    assert not torch.equal(before, after)


@methods(*ONE_PASS)
def test_step_after_close(method: Method) -> None:
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    optimizer = method(model)
    train(optimizer, model, [(x, y)])
    optimizer.close()
    before = vector(model)
    cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"was closed.*build GRNG\(model, \.\.\.\) anew"):
        optimizer.step()
    assert torch.equal(vector(model), before)


LATER: list[tuple[Callable[[nn.Module], dict[str, Any]], str]] = [
    (lambda model: {"params": [nn.Parameter(torch.ones(2))]}, r"params must be parameters of the model.*\(2,\)"),
    (
        lambda model: {"params": model[2].requires_grad_(False).parameters()},
        r"at least one parameter with requires_grad",
    ),
    (lambda model: {"params": model[0].parameters()}, r"more than one parameter group"),
    (lambda model: {"params": model[2].parameters(), "lr": -1.0}, r"lr must be a finite number >= 0.*-1\.0"),
    (lambda model: {"params": model[2].parameters(), "momentum": 1.0}, r"momentum must be in \[0, 1\).*1\.0"),
    (lambda model: {"params": model[2].parameters(), "regularizer": 3}, r"'regularizer' must be a dict.*3"),
]


@pytest.mark.parametrize(("group", "message"), LATER, ids=range(len(LATER)))
def test_group_added_later(group: Callable[[nn.Module], dict[str, Any]], message: str) -> None:
    """Refused, the optimizer is as it was."""
    model = mlp(4, 5, 3)
    with GRNG(model, params=model[0].parameters()) as optimizer:
        wrong = group(model)
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 1
        assert [row.parameter for row in optimizer.coverage()] == ["0.weight", "0.bias"]


@methods()
def test_closures_that_are_wrong(method: Method) -> None:
    """None for a loss, or no backward pass: refused, and the parameters stay."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    before = vector(model)
    with method(model) as optimizer:
        with pytest.raises(RuntimeError, match=r"closure returned None: it must return the loss"):
            optimizer.step(lambda: cross_entropy(model(x), y).backward())
        assert torch.equal(vector(model), before)
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"no gradient: call loss\.backward\(\) first"):
            optimizer.step(lambda: cross_entropy(model(x), y))
        assert torch.equal(vector(model), before)


@methods("reng-double", "reng-finite")
def test_reng_without_closure(method: Method) -> None:
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    with method(model) as optimizer:
        cross_entropy(model(x), y).backward()
        with pytest.raises(RuntimeError, match=rf"'{method.settings['mode']}'.*step\(closure\).*mode='ggn'"):
            optimizer.step()


@pytest.mark.parametrize("preconditioner", ["identity", "diagonal", "kalman"])
def test_ggn_needs_a_curvature_product(preconditioner: str) -> None:
    model = mlp(4, 5, 3)
    with (
        GRNG(model, "reng", mode="ggn", preconditioner=preconditioner) as optimizer,
        pytest.raises(TypeError, match=rf"'{preconditioner}' has no curvature product.*kfac or ekfac"),
    ):
        train(optimizer, model, stream(1))


@pytest.mark.parametrize("copy", [pickle.dumps, deepcopy], ids=["pickle", "deepcopy"])
def test_copying_the_optimizer(copy: Callable[[Any], Any]) -> None:
    with GRNG(mlp(4, 3)) as optimizer, pytest.raises(TypeError, match=r"cannot be copied or pickled.*state_dict\(\)"):
        copy(optimizer)


# Gradients that are not finite.


def spoiled(batch: tuple[Tensor, Tensor], value: float) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x.clone()
    x[0, 0] = value
    return x, y


@pytest.mark.parametrize(("at", "value"), [(0, NAN), (0, INF), (1, NAN), (2, INF)])
@methods()
def test_batch_that_is_not_finite(method: Method, at: int, value: float) -> None:
    """The step is skipped and counted, parameters and state stay to the bit, and training goes on as if the batch had
    not been there, but for the labels that were drawn for it."""
    batches = stream(4)
    fisher = "mc" if method.kalman else "exact"
    curvature = Curvature(fisher=fisher, stats_every=1, burn_in=0)
    models = mixed(), mixed()
    with method(models[0], curvature=curvature, momentum=0.5, weight_decay=0.1) as optimizer:
        for i, batch in enumerate(batches):
            if i == at:
                before, weights = tensors_of(optimizer), vector(models[0])
                drawn = optimizer._capture.fisher.generator(torch.device("cpu")).get_state()
                train(optimizer, models[0], [spoiled(batch, value)])
                optimizer._capture.fisher.generator(torch.device("cpu")).set_state(drawn)
                after = tensors_of(optimizer)
                changed = [k for k in before if not before[k].allclose(after[k], rtol=0, atol=0, equal_nan=True)]
                counters = {"grng_steps", "regularizer_steps", "grng_counts", "grng_decomposed"}
                # An infinite input may leave an output that is finite, and can be read.
                passes = {"fisher_rng", "likelihood", "layer_status", "loss_scale"}
                assert {k.split(".", 1)[1] for k in changed} <= counters | passes
                assert before.keys() == after.keys()
                assert torch.equal(vector(models[0]), weights)
                assert optimizer.diagnostics["skipped"].item() == 1
                assert not optimizer.diagnostics["grad_norm"].isfinite()
            train(optimizer, models[0], [batch])
        assert optimizer.diagnostics["skipped"].item() == 1
        assert vector(models[0]).isfinite().all()
        assert all(value.isfinite().all() for value in tensors_of(optimizer).values())
    with method(models[1], curvature=curvature, momentum=0.5, weight_decay=0.1) as optimizer:
        train(optimizer, models[1], batches)
    assert torch.equal(vector(models[0]), vector(models[1]))


@methods("ring", "ring-newton", "kalman-vd", "ekfac")
def test_first_batch_not_finite_under_a_sparse_schedule(method: Method) -> None:
    """Nothing was measured by it: the next step measures, and moves the layers."""
    model, batches = mlp(4, 5, 3), stream(2)
    with method(model, curvature=Curvature(stats_every=50, burn_in=0)) as optimizer:
        train(optimizer, model, [spoiled(batches[0], NAN)])
        before = vector(model)
        train(optimizer, model, batches[1:])
        assert not (vector(model) == before).any()
        assert optimizer.diagnostics["refreshes"].item() == 1


@methods("ring", "kalman-vd", "ekfac", "ring-diagonal")
def test_one_gradient_not_finite(method: Method) -> None:
    """One infinite element, put there after the backward pass, skips the step for every parameter."""
    model, batches = mixed(), stream(3)
    with method(model, momentum=0.5) as optimizer:
        train(optimizer, model, batches[:1])
        x, y = batches[1]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        assert model[0].bias.grad is not None
        model[0].bias.grad[0] = INF
        before = vector(model)
        optimizer.step()
        assert torch.equal(vector(model), before)
        assert optimizer.diagnostics["skipped"].item() == 1
        train(optimizer, model, batches[2:])
        assert not torch.equal(vector(model), before)
        assert vector(model).isfinite().all()


@methods(*ONE_PASS)
def test_gradient_of_zero(method: Method) -> None:
    """A loss that does not depend on the parameters: nothing moves, nothing breaks."""
    model, (x, y) = mlp(4, 5, 3), stream(1)[0]
    before = vector(model)
    with method(model) as optimizer:
        (model(x) * 0).sum().backward()
        optimizer.step()
        assert torch.equal(vector(model), before)
        train(optimizer, model, [(x, y)] * 2)
        assert vector(model).isfinite().all()
        assert not torch.equal(vector(model), before)


# Labels that do not fit.

ONEHOT = torch.eye(3).double()
MISFITS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor], str]] = {
    "squares as categorical": ("categorical", lambda f, y: mse_loss(f, ONEHOT[y]), "declared likelihood 'categorical'"),
    "squares as bernoulli": ("bernoulli", lambda f, y: mse_loss(f, ONEHOT[y]), "declared likelihood 'bernoulli'"),
    "soft labels": ("categorical", lambda f, y: cross_entropy(f, ONEHOT[y] * 0.7 + 0.1), "hard labels"),
    "smoothed labels": ("auto", lambda f, y: cross_entropy(f, y, label_smoothing=0.1), "label smoothing"),
    "soft bits": (
        "bernoulli",
        lambda f, y: binary_cross_entropy_with_logits(f, ONEHOT[y] * 0.7 + 0.1),
        "declared likelihood 'bernoulli'",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
@methods("ring", "ekfac", "kalman-vd")
def test_labels_that_do_not_fit(method: Method, case: str) -> None:
    """A warning says what is done instead, the coverage report too, and training goes on."""
    likelihood, loss, message = MISFITS[case]
    model, batch = mlp(4, 5, 3), stream(1)[0]
    with method(model, curvature=Curvature(likelihood=likelihood)) as optimizer:  # type: ignore[arg-type]
        with pytest.warns(GRNGWarning, match=rf"empirical Fisher: .*{message}"):
            losses = train(optimizer, model, [batch], loss)
        losses += train(optimizer, model, [batch] * 10, loss)
        assert "empirical Fisher instead" in str(optimizer.coverage())
    assert losses[-1] < losses[0]


def test_loss_scale_that_the_gradient_contradicts() -> None:
    model = mlp(4, 5, 3)
    with (
        GRNG(model, "kfac", curvature=Curvature(loss_scale=3.0)) as optimizer,
        pytest.raises(ValueError, match=r"loss_scale must be 1, which the output.*3\.0.*loss_scale=None"),
    ):
        train(optimizer, model, stream(1))


ABANDONED = {
    "closure raises": pytest.raises(KeyError, match="mine"),
    "closure returns None": pytest.raises(RuntimeError, match="returned None"),
    "zero_grad": None,
}


@pytest.mark.parametrize("how", ABANDONED)
@methods()
def test_abandoned_backward_pass(method: Method, how: str) -> None:
    """What was measured for a step that did not come is not counted at the next one."""
    batches, ends = stream(3), []
    for abandon in (False, True):
        model = mlp(4, 5, 3)
        fisher = "mc" if method.kalman else "exact"
        with method(model, curvature=Curvature(fisher=fisher)) as optimizer:
            train(optimizer, model, batches[:1])
            if abandon:
                before = vector(model)
                drawn = tensors_of(optimizer)["0.fisher_rng"]
                plain = closure_of(optimizer, model, batches[1:2])

                def closure(plain: Callable[[], Tensor] = plain) -> None:
                    plain()
                    if how == "closure raises":
                        raise KeyError("mine")

                if how == "zero_grad":
                    plain()
                else:
                    with ABANDONED[how]:
                        optimizer.step(closure)
                assert torch.equal(vector(model), before)
                optimizer._capture.fisher.generator(torch.device("cpu")).set_state(drawn)
            train(optimizer, model, batches[2:])
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_a_preconditioner_belongs_to_one_optimizer() -> None:
    """Where shapes agree, as in an ensemble, both would write into the same factors."""
    own = KFAC()
    first = GRNG(mlp(4, 3), "ring", preconditioner=own)
    with pytest.raises(ValueError, match="preconditioner must be an instance of its own for every optimizer"):
        GRNG(mlp(4, 3), "ring", preconditioner=own)
    first.close()
    GRNG(mlp(4, 3), "ring", preconditioner=own).close()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("idle", [0, 1])
def test_a_group_without_gradients(idle: int, momentum: float) -> None:
    """Frozen, or of a branch that takes no part: it stays where it is, and the others move."""
    model = mlp(4, 5, 3)
    layers = [model[0], model[2]]
    groups = [{"params": list(layer.parameters())} for layer in layers]
    optimizer = GRNG(model, "ring", params=groups, weight_decay=1e-3, momentum=momentum)
    layers[idle].requires_grad_(False)
    before = [vector(layer) for layer in layers]
    train(optimizer, model, stream(3))
    assert torch.equal(before[idle], vector(layers[idle]))
    assert not torch.equal(before[1 - idle], vector(layers[1 - idle]))


class Bare(nn.Module):
    """A model without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_damping_by_the_loss_without_layers() -> None:
    model = Bare()
    optimizer = GRNG(model, "kfac", curvature=Curvature(damping="levenberg-marquardt"))
    for batch in stream(11):
        optimizer.step(closure_of(optimizer, model, [batch]))
    assert torch.isfinite(vector(model)).all()


@pytest.mark.parametrize("fixed", ["rho and floor", "rho", "nothing"])
def test_no_look_at_values_in_later_steps(fixed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each makes the host wait."""
    settings = {
        "rho and floor": {"rho": 0.01, "curvature": Curvature(damping=0.1)},
        "rho": {"rho": 0.01},
        "nothing": {},
    }[fixed]
    model = mlp(4, 5, 3)
    optimizer = GRNG(model, "kalman", **settings)  # type: ignore[arg-type]
    train(optimizer, model, stream(12))
    looked = []
    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, plain=plain, name=name: looked.append(name) or plain(self))
    for x, y in stream(5):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    monkeypatch.undo()
    assert looked == []
