"""Two processes: gradients of displaced weights under DistributedDataParallel."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from grng.regularizers import GNP, Regularized

from ..optimizer.cases import mlp, stream, vector
from ..processes import together

RULES: dict[str, dict[str, Any]] = {
    "synchronised": {},
    "own": {"sync": False},
    "hybrid": {"probability": 0.5, "sync": False},
}
STEPS = 4


def parts_of(rank: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4]) for x, y in stream(STEPS)]


def worker(rank: int, folder: Path) -> dict[str, Tensor]:
    found = {}
    for name, settings in RULES.items():
        model = DistributedDataParallel(mlp(4, 5, 3))
        optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.1), GNP(0.3, **settings), model=model)
        for batch in parts_of(rank):
            step(optimizer, model, *batch)
        found[name] = vector(model)
    return found


def step(optimizer: Regularized, model: nn.Module, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_hand(rule: GNP) -> Tensor:
    """Each rank's own GNP gradient, averaged."""
    model = mlp(4, 5, 3)
    params = list(model.parameters())

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model(x), y), params)])

    for t, batches in enumerate(zip(parts_of(0), parts_of(1), strict=True)):
        w, total = vector(model), torch.zeros(())
        for batch in batches:
            g = gradient(*batch)
            if rule.acts(t):
                nn.utils.vector_to_parameters(w + rule.r * g / g.norm(), params)
                g = (1 - rule.weight) * g + rule.weight * gradient(*batch)
                nn.utils.vector_to_parameters(w.clone(), params)
            total = total + g / 2
        nn.utils.vector_to_parameters(w - 0.1 * total, params)
    return vector(model)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What both processes ended with."""
    return together(worker, 2, tmp_path_factory.mktemp("ranks"), __name__)


@pytest.mark.parametrize("name", RULES)
def test_ranks_agree_to_the_bit(ends: list[dict[str, Tensor]], name: str) -> None:
    assert torch.equal(ends[0][name], ends[1][name])


def test_synchronised_is_one_process_on_the_joint_batch(ends: list[dict[str, Tensor]]) -> None:
    model = mlp(4, 5, 3)
    optimizer = Regularized(torch.optim.SGD(model.parameters(), lr=0.1), GNP(0.3))
    for x, y in stream(STEPS):
        step(optimizer, model, x, y)
    assert torch.allclose(ends[0]["synchronised"], vector(model), atol=1e-12)


@pytest.mark.parametrize("name", ["own", "hybrid"])
def test_each_process_displaces_by_its_own_gradient(ends: list[dict[str, Tensor]], name: str) -> None:
    assert torch.allclose(ends[0][name], by_hand(GNP(0.3, **RULES[name])), atol=1e-12)
    assert not torch.allclose(ends[0][name], ends[0]["synchronised"], atol=1e-6)
