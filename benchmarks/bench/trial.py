"""One run of a workload: from its description to its record, written as it goes, continued where it was killed."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any
from warnings import warn

import torch
from grng.baselines import make_optimizer
from torch import Tensor, nn

from ..errors import InputError
from ..loop import (
    Stepper,
    Trace,
    closing,
    fit,
    forked,
    make_schedule,
    state_bytes,
    warm_up,
)
from ..names import optimizer_of
from ..records import downsample, fingerprint_of, hash_of
from ..statistics import at_target
from ..workloads import Task, Workload
from .diagnosis import Diagnosis

LR_WARMUP = 0.05  # part of a run over which the learning rate rises, alike for all
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Trial:
    """What decides a run.

    Attributes:
        workload, optimizer: by name; the optimizer's as in `grng compare`, OPTIMIZER[+REGULARIZER...][/LABEL].
        settings: that the optimizer is built with.
        horizon: part of the workload's budget after which the learning rate has decayed and the run ends.
        seed: of weights, batches and all else that is random.
        phase: "tune" or "run".
        study, number: its place in the search; of a run, the study is the seed.
        budget: times the workload's steps.
        lr_warmup: part of the run, from 1 on steps, over which the learning rate rises where there is a schedule.
        diagnose: measure gradients and sharpness beside the run.
    """

    workload: str
    optimizer: str
    settings: Mapping[str, Any]
    horizon: float = 1.0
    seed: int = 0
    phase: str = "run"
    study: int = 0
    number: int = 0
    budget: float = 1.0
    lr_warmup: float = LR_WARMUP
    diagnose: bool = False

    @property
    def key(self) -> str:
        """Hash of everything that decides what comes of it."""
        length = [self.horizon, self.budget, self.lr_warmup]
        return hash_of([self.workload, self.optimizer, dict(self.settings), *length, self.seed, self.phase])

    def steps(self, workload: Workload) -> int:
        return max(1, round(workload.steps * self.budget * self.horizon))

    def rising(self, workload: Workload) -> int:
        """Steps over which the learning rate rises; raise InputError where that leaves none."""
        steps = self.steps(workload)
        rising = round(self.lr_warmup * (steps if self.lr_warmup < 1 else 1)) if workload.schedule == "cosine" else 0
        if self.lr_warmup >= 1 and rising >= steps:
            raise InputError(
                f"lr_warmup is {self.lr_warmup:g} steps, and a run of {self.title} has {steps}: give fewer steps, a "
                "part of the run below 1, or a larger budget"
            )
        return rising

    @property
    def title(self) -> str:
        place = f"study {self.study}, trial {self.number}" if self.phase == "tune" else f"seed {self.seed}"
        return f"{self.workload}, {self.optimizer}, {place}"


@dataclass
class Outcome:
    """What came of a trial. Seconds, bytes; what is not finite is stored as null.

    Attributes:
        trial: its description.
        key: of the trial; a job that is resumed skips those it finds.
        environment: machine and versions.
        status: finished, diverged (the training loss was no longer finite), or failed (it raised).
        rows: one an evaluation: step, seconds, cpu_seconds, gradient evaluations, train_loss, and the validation's.
        test: metrics on the test set, measured once, in the end of a run; empty while tuning.
        step_seconds: median, mean and 99th percentile of a step, and the mean of its gradient (forward and backward,
            capture included) and of its update; the mean holds the refreshes that the median hides.
        curve: training loss of the steps, averaged down.
        diagnosis: measured beside the run where the trial asks for it.
    """

    trial: dict[str, Any]
    key: str
    environment: dict[str, Any]
    status: str = "finished"
    message: str = ""
    metric: str = ""
    goal: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gradient_evaluations: int = 0
    step_seconds: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    peak_memory: int | None = None
    state_bytes: int = 0
    init_hash: str = ""
    data: str = ""
    continued: int = 0
    diagnosis: dict[str, Any] = field(default_factory=dict)

    @property
    def workload(self) -> str:
        return str(self.trial["workload"])

    @property
    def optimizer(self) -> str:
        return str(self.trial["optimizer"])

    @property
    def seed(self) -> int:
        return int(self.trial["seed"])

    def values(self, metric: str) -> list[float]:
        """The metric at every evaluation, NaN where it was not finite."""
        return [math.nan if row.get(metric) is None else float(row[metric]) for row in self.rows]

    def best(self) -> float | None:
        """The best value of the workload's metric."""
        known = [value for value in self.values(self.metric) if not math.isnan(value)]
        return (max if self.goal == "max" else min)(known, default=None)

    def time_to(self, target: float, clock: str) -> float:
        """What `clock` showed when the target was first reached; inf if it never was.

        A run that failed reached nothing; one that diverged keeps what it reached before.
        """
        if self.status != "failed":
            for row, value in zip(self.rows, self.values(self.metric), strict=True):
                if at_target(value, target, self.goal):
                    return float(row[clock])
        return math.inf


