"""The protocol: equal search for everybody, then paired seeds at the best settings, everything interleaved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from grng.baselines import make_optimizer

from ..compare import environment, frozen_objects, source_hash, threads
from ..config import resolve_device
from ..errors import InputError, check_extra, choose
from ..names import merge, optimizer_of
from ..workloads import Task, Workload, all_workloads, find_workload
from .roster import contestant_of
from .search import Search
from .spaces import ROSTER, SETTERS, TARGETS_BY, Contestant
from .store import Store
from .targets import Target, best_trial, read_targets, target_of
from .trial import LR_WARMUP, Outcome, Trial, at_length, run_trial

TARGET_STUDY = 100  # of the search that sets the targets: other points than those of the scored one
WRITTEN_FROM = 2000  # steps: shorter runs write their files when they end
CLOCKS = ("seconds", "cpu_seconds", "step", "evaluations")
AIMS = ("time", "value")


class Listener:
    """Hears of every run; this one keeps quiet."""

    def begin(self, runs: int, skipped: int, outdated: int = 0, replaced: int = 0) -> None:
        """`runs` are planned, of which `skipped` are there already, and `outdated` of these made by other code;
        `replaced` of the others stand where one of other settings or length is."""

    def run_begins(self, trial: Trial) -> None: ...

    def progress(self, part: float) -> None: ...

    def run_ended(self, trial: Trial, outcome: Outcome) -> None: ...


@dataclass
class Job:
    """What is to be run, and where.

    Attributes:
        workloads, optimizers: by name.
        out: folder of the results; what is there is not run again.
        data: folder of the data sets.
        budget: times every workload's steps: below 1 for a first look, above for a published length.
        lr_warmup: part of every run over which the learning rate rises; from 1 on, steps.
        settings: by the optimizer's name, over what is found otherwise.
        clock: what "fastest" is measured by when the best setting is chosen.
        aim: "time": lengths are searched, and the best trial is the first at the target; "value": all run at the full
            length, and the best is that of the best value.
        targets: by workload; None: the frozen ones.
    """

    workloads: Sequence[str]
    optimizers: Sequence[str]
    out: Path
    data: Path | None = None
    device: str = "auto"
    threads: int = 1
    budget: float = 1.0
    lr_warmup: float = LR_WARMUP
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    clock: str = "seconds"
    aim: str = "time"
    targets: Mapping[str, Target] | None = None

    def __post_init__(self) -> None:
        check_extra()
        if not 0 < self.budget < math.inf:
            raise InputError(
                f"budget is {self.budget!r}: give the length as a multiple of the workloads' steps, above 0"
            )
        if not (0 <= self.lr_warmup < 1 or (self.lr_warmup >= 1 and float(self.lr_warmup).is_integer())):
            raise InputError(
                f"lr_warmup is {self.lr_warmup!r}: give a part of the run, from 0 to below 1, or whole steps"
            )
        if self.clock not in CLOCKS:
            raise InputError(f"unknown clock {self.clock!r}: choose one of {', '.join(CLOCKS)}")
        choose("aim", self.aim, AIMS)
        self.resolved = resolve_device(self.device)
        if type(self.threads) is not int or self.threads < 1:
            raise InputError(f"threads is {self.threads!r}: give a whole number of 1 or more")
        self.known = {name: find_workload(name) for name in self.workloads}
        asked = {name: contestant_of(name) for name in self.optimizers}
        self.contestants = list(asked.values())
        taken = [contestant.name for contestant in self.contestants]
        for name in taken:
            if taken.count(name) > 1:
                raise InputError(f"two of the optimizers are called {name!r}: rename one")
        for name in self.settings:
            if name not in asked and name not in taken:
                raise InputError(f"settings for {name!r}, which takes no part: choose {', '.join(taken)}")
        self.settings = {asked[name].name if name in asked else name: s for name, s in self.settings.items()}
        for name, settings in self.settings.items():
            horizon = settings.get("horizon", 1.0)
            if isinstance(horizon, bool) or not isinstance(horizon, int | float) or not 0 < horizon <= 1:
                raise InputError(
                    f"the horizon of {name!r} is {horizon!r}: give the part of the budget after which training ends, "
                    "above 0 and at most 1"
                )
        self.goals = dict(self.targets) if self.targets is not None else read_targets()
        self.store = Store(self.out)
        self.store.prepare()

    def target(self, workload: str) -> float | None:
        found = self.goals.get(workload)
        return found.value if found else None

    # The three phases.

    def tune(self, studies: int = 3, trials: int = 5, listener: Listener | None = None) -> list[Outcome]:
        """Search: trial by trial, study by study, workload by workload, everybody in turn."""
        plan = [(s, n) for s in range(studies) for n in range(trials)]
        searching = [contestant for contestant in self.contestants if contestant.name not in SETTERS]
        if not searching:
            raise InputError(
                f"{', '.join(self.optimizers)}: who set a target runs at the setting it did so with, and is not "
                "searched; leave out /target"
            )
        return self._search(plan, searching, listener or Listener(), 1.0 if self.aim == "value" else None)

    def run(self, seeds: int = 10, diagnose: bool = True, listener: Listener | None = None) -> list[Outcome]:
        """Every optimizer at its best setting, seed by seed: the same weights and batches for all."""
        outcomes = self.store.outcomes()
        with self._session(listener or Listener()) as make:
            plan = []
            for seed in range(seeds):
                for name in self.known:
                    for contestant in self.contestants:
                        if contestant.name in SETTERS and not self._set_target(contestant, name):
                            continue
                        settings, horizon = self.best(outcomes, name, contestant)
                        place: dict[str, Any] = {
                            "study": seed,
                            "budget": self.budget,
                            "lr_warmup": self.lr_warmup,
                            "diagnose": diagnose,
                        }
                        plan.append(Trial(name, contestant.name, settings, horizon, seed, "run", **place))
            return make(plan)

    def set_targets(self, trials: int = 20, seeds: int = 10, listener: Listener | None = None) -> dict[str, Target]:
        """Tune the rivals at the full horizon, rerun the best, and take the median of its best values."""
        rivals = [contestant_of(name) for name in TARGETS_BY]
        listener = listener or Listener()
        found = self._search([(TARGET_STUDY, n) for n in range(trials)], rivals, listener, horizon=1.0)
        targets = {}
        length = self.budget, self.lr_warmup
        with self._session(listener) as make:
            plans = {}
            for name in self.known:
                winner = best_trial([o for o in found if o.workload == name])
                if winner is None:
                    raise InputError(f"no trial of {', '.join(TARGETS_BY)} on {name!r} came to a value")
                settings = winner.trial["settings"]
                plans[name] = (
                    winner,
                    [
                        Trial(name, winner.optimizer, settings, 1.0, seed, "target", seed, 0, *length)
                        for seed in range(seeds)
                    ],
                )
            done = make([trial for _, plan in plans.values() for trial in plan])
            for name, (winner, _) in plans.items():
                targets[name] = target_of(winner, [o for o in done if o.workload == name], trials)
        return targets

    def best(self, outcomes: Sequence[Outcome], workload: str, contestant: Contestant) -> tuple[dict[str, Any], float]:
        """Settings and horizon for the seeds: the best of the search, else the defaults; given ones replace theirs.

        The best reached the target first; where none did, or where the aim is the value, it came to the best value.
        Trials of another length do not count. Who set the target has the settings that it did so with.
        """
        given, horizon = self._given(contestant)
        length = self.budget, self.lr_warmup
        if contestant.name in SETTERS:
            return merge(self.goals[workload].settings, given), horizon or 1.0
        tuned = [
            o
            for o in outcomes
            if o.workload == workload
            and o.optimizer == contestant.name
            and o.trial["phase"] == "tune"
            and o.trial["study"] != TARGET_STUDY
        ]
        alike = [o for o in tuned if (o.trial["budget"], o.trial["lr_warmup"]) == length]
        chosen = best_of(alike, self.target(workload) if self.aim == "time" else None, self.clock)
        if tuned and not alike and not given:
            raise InputError(
                f"{self.store.out} holds a search of {contestant.name!r} on {workload!r} at another length than budget "
                f"{self.budget:g} and lr_warmup {self.lr_warmup:g}: search at this one, or give settings"
            )
        if chosen is None:
            return merge(contestant.settings({})[0], given), horizon or 1.0
        return merge(dict(chosen.trial["settings"]), given), horizon or float(chosen.trial["horizon"])

    def _set_target(self, contestant: Contestant, workload: str) -> bool:
        """Whether the optimizer is the one whose setting set the workload's target."""
        return workload in self.goals and self.goals[workload].optimizer == SETTERS[contestant.name]

    def _given(self, contestant: Contestant) -> tuple[dict[str, Any], float | None]:
        """The user's settings of a contestant, and its horizon."""
        given = dict(self.settings.get(contestant.name, {}))
        horizon = given.pop("horizon", None)
        return given, None if horizon is None else float(horizon)

    def _search(
        self,
        plan: Sequence[tuple[int, int]],
        contestants: Sequence[Contestant],
        listener: Listener,
        horizon: float | None = None,
    ) -> list[Outcome]:
        search = Search(self.store.out)
        asked: list[tuple[Trial, Any, Any]] = []
        for study, number in plan:
            for name, workload in self.known.items():
                for contestant in contestants:
                    kept = search.study(name, contestant, study, workload.goal)
                    slot, point = search.point(kept, contestant, number)
                    settings, length = contestant.settings(point)
                    given, fixed = self._given(contestant)
                    settings = merge(settings, given)
                    seed = 10_000 + 100 * study + number
                    length = horizon or fixed or length
                    place: dict[str, Any] = {
                        "study": study,
                        "number": number,
                        "budget": self.budget,
                        "lr_warmup": self.lr_warmup,
                    }
                    trial = Trial(name, contestant.name, settings, length, seed, "tune", **place)
                    asked.append((trial, kept, slot))
        places = {trial.key: (kept, slot) for trial, kept, slot in asked}

        def told(trial: Trial, outcome: Outcome) -> None:
            kept, slot = places[trial.key]
            notes = {"status": outcome.status, "settings": str(dict(trial.settings)), "seconds": outcome.seconds}
            search.tell(kept, slot, outcome.best(), notes)

        with self._session(listener, told) as make:
            return make([trial for trial, _, _ in asked])

    @contextmanager
    def _session(
        self, listener: Listener, told: Callable[[Trial, Outcome], None] = lambda trial, outcome: None
    ) -> Iterator[Callable[[Sequence[Trial]], list[Outcome]]]:
        """Makes trials in order, skipping those that are there; one workload's data is loaded once."""
        tasks: dict[str, Task] = {}
        with threads(self.threads), frozen_objects():

            def make(plan: Sequence[Trial]) -> list[Outcome]:
                found = {trial.key: self.store.found(trial) for trial in plan}
                missing = [trial for trial in plan if not ended(found[trial.key])]
                there = []
                for trial in plan:
                    if trial not in missing and (outcome := found[trial.key]) is not None:
                        there.append(outcome)
                        told(trial, outcome)  # unless it was, before the job was killed
                outdated = sum(not self._code(o.optimizer).items() <= o.environment.items() for o in there)
                replaced = sum(self.store.holds_another(trial) for trial in missing)
                for trial in missing:
                    trial.rising(self.known[trial.workload])
                listener.begin(len(plan), len(there), outdated, replaced)
                wanted = [name for name in self.known if any(t.workload == name for t in missing)]
                check_data([self.known[name] for name in wanted], self.data)
                for name in wanted:
                    if name in tasks:
                        continue
                    tasks[name] = self.known[name].load(self.data, self.resolved)
                    self._check_buildable(tasks[name], [t for t in missing if t.workload == name])
                about = environment(self.resolved)
                for trial in missing:
                    listener.run_begins(trial)
                    workload = self.known[trial.workload]
                    steps = trial.steps(workload)

                    def evaluated(outcome: Outcome, trial: Trial = trial, steps: int = steps) -> None:
                        listener.progress(min(1.0, outcome.rows[-1]["step"] / steps))
                        self.store.write_rows(trial, outcome)

                    outcome = run_trial(
                        trial,
                        workload,
                        tasks[trial.workload],
                        self.resolved,
                        about | self._code(trial.optimizer),
                        evaluated if steps > WRITTEN_FROM else lambda outcome: None,
                        self.store.checkpoint(trial),
                    )
                    self.store.write(trial, outcome)
                    told(trial, outcome)
                    found[trial.key] = outcome
                    listener.run_ended(trial, outcome)
                return [made for trial in plan if (made := found[trial.key]) is not None]

            yield make

    def _code(self, optimizer: str) -> dict[str, str]:
        """What of the environment tells the code that its runs are made by."""
        own = next((c.code for c in self.contestants if c.name == optimizer), "")
        return {"source": source_hash()} | ({"own_source": own} if own else {})

    def _check_buildable(self, task: Task, plan: Sequence[Trial]) -> None:
        """Build every optimizer once, so that a wrong setting is known before hours of runs."""
        for trial in {trial.optimizer: trial for trial in plan}.values():
            with torch.random.fork_rng(devices=[]):
                model = task.model()
            try:
                settings = at_length(trial.settings, trial.steps(self.known[trial.workload]))
                optimizer = make_optimizer(optimizer_of(trial.optimizer), model, **settings)
            except (TypeError, ValueError, ImportError) as error:
                texts = [f"{key}={value!r}" for key, value in trial.settings.items() if isinstance(value, str)]
                hint = f" ({', '.join(texts)} is text: give a number if one is wanted)" if texts else ""
                raise InputError(
                    f"optimizer {trial.optimizer!r} cannot be built with {dict(trial.settings)}: {error}{hint}"
                ) from error
            getattr(optimizer, "close", lambda: None)()


