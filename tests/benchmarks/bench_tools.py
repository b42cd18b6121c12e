"""Small workloads and made-up outcomes for the tests of the benchmark."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from grng.benchmarks.bench import Outcome, Target, Trial, run_trial
from grng.benchmarks.bench.protocol import Listener
from grng.benchmarks.compare import environment
from grng.benchmarks.workloads import Supervised, Workload
from grng.benchmarks.workloads.base import classification
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")
CLOCKED = ("seconds", "cpu_seconds")  # what differs from run to run of the same trial


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@dataclass
class Small(Supervised):
    """Three classes of points; keeps the weights of every run and what it was asked to evaluate."""

    weights: list[torch.Tensor] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def evaluate(self, model, split):
        self.asked.append(split)
        return super().evaluate(model, split)

    def final(self, model):
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return {"extra": 1.0}


def small_task(kind: type[Small] = Small, noise: float = 0.0) -> Small:
    """With noise, every batch takes from the global generator."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 5, generator=generator)
    y = (x @ torch.randn(5, 3, generator=generator)).argmax(-1)
    splits: Any = {
        part: (x[a:b], y[a:b]) for part, a, b in (("train", 0, 64), ("validation", 64, 96), ("test", 96, 128))
    }
    prepare = (lambda x: x + noise * torch.randn_like(x)) if noise else None
    return kind(splits, net, F.cross_entropy, classification, 16, prepare, "small")


def small_workload(name: str = "small", task: Small | None = None, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": name,
        "about": "points",
        "tier": "fast",
        "load": lambda root, device: task or small_task(),
        "batch_size": 16,
        "steps": 6,
        "evaluate_every": 3,
        "metric": "accuracy",
        "goal": "max",
    }
    return Workload(**(options | changes))


def run(trial: Trial, task: Small | None = None, *rest: Any, source: str = "", **changes: Any) -> Outcome:
    task = task or small_task()
    about = environment(CPU) | {"source": source}
    return run_trial(trial, small_workload(task=task, **changes), task, CPU, about, *rest)


def generators() -> list[Any]:
    """The states of the global ones."""
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]


class Ear(Listener):
    """Writes down what it hears, and interrupts before or after a run, as a user would."""

    def __init__(self, before: int | None = None, after: int | None = None) -> None:
        self.before, self.after = before, after
        self.titles: list[str] = []
        self.counts: list[tuple[int, int]] = []

    def begin(self, runs, skipped, outdated=0, replaced=0):
        self.counts.append((runs, skipped))
        self.outdated, self.replaced = outdated, replaced

    def run_begins(self, trial):
        if len(self.titles) == self.before:
            raise KeyboardInterrupt

    def run_ended(self, trial, outcome):
        self.titles.append(trial.title)
        if len(self.titles) == self.after:
            raise KeyboardInterrupt


def made(
    workload: str,
    optimizer: str,
    values: Sequence[float | None],
    *,
    seed: int = 0,
    phase: str = "run",
    study: int = 0,
    number: int = 0,
    pace: float = 1.0,
    goal: str = "max",
    status: str = "finished",
    settings: dict[str, Any] | None = None,
    horizon: float = 1.0,
    **further: Any,
) -> Outcome:
    """An outcome with one evaluation every 10 steps of `pace` / 10 seconds."""
    study = seed if phase == "run" else study
    trial = Trial(workload, optimizer, settings or {"lr": 0.1}, horizon, seed, phase, study, number)
    rows: list[dict[str, Any]] = [
        {
            "step": 10 * i,
            "seconds": pace * i,
            "cpu_seconds": 2 * pace * i,
            "evaluations": 20 * i,
            "train_loss": 1.0,
            "accuracy": value,
        }
        for i, value in enumerate(values, 1)
    ]
    split = {"median": pace / 10, "mean": pace / 10, "p99": pace / 5, "gradient": pace / 20, "update": pace / 20}
    known = [v for v in values if v is not None]
    options: dict[str, Any] = {
        "status": status,
        "metric": "accuracy",
        "goal": goal,
        "rows": rows,
        "test": {"accuracy": known[-1], "loss": 0.5, "brier": 0.25} if known and phase == "run" else {},
        "steps": 10 * len(values),
        "seconds": pace * len(values),
        "cpu_seconds": 2 * pace * len(values),
        "gradient_evaluations": 20 * len(values),
        "step_seconds": split,
        "curve": {"step": [5.0, 10.0], "loss": [2.0, 1.0]},
        "state_bytes": 1000,
    }
    about = {"torch": "2", "device": "cpu", "processor": "some", "threads": 1}
    return Outcome(asdict(trial), trial.key, about, **(options | further))


def target(workload: str, value: float = 0.9, goal: str = "max") -> Target:
    return Target(workload, value, "accuracy", goal, "adamw", {"lr": 0.1, "betas": [0.9, 0.99]}, 20, 10, "made up")