def run_trial(
    trial: Trial,
    workload: Workload,
    task: Task,
    device: torch.device,
    environment: dict[str, Any],
    on_evaluation: Callable[[Outcome], None] = lambda outcome: None,
    checkpoint: Path | None = None,
) -> Outcome:
    """Make the run; what it raises is recorded as its failure. The global generators are left as they were."""
    outcome = Outcome(asdict(trial), trial.key, environment, metric=workload.metric, goal=workload.goal)
    outcome.trial["settings"] = dict(trial.settings)
    outcome.data = task.fingerprint
    with forked(device):
        try:
            _train(trial, workload, task, device, outcome, on_evaluation, checkpoint)
        except Exception as error:  # whatever an optimizer raises is a result
            outcome.status, outcome.message = "failed", f"{type(error).__name__}: {error}"
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return outcome


def _train(
    trial: Trial,
    workload: Workload,
    task: Task,
    device: torch.device,
    outcome: Outcome,
    on_evaluation: Callable[[Outcome], None],
    checkpoint: Path | None,
) -> None:
    steps = trial.steps(workload)
    every = min(workload.evaluate_every, steps)
    torch.manual_seed(trial.seed)
    model = task.model().to(device)
    outcome.parameters = sum(p.numel() for p in model.parameters())
    outcome.init_hash = fingerprint_of(*model.state_dict().values())
    settings = at_length(trial.settings, steps)
    make = lambda model: make_optimizer(optimizer_of(trial.optimizer), model, **settings)  # noqa: E731
    first = next(task.batches(trial.seed))
    warm_up(model, make, task.loss, first, workload.schedule, lambda model: task.evaluate(model, "validation"))
    torch.manual_seed(trial.seed)
    gc.collect()
    with closing(make(model)) as optimizer:
        stepper = Stepper(model, optimizer, task.loss)
        schedule = make_schedule(workload.schedule, optimizer, steps, trial.rising(workload))
        diagnosis = Diagnosis(task, device) if trial.diagnose else None
        keeper = Keeper(checkpoint, trial, model, stepper, schedule, device)
        trace = keeper.restore(outcome)
        batches = task.batches_from(trial.seed, len(trace.losses))
        keeper.restore_generators()

        def before_last() -> None:
            assert diagnosis
            with forked(device), unwatched(optimizer):
                diagnosis.before(model)

        def evaluated(trace: Trace) -> None:
            row = {
                "step": len(trace.losses),
                "seconds": trace.seconds,
                "cpu_seconds": trace.cpu_seconds,
                "evaluations": stepper.evaluations,
                "train_loss": fmean(trace.losses[-every:]),
            }
            with forked(device):
                outcome.rows.append({**row, **task.evaluate(model, "validation")})
                if diagnosis:
                    with unwatched(optimizer):
                        outcome.rows[-1] |= diagnosis(model)
            keeper.save(trace, outcome)
            on_evaluation(outcome)

        watched = before_last if diagnosis else None
        trace = fit(stepper, schedule, batches, steps, every, device, evaluated, trace, watched)
        if trace.diverged:
            outcome.status = "diverged"
            outcome.message = f"the training loss was not finite by step {len(trace.losses)}"
        outcome.peak_memory, outcome.state_bytes = trace.peak_memory, state_bytes(optimizer)
        outcome.steps, outcome.gradient_evaluations = len(trace.losses), stepper.evaluations
        outcome.seconds, outcome.cpu_seconds = trace.seconds, trace.cpu_seconds
        outcome.step_seconds = split_of(trace)
        places = [float(step) for step in range(1, len(trace.losses) + 1)]
        outcome.curve = {"step": downsample(places, 150), "loss": downsample(trace.losses, 150)}
        if trial.phase == "run" and not trace.diverged:
            outcome.test = task.evaluate(model, "test") | task.final(model)
            if diagnosis:
                with unwatched(optimizer):
                    outcome.diagnosis = diagnosis.sharpness(model)