def check_data(workloads: Sequence[Workload], data: Path | None) -> None:
    """Raise InputError, which tells all that is missing, unless what the workloads need is there."""
    if messages := [m for workload in workloads for m in dict.fromkeys(workload.lacks(data).values())]:
        raise InputError("; ".join(messages))


def ended(outcome: Outcome | None) -> bool:
    """Whether a run need not be made again; one that failed is tried again."""
    return outcome is not None and outcome.status != "failed"


def best_of(tuned: Sequence[Outcome], target: float | None, clock: str) -> Outcome | None:
    """The trial that reached the target first; where none did, that with the best value."""
    if target is not None:
        times = {i: o.time_to(target, clock) for i, o in enumerate(tuned)}
        fastest = min(times, key=lambda i: times[i], default=None)
        if fastest is not None and times[fastest] < math.inf:
            return tuned[fastest]
    return best_trial(tuned)


def workloads_of(tier: str | None, names: Sequence[str]) -> list[str]:
    """The workloads that are named, or those of a tier."""
    if tier is not None:
        choose("tier", tier, ("fast", "full"))
    if names:
        return [find_workload(name).name for name in names]
    return [name for name, workload in all_workloads().items() if tier is None or workload.tier == tier]


def loadable(names: Sequence[str], data: Path | None) -> tuple[list[str], dict[str, list[str]]]:
    """Those of a tier's workloads whose data are there, and what the others lack; raise InputError if none is left."""
    lacks = {name: find_workload(name).lacks(data) for name in names}
    if all(lacks.values()):
        check_data([find_workload(name) for name in names], data)
    return [name for name in names if not lacks[name]], {name: list(what) for name, what in lacks.items() if what}


DEFAULT_OPTIMIZERS = (*(contestant.name for contestant in ROSTER), *SETTERS)
