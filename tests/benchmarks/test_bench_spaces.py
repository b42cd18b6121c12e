"""What is searched: scales, the roster, settings."""

import itertools
import math

import pytest
import torch
from grng.baselines import make_optimizer
from grng.benchmarks.bench import ROSTER, Contestant, Dimension
from grng.benchmarks.bench.search import DIMENSIONS
from grng.benchmarks.bench.spaces import BETAS, HORIZON, OURS, TARGETS_BY, TWINS, find_contestant
from grng.benchmarks.errors import InputError
from grng.benchmarks.loop import Stepper
from grng.benchmarks.names import check_name, optimizer_of
from torch.nn import functional as F

from .bench_tools import net

SPACES = sorted({d for c in ROSTER for d in c.space}, key=str)
NAMES = [c.name for c in ROSTER]


@pytest.mark.parametrize("dimension", SPACES, ids=str)
def test_every_scale_rises_from_low_to_high(dimension):
    values = [dimension.at(u / 400) for u in range(401)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert (values[0], values[-1]) == (0.0 if dimension.zero else dimension.low, dimension.high)
    assert dimension.at(dimension.zero) == dimension.low


@pytest.mark.parametrize(("u", "value"), [(0.0, 0.01), (0.25, 0.1), (0.5, 1.0), (1.0, 100.0)])
def test_the_scale_is_logarithmic(u, value):
    assert Dimension("x", 0.01, 100.0).at(u) == pytest.approx(value, rel=1e-12)


def test_values_have_four_digits():
    """What is stored with seven is what was run with."""
    value = Dimension("x", 0.01, 1.0).at(1 / 3)
    assert value == float(f"{value:.4g}")
    assert value == pytest.approx(0.01 ** (2 / 3), rel=1e-3)


def test_the_roster():
    assert len(set(NAMES)) == len(NAMES)
    for contestant in ROSTER:
        check_name(contestant.name)
        names = [d.name for d in contestant.space]
        assert names[:2] == ["lr", "horizon"]
        assert contestant.space[1] is HORIZON
        assert len(set(names)) == len(names) == DIMENSIONS - (contestant.name == "kalman/rho=0")
    assert find_contestant("kalman/rho=0").fixed == {"strength": 0.0}
    assert (HORIZON.low, HORIZON.high) == (0.15, 1.0)
    assert {*TWINS, *TWINS.values(), *TARGETS_BY} <= set(NAMES)
    assert set(OURS) == set(TWINS)
    with pytest.raises(InputError, match=r"'sgd' is not in the roster: choose among ring, .*MODULE:CLASS"):
        find_contestant("sgd")


@pytest.mark.parametrize("own", [own for own in TWINS if not own.startswith("kalman")])
def test_twins_search_alike(own):
    a, b = find_contestant(own).space, find_contestant(TWINS[own]).space
    assert a[:3] == b[:3]
    assert (a[3].name, a[3].low, a[3].high) == ("strength", b[3].low, b[3].high)
    assert [d.name for d in b] == ["lr", "horizon", "weight_decay", "floor"]


def test_the_kalman_twin():
    assert find_contestant("kalman").space[:3] == find_contestant("kalman/rho=0").space
    assert find_contestant("kalman").space[3].name == "strength"


@pytest.mark.parametrize("name", OURS)
def test_a_space_of_ours_holds_the_case_without_regularization(name):
    found = [d for d in find_contestant(name).space if d.zero]
    assert [d.name for d in found] == ["strength"]
    assert [found[0].at(u) for u in (0.0, 0.19)] == [0.0, 0.0]


def test_betas_are_those_of_the_optimizers():
    for name in ("adan", "sophia-g", "soap", "adamw", "nadamw"):
        default = make_optimizer(name, net()).defaults["betas"]
        point = {"1-beta1": 1 - default[0]}
        expected = pytest.approx(tuple(default))
        assert Contestant(f"{name}+clip/x", ()).settings(point)[0]["betas"] == expected
    assert set(BETAS) <= {optimizer_of(n) for n in NAMES}


@pytest.mark.parametrize(
    ("contestant", "point", "settings", "horizon"),
    [
        (find_contestant("adamw"), {}, {}, 1.0),
        (find_contestant("adamw"), {"horizon": 0.3}, {}, 0.3),
        (find_contestant("adamw"), {"1-beta1": 0.123}, {"betas": (0.877, 0.999)}, 1.0),
        (find_contestant("adan"), {"1-beta1": 0.02}, {"betas": (0.98, 0.92, 0.99)}, 1.0),
        (find_contestant("soap"), {"1-beta1": 0.3}, {"betas": (0.7, 0.95)}, 1.0),
        (find_contestant("sgd-momentum"), {"1-momentum": 0.1}, {"momentum": 0.9, "nesterov": True}, 1.0),
        (find_contestant("muon"), {"1-momentum": 0.02}, {"momentum": 0.98}, 1.0),
        (find_contestant("adamw+sam"), {"lr": 0.1, "sam.r": 0.05}, {"lr": 0.1, "sam": {"r": 0.05}}, 1.0),
        (find_contestant("kalman/rho=0"), {"gamma": 0.5}, {"gamma": 0.5, "strength": 0.0}, 1.0),
        (find_contestant("reng/ggn"), {"strength": 0.1}, {"strength": 0.1, "mode": "ggn"}, 1.0),
        (find_contestant("ring/ekfac"), {"strength": 0.1}, {"strength": 0.1, "preconditioner": "ekfac"}, 1.0),
        (Contestant("adamw", (), {"lr": 0.5, "gnp.r": 1}), {"lr": 0.1}, {"lr": 0.5, "gnp": {"r": 1}}, 1.0),
    ],
)
def test_settings(contestant, point, settings, horizon):
    found = contestant.settings(point)
    assert found == (settings, horizon)


@pytest.mark.parametrize("u", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("contestant", ROSTER, ids=lambda c: c.name)
def test_everybody_trains_at_the_corners_and_in_the_middle(contestant, u):
    settings, horizon = contestant.settings({d.name: d.at(u) for d in contestant.space})
    assert horizon == pytest.approx(0.15 ** (1 - u), rel=1e-3)
    torch.manual_seed(0)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(optimizer_of(contestant.name), model, **settings)
    step = Stepper(model, optimizer, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    losses = [step((torch.randn(16, 5), torch.arange(16) % 3)) for _ in range(2)]  # SOAP does nothing in its first
    getattr(optimizer, "close", lambda: None)()
    assert all(map(math.isfinite, losses))
    assert step.evaluations >= 2
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
