"""One spelling for every optimizer."""

import doctest
import importlib
import pkgutil

import grng.benchmarks
import pytest
import torch
from grng.baselines import OPTIMIZERS, make_optimizer
from torch import nn, optim

DIRECT = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=3e-3, weight_decay=0.01),
    "nadamw": lambda p: optim.NAdam(p, lr=3e-3, weight_decay=0.01, decoupled_weight_decay=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, alpha=0.99),
}
VARIANTS = ("ring", "reng", "kalman", "kfac", "ekfac")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def two_steps(model: nn.Module, optimizer: optim.Optimizer) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x, y = torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if getattr(optimizer, "requires_closure", False):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_the_table_is_complete():
    assert set(OPTIMIZERS) == {*VARIANTS, *DIRECT}


@pytest.mark.parametrize("name", DIRECT)
def test_a_door_steps_as_the_torch_optimizer(name):
    ours, theirs = net(), net()
    got = two_steps(ours, make_optimizer(name, ours))
    wanted = two_steps(theirs, DIRECT[name](theirs.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(got[0], next(net().parameters()))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_steps_as_grng(name):
    grng = pytest.importorskip("grng.optimizer")
    ours, theirs = net(), net()
    with make_optimizer(name, ours, lr=0.01) as first, grng.GRNG(theirs, variant=name, lr=0.01) as second:
        torch.manual_seed(2)
        got = two_steps(ours, first)
        torch.manual_seed(2)
        wanted = two_steps(theirs, second)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(got[0], next(net().parameters()))


def test_settings_replace_defaults():
    optimizer = make_optimizer("sgd-momentum", net(), lr=0.2, nesterov=True)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (
        0.2,
        0.9,
        True,
    )


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in make_optimizer("adamw", model).param_groups) == 2


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'adamx'.*ring.*adamw"):
        make_optimizer("adamx", net())


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(grng.benchmarks.__path__)])
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"grng.benchmarks.{name}")).failed == 0
