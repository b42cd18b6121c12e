"""Layers that are frozen and unfrozen while the optimizer lives: nothing of it is silent."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from grng import GRNG, Curvature, GRNGWarning

from .cases import METHODS, Method, methods, mixed, stream, tensors_of, train, vector

MESSAGE = r"does not train 0\.weight, 0\.bias, frozen when it was built: call add_param_group.*close\(\).*anew"


def partly_frozen() -> nn.Sequential:
    model = mixed()
    model[0].requires_grad_(False)
    return model


def found(optimizer: GRNG, model: nn.Module, batches: list[Any]) -> list[str]:
    """The warnings of these steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, model, batches)
    return [str(warning.message) for warning in caught if issubclass(warning.category, GRNGWarning)]


@methods()
def test_unfrozen_is_said_once(method: Method) -> None:
    """At the next step with statistics, and what the optimizer trains goes on as if nothing had been said."""
    model = partly_frozen()
    before = [p.detach().clone() for p in model[0].parameters()]
    with method(model, curvature=Curvature(stats_every=4, burn_in=0)) as optimizer:
        assert not found(optimizer, model, stream(2))
        model[0].requires_grad_(True)
        # Only the Kalman filter measures at the third step.
        assert len(found(optimizer, model, stream(1))) == (1 if method.kalman else 0)
        if not method.kalman:
            train(optimizer, model, stream(1))
            with pytest.warns(GRNGWarning, match=MESSAGE):
                train(optimizer, model, stream(1))
        assert not found(optimizer, model, stream(4))
        assert all(torch.equal(p, old) for p, old in zip(model[0].parameters(), before, strict=True))
        assert "0.weight" not in [row.parameter for row in optimizer.coverage()]


@methods()
def test_unfrozen_and_added(method: Method) -> None:
    """The remedy: trained at once by the fallback, under settings of its own, and said so by the coverage report."""
    model = partly_frozen()
    with method(model, lr=0.05, fallback_lr=0.01) as optimizer:
        train(optimizer, model, stream(2))
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters(), "fallback_lr": 0.02})
        rows = {row.parameter: row for row in optimizer.coverage()}
        for name in ("0.weight", "0.bias"):
            assert rows[name].treatment == "adamw"
            assert rows[name].reason == "added after the optimizer was built"
        before = model[0].weight.detach().clone()
        assert not found(optimizer, model, stream(1))
        # Adam's first step is its rate, element by element.
        assert (model[0].weight - before).abs().flatten().tolist() == pytest.approx([0.02] * 16, rel=1e-3)
        losses = train(optimizer, model, stream(1) * 5)
        assert losses[-1] < losses[0]


@methods("ring", "kalman-vd", "reng-double")
def test_resume_with_a_group_added_later(method: Method) -> None:
    """A checkpoint comes back, to the bit, into an optimizer whose groups were made in the same order."""
    ends, batches = [], stream(6)
    for stop in (False, True):
        model = partly_frozen()
        optimizer = method(model)
        train(optimizer, model, batches[:2])
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters()})
        train(optimizer, model, batches[2:4])
        if stop:
            saved, weights = optimizer.state_dict(), model.state_dict()
            optimizer.close()
            model = partly_frozen()
            optimizer = method(model)
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters()})
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved)
        train(optimizer, model, batches[4:])
        ends.append((vector(model), tensors_of(optimizer)))
        optimizer.close()
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1].keys() == ends[1][1].keys()


@pytest.mark.parametrize("engine", ["hooks", "backpack"])
@methods("ring", "ekfac", "kalman-vd", "kalman-kron", "reng-finite")
def test_frozen_and_unfrozen_again(method: Method, engine: Any) -> None:
    """A layer that rests for some steps keeps still, the others go on; then it moves again, by its factors."""
    if engine == "backpack" and method.name == "reng-finite":
        engine = "hooks"  # BackPACK takes one pass a step
    model = mixed()
    with method(model, curvature=Curvature(capture=engine)) as optimizer:
        train(optimizer, model, stream(2))
        model[3].requires_grad_(False)
        before = vector(model[3]), vector(model)
        train(optimizer, model, stream(3))
        assert torch.equal(vector(model[3]), before[0])
        assert not torch.equal(vector(model), before[1])
        model[3].requires_grad_(True)
        losses = train(optimizer, model, stream(1) * 5)
        assert not torch.equal(vector(model[3]), before[0])
        assert losses[-1] < losses[0]
        assert {row.treatment for row in optimizer.coverage() if row.parameter.startswith("3")} == {
            optimizer._preconditioner.name
        }


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@methods()
def test_one_half_frozen_is_said_once(method: Method, frozen: str) -> None:
    """Curvature holds weight and bias together; that of one alone is another, but for element-wise methods."""
    model = mixed()
    with method(model) as optimizer:
        assert not found(optimizer, model, stream(2))
        model[0].get_parameter(frozen).requires_grad_(False)
        said = found(optimizer, model, stream(3))
        assert len(said) == (0 if method.name in ("ring-diagonal", "ring-identity") else 1)
        assert all(line.startswith("GRNG takes weight and bias of 0 for one matrix") for line in said)


def test_one_half_frozen_of_a_layer_that_was_given_up() -> None:
    """Its parameters follow the fallback, each by itself."""
    model = mixed()
    with GRNG(model, "kfac") as optimizer:
        train(optimizer, model, stream(2))
        optimizer._layers[0].status = "failed"
        model[0].bias.requires_grad_(False)
        assert not found(optimizer, model, stream(3))


def test_no_cost_where_nothing_is_frozen() -> None:
    """What is looked at in a step is what was frozen when the optimizer was built."""
    with METHODS["ring"](mixed()) as optimizer:
        assert optimizer._frozen == []
    with METHODS["ring"](partly_frozen()) as optimizer:
        assert len(optimizer._frozen) == 2
