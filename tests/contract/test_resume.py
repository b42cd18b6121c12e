"""Stopped after any step and resumed from its checkpoint, a run goes on as if it had not been, to the bit.

The variants of GRNG alone are in tests/optimizer/test_resume.py, rules over SGD and AdamW in
tests/regularizers/test_resume_steps.py; here are the baselines, and rules with clocks, draws and warm-ups of their own
over optimizers that draw labels, refresh every few steps, or both. One batch is not finite.
"""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grng.baselines import SOAP, Adan, Muon, SophiaG, SophiaH
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from grng import Curvature
from grng.preconditioners import kfac
from grng.regularizers import AGR, GNP, SAM, ClipNorm, Regularized

from ..optimizer.cases import METHODS, stream, tensors_of, train, vector

STEPS = 8
BAD = 4  # the batch that is not finite, where such a step is left out
COUNTS = ("refreshes", "skipped", "uncaptured", "failures")
CURVATURE = Curvature(stats_every=2, inverse_every=4, burn_in=1)


def chain() -> list[Any]:
    return [GNP(0.05, probability=0.7, seed=3), ClipNorm(0.5), AGR(warmup="lambda", warmup_steps=6)]


Make = Callable[[nn.Module], Optimizer]
BASELINES: dict[str, Make] = {
    "sgd": lambda m: SGD(m.parameters(), 0.05, momentum=0.9),
    "adamw": lambda m: AdamW(m.parameters(), 0.01),
    "nadamw": lambda m: NAdam(m.parameters(), 0.01, decoupled_weight_decay=True),
    "adan": lambda m: Adan(m.parameters(), 0.02, weight_decay=0.1),
    "adan clipped": lambda m: Adan(m.parameters(), 0.02, max_grad_norm=0.5),
    "sophia-g": lambda m: SophiaG(m, lr=0.01, interval=3),
    "sophia-h": lambda m: SophiaH(m.parameters(), lr=0.01, interval=3),
    "soap": lambda m: SOAP(m.parameters(), lr=0.01, interval=3),
    "muon": lambda m: Muon(m, lr=0.01),
}
RULED: dict[str, Make] = {
    "sophia-g with draws": lambda m: Regularized(SophiaG(m, lr=0.01, interval=3), chain(), model=m),
    "soap now and then": lambda m: Regularized(SOAP(m.parameters(), lr=0.01, interval=3), SAM(0.05, interval=3)),
    "adan warmed up": lambda m: Regularized(Adan(m.parameters(), 0.02), GNP(0.05, warmup="r", warmup_steps=5)),
    "muon clipped": lambda m: Regularized(Muon(m, lr=0.01), [ClipNorm(0.5), AGR(warmup="lambda", warmup_steps=6)]),
    **{
        f"{name} with draws": lambda m, name=name: METHODS[name](m, regularizer=chain(), curvature=CURVATURE)
        for name in ("kalman-vd", "kalman-kron", "ekfac", "reng-ggn", "ring-newton")
    },
    "kfac under a wrapper": lambda m: Regularized(METHODS["kfac"](m, curvature=CURVATURE), SAM(0.05, interval=3)),
}


def network(seed: int) -> nn.Sequential:
    """Dropout takes from the global generator."""
    torch.manual_seed(seed)
    parts = (nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return nn.Sequential(*parts)


class Run:
    """A model, its optimizer and its schedule, and the generator that both take from."""

    def __init__(self, make: Make, seed: int) -> None:
        self.model = network(seed)
        self.optimizer = make(self.model)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def steps(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for batch in batches:
            train(self.optimizer, self.model, [batch])
            self.schedule.step()

    def save(self) -> io.BytesIO:
        file, parts = io.BytesIO(), (self.model, self.optimizer, self.schedule)
        torch.save([*(part.state_dict() for part in parts), torch.get_rng_state()], file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        *saved, random = torch.load(file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.schedule), saved, strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(random)

    @property
    def found(self) -> dict[str, Any]:
        diagnostics = getattr(self.optimizer, "diagnostics", {})
        counts = {name: float(diagnostics[name]) for name in COUNTS if name in diagnostics}
        found = {"weights": vector(self.model), "counts": torch.tensor(list(counts.values()))}
        return {**tensors_of(self.optimizer), **found}


def check(make: Make, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Stop after each step and resume with another initialisation; what the straight run ended with."""
    straight, saved = Run(make, 1), []
    torch.manual_seed(5)
    for batch in batches:
        saved.append(straight.save())
        straight.steps([batch])
    expected = straight.found
    for k, file in enumerate(saved):
        resumed = Run(make, k + 9)
        resumed.load(file)
        resumed.steps(batches[k:])
        found = resumed.found
        assert found.keys() == expected.keys()
        assert not [name for name in found if not torch.equal(found[name], expected[name])], k
    return expected


@pytest.mark.parametrize("make", BASELINES.values(), ids=BASELINES.keys())
def test_baselines(make: Make) -> None:
    expected = check(make, stream(STEPS, dtype=torch.float32))
    assert expected["weights"].isfinite().all()


@pytest.mark.parametrize("make", RULED.values(), ids=RULED.keys())
def test_rules(make: Make) -> None:
    batches = stream(STEPS, dtype=torch.float32)
    batches[BAD][0][0, 0] = float("nan")
    found = check(make, batches)
    assert found["weights"].isfinite().all()
    assert 1 in found["counts"], "the bad step is counted once"


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ring"])
def test_after_a_failed_decomposition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases of the decomposition before stay, in the resumed run too, and the count of failures goes on."""
    whole, steps = kfac.eigh, list[int]()

    def failing(stack: Tensor) -> Any:
        w, U, failed = whole(stack)
        return w, U, torch.ones_like(failed) if steps[-1] in (4, 6) else failed

    monkeypatch.setattr(kfac, "eigh", failing)

    def make(model: nn.Module) -> Optimizer:
        optimizer = METHODS[name](model, curvature=Curvature(stats_every=2, inverse_every=2, burn_in=1))
        optimizer.register_step_pre_hook(lambda o, *_: steps.append(o._schedule.t))
        return optimizer

    assert check(make, stream(STEPS, dtype=torch.float32))["counts"][-1] > 0
