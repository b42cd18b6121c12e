"""A run that is stopped after k steps and resumed from its checkpoint equals one that was not, to the bit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grng import GRNG
from grng.regularizers import AGR, GNP, SAM, ClipNorm, Explicit, Regularized

from ..optimizer.cases import closure_of, stream, vector

STEPS = 8
BASES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "sgd": lambda m, rule: Regularized(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), rule),
    "adamw": lambda m, rule: Regularized(torch.optim.AdamW(m.parameters(), lr=0.01), rule),
    "ring inside": lambda m, rule: GRNG(m, "ring", regularizer=rule),
    "ring outside": lambda m, rule: Regularized(GRNG(m, "ring"), rule),
}
RULES = {
    "gnp": lambda: GNP(0.05),
    "r": lambda: GNP(0.05, warmup="r", warmup_steps=5),
    "lambda": lambda: GNP(0.05, warmup="lambda", warmup_steps=5),
    "zero": lambda: GNP(0.05, warmup="zero", warmup_steps=4),
    "probability": lambda: GNP(0.05, probability=0.5),
    "interval": lambda: SAM(0.05, interval=3),
    "explicit": lambda: Explicit(0.05, "double"),
    "chain": lambda: [GNP(0.05, probability=0.7, seed=3), ClipNorm(0.5), AGR(warmup="lambda", warmup_steps=6)],
}


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.Sequential(*parts).double()


def run(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
    for batch in stream(STEPS)[first:last]:
        optimizer.step(closure_of(optimizer, model, [batch]))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_resume(base: Any, rule: Any) -> None:
    model = network()
    optimizer, saved = base(model, rule()), []
    torch.manual_seed(5)
    for k in range(STEPS):
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
        saved.append(file)
        run(optimizer, model, k, k + 1)
    end = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    for k in range(1, STEPS):
        saved[k].seek(0)
        weights, state, random = torch.load(saved[k], weights_only=True)
        other = network()
        resumed = base(other, rule())
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        torch.set_rng_state(random)
        run(resumed, other, k, STEPS)
        assert all(torch.equal(value, end[name]) for name, value in other.state_dict().items()), k
    assert not torch.equal(vector(network()), vector(model))


def test_rules_differ() -> None:
    """Every rule of the table leads somewhere else: none is lost on the way."""
    ends = []
    for rule in RULES.values():
        model = network()
        torch.manual_seed(5)
        run(BASES["sgd"](model, rule()), model, 0, STEPS)
        ends.append(vector(model))
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