def at_length(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The settings of a run of so many steps: a regularizer's `warmup_part` is its `warmup_steps` as a part of them.

    >>> at_length({"lr": 0.1, "gnp": {"warmup": "zero", "warmup_part": 0.1}}, 200)
    {'lr': 0.1, 'gnp': {'warmup': 'zero', 'warmup_steps': 20}}
    """
    found = dict(settings)
    for name, value in settings.items():
        if isinstance(value, Mapping) and "warmup_part" in value:
            own = dict(value)
            part = own.pop("warmup_part")
            found[name] = own | {"warmup_steps": max(1, round(part * steps))}
    return found


def unwatched(optimizer: Any) -> AbstractContextManager[Any]:
    """What is measured within does not reach an optimizer with hooks in the model: neither batches nor random numbers
    of its own."""
    found: AbstractContextManager[Any] = getattr(optimizer, "paused", nullcontext)()
    return found


def split_of(trace: Trace) -> dict[str, float]:
    """What a step took."""
    steps = trace.step_seconds
    p99 = quantiles(steps, n=100, method="inclusive")[-1] if len(steps) > 1 else steps[0]
    gradient = trace.gradient_seconds / len(steps)
    return {
        "median": median(steps),
        "mean": fmean(steps),
        "p99": p99,
        "gradient": gradient,
        "update": fmean(steps) - gradient,
    }


def followed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The environment of a run that went on in another one than it began in: it is neither's alone.

    >>> followed({"torch": "2.12", "threads": 1}, {"torch": "2.13", "threads": 1})
    {'torch': '2.12, then 2.13', 'threads': 1}
    """
    pairs = {name: (before.get(name), now.get(name)) for name in before | now}
    return {name: b if a in (b, None) else f"{a}, then {b}" for name, (a, b) in pairs.items()}


class Keeper:
    """The checkpoint of a run that takes longer than a minute, so that a killed one goes on where it was."""

    def __init__(
        self,
        path: Path | None,
        trial: Trial,
        model: nn.Module,
        stepper: Stepper,
        schedule: Any,
        device: torch.device,
    ) -> None:
        self.path, self.trial, self.model, self.stepper, self.schedule = path, trial, model, stepper, schedule
        self.device, self.saved = device, time.monotonic()
        self.generators: dict[str, Tensor] = {}

    def save(self, trace: Trace, outcome: Outcome) -> None:
        if self.path is None or time.monotonic() - self.saved < CHECKPOINT_SECONDS:
            return
        state = {
            "key": self.trial.key,
            "model": self.model.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "evaluations": self.stepper.evaluations,
            "trace": asdict(trace),
            "rows": outcome.rows,
            "continued": outcome.continued,
            "environment": outcome.environment,
            "generators": {"cpu": torch.get_rng_state()}
            | ({"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}),
        }
        partial_file = self.path.with_suffix(".partial")
        torch.save(state, partial_file)
        partial_file.replace(self.path)
        self.saved = time.monotonic()

    def restore(self, outcome: Outcome) -> Trace:
        """The trace so far: empty without a checkpoint of this very trial that can be read."""
        if self.path is None or not self.path.exists():
            return Trace()
        # Onto the host, where torch's optimizers keep their counts; everything else is copied to where it belongs.
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # of every kind, as the damage has it
            warn(f"{self.path} cannot be read ({type(error).__name__}): the run begins anew", stacklevel=2)
            return Trace()
        if state["key"] != self.trial.key:
            return Trace()
        self.model.load_state_dict(state["model"])
        self.stepper.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.stepper.before = state["evaluations"] - self.stepper.evaluations  # some count on from their state
        outcome.rows, outcome.continued = state["rows"], state["continued"] + 1
        outcome.environment = followed(state["environment"], outcome.environment)
        self.generators = state["generators"]
        return Trace(**state["trace"])

    def restore_generators(self) -> None:
        if "cpu" in self.generators:
            torch.set_rng_state(self.generators["cpu"])
        if "cuda" in self.generators:
            torch.cuda.set_rng_state(self.generators["cuda"], self.device)
