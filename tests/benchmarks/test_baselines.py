"""One spelling for every optimizer."""

import pytest
import torch
from grng.baselines import OPTIMIZERS, SOAP, Adan, make_optimizer, parts_of
from torch import nn, optim

from grng.regularizers import AGR, GNP, REGULARIZERS, SAM, ClipNorm, Regularized

DIRECT = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=3e-3, weight_decay=0.01),
    "nadamw": lambda p: optim.NAdam(p, lr=3e-3, weight_decay=0.01, decoupled_weight_decay=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, alpha=0.99),
    "adan": lambda p: Adan(p, lr=0.02, weight_decay=0.02),
    "soap": lambda p: SOAP(p, lr=3e-3, weight_decay=0.01),
}
OF_A_MODEL = ("sophia-g", "sophia-h", "muon")  # tests/baselines
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
    assert set(OPTIMIZERS) == {*VARIANTS, *DIRECT, *OF_A_MODEL}


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


CHAINS = {
    "adamw+gnp": ({"gnp": {"r": 0.2}}, [GNP(r=0.2)]),
    "sgd+sam": ({}, [SAM()]),
    "adan+clip+agr": ({"clip": {"max_norm": 0.1}}, [ClipNorm(0.1), AGR()]),
    "adan+agr+clip": ({"clip": {"max_norm": 0.1}}, [AGR(), ClipNorm(0.1)]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_wraps_the_optimizer_in_its_order(name):
    given, wanted = CHAINS[name]
    ours, theirs = net(), net()
    optimizer = make_optimizer(name, ours, lr=0.01, **given)
    assert isinstance(optimizer, Regularized)
    assert list(optimizer.regularizers) == wanted
    base = make_optimizer(parts_of(name)[0], theirs, lr=0.01)
    got = two_steps(ours, optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(got, two_steps(theirs, Regularized(base, wanted, model=theirs)), strict=True)
    )
    plain = net()
    assert not torch.equal(got[0], two_steps(plain, make_optimizer(parts_of(name)[0], plain, lr=0.01))[0])


@pytest.mark.parametrize("regularizers", [[SAM(r=0.1)], [ClipNorm(0.1), AGR()]])
def test_a_variant_takes_the_chain_itself(regularizers):
    name = "ring+sam" if len(regularizers) == 1 else "ring+clip+agr"
    given = {"sam": {"r": 0.1}} if len(regularizers) == 1 else {"clip": {"max_norm": 0.1}}
    grng = pytest.importorskip("grng.optimizer")
    ours, theirs = net(), net()
    with make_optimizer(name, ours, **given) as first:
        torch.manual_seed(2)
        got = two_steps(ours, first)
    with grng.GRNG(theirs, variant="ring", regularizer=regularizers) as second:
        torch.manual_seed(2)
        wanted = two_steps(theirs, second)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("base", ["adan", "kfac"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_every_regularizer_goes_with_every_kind_of_optimizer(base, regularizer):
    model = net()
    optimizer = make_optimizer(f"{base}+{regularizer}", model)
    assert all(p.isfinite().all() for p in two_steps(model, optimizer))
    getattr(optimizer, "close", lambda: None)()


BAD_NAMES = [
    ("adamx+gnp", {}, r"unknown optimizer 'adamx' in 'adamx\+gnp': choose one of ring, .*adan, .* \+gnp, .*\+clip"),
    ("adamw+gmp", {}, r"unknown regularizer 'gmp' in 'adamw\+gmp': choose one of ring, .*adan, .* \+gnp, .*\+clip"),
    ("adamw+", {}, "unknown regularizer ''"),
    ("gnp", {}, "unknown optimizer 'gnp'"),
    ("adamw+clip+clip", {}, "'clip' stands twice"),
    ("adamw", {"gnp": {"r": 0.1}}, r"settings for the regularizer 'gnp', which 'adamw' lacks: name it adamw\+gnp"),
    ("adamw+sam", {"gnp": {"r": 0.1}}, r"which 'adamw\+sam' lacks"),
    ("adamw+gnp", {"gnp": 0.1}, r"the settings of 'gnp' are 0\.1: give a mapping"),
    ("adamw+gnp", {"gnp": {"r": -1.0}}, "r must be"),
    ("adamw+clip+gnp", {}, "first"),
]


@pytest.mark.parametrize(("name", "given", "message"), BAD_NAMES)
def test_bad_chains_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, net(), **given)


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
