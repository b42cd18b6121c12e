"""What the runs in a folder come to: numbers only; the report and the figures show them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, median, stdev
from typing import Any

from ..errors import InputError
from ..names import base_of, ordered
from ..records import hash_of
from ..statistics import MOST, Ratio, interquartile_mean, paired_lead, paired_ratio, present, scores, study_time
from .protocol import TARGET_STUDY
from .spaces import OURS, SETTERS, TWINS
from .targets import Target
from .trial import Outcome

ABLATIONS = ("kalman/rho=0",)  # neither ours nor a rival


@dataclass
class Line:
    """One optimizer on one workload, over its seeds. Times are by the report's clock.

    Attributes:
        settings, horizon: that it ran with.
        times: to the target, seed by seed; inf where it was missed.
        steps_to, evaluations_to: the medians of steps and of gradient evaluations to the target.
        best, test: mean and deviation over the seeds of the best validation value and of the test's.
        ends: the test's value by seed, with its sign turned where smaller is better; -inf where the run came to none.
        scored, tested: how many seeds have one; a run that failed has neither, one that diverged no test.
        equal_time, equal_steps: the median of the best value up to the time, and the steps, at which the first run
            of the workload that came to its end had done so.
        at_once: whether the median run was at the target when it was first evaluated, so that its time is a bound.
        step: medians over the seeds of the step's split, in seconds.
        tuning: what its search cost, in the units of the clock; None without one.
        diagnosis: medians of what was measured beside the runs.
    """

    workload: str
    optimizer: str
    settings: dict[str, Any]
    horizon: float
    seeds: list[int]
    times: list[float]
    steps_to: float
    evaluations_to: float
    best: tuple[float, float] | None
    test: tuple[float, float] | None
    ends: dict[int, float]
    scored: int
    tested: int
    test_loss: float | None
    brier: float | None
    ece: float | None
    scaled_ece: float | None
    equal_time: float | None
    equal_steps: float | None
    at_once: bool
    step: dict[str, float]
    step_ratio: float | None = None
    peak_memory: int | None = None
    state_bytes: int = 0
    trouble: dict[str, int] = field(default_factory=dict)
    tuning: float | None = None
    diagnosis: dict[str, float] = field(default_factory=dict)

    @property
    def time(self) -> float:
        """The median time to the target."""
        return median(self.times)

    @property
    def reached(self) -> int:
        return sum(time < math.inf for time in self.times)


@dataclass
class Comparison:
    """An optimizer against another on one workload, seeds paired; ratio None where no pair decides."""

    workload: str
    own: str
    other: str
    ratio: Ratio | None


@dataclass
class Analysis:
    """Everything that the report shows."""

    clock: str
    targets: dict[str, Target]
    lines: list[Line]
    tuned: dict[str, dict[str, float]]  # workload -> optimizer -> AlgoPerf's time of its studies
    outcomes: list[Outcome]

    @property
    def workloads(self) -> list[str]:
        return list(dict.fromkeys(line.workload for line in self.lines))

    @property
    def optimizers(self) -> list[str]:
        return ordered(o.optimizer for o in self.outcomes if o.trial["phase"] in ("tune", "run"))

    def lines_of(self, workload: str) -> list[Line]:
        """Of one workload, the fastest first; those that missed the target by their best value."""
        return sorted((line for line in self.lines if line.workload == workload), key=self._rank)

    def _rank(self, line: Line) -> Any:
        goal = next(o.goal for o in self.outcomes if o.workload == line.workload)
        sign = -1 if goal == "max" else 1
        return (line.time, sign * line.best[0] if line.best else math.inf)

    def times(self) -> dict[str, dict[str, float]]:
        """Median times to target, by workload and optimizer, of those that ran on every workload and searched alike."""
        everywhere = [
            o
            for o in self.optimizers
            if o not in SETTERS and sum(line.optimizer == o for line in self.lines) == len(self.workloads)
        ]
        return {
            w: {line.optimizer: line.time for line in self.lines if line.workload == w and line.optimizer in everywhere}
            for w in self.workloads
            if w in self.targets
        }

    def run_scores(self) -> dict[str, float]:
        """AlgoPerf's score of the median times of the seeds at the best setting."""
        return ranked(self.times())

    def tuned_scores(self) -> dict[str, float]:
        """AlgoPerf's score proper, of who searched everywhere: of the studies, each as fast as its fastest trial."""
        everywhere = set.intersection(*(set(row) for row in self.tuned.values())) if self.tuned else set()
        return ranked({w: {name: row[name] for name in row if name in everywhere} for w, row in self.tuned.items()})

    def against_rivals(self) -> list[Comparison]:
        """On every workload, the fastest of ours against the fastest of the rivals."""
        return [c for w in self.workloads if w in self.targets and (c := self._fastest_pair(w))]

    def _fastest_pair(self, workload: str) -> Comparison | None:
        lines = self.lines_of(workload)
        ours = [line for line in lines if is_ours(line.optimizer)]
        rivals = [line for line in lines if line.optimizer in self.rivals]
        return compared(ours[0], rivals[0]) if ours and rivals else None

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.optimizers if not is_ours(name) and name not in ABLATIONS]

    def ahead(self, own: str, other: str) -> tuple[int, int]:
        """On how many workloads with a target `own` is ahead of `other`, and on how many they both ran: by the median
        time to it, and where both missed it by the mean best value."""
        ranks = self._ranks
        both = [w for w in self.workloads if w in self.targets and (w, own) in ranks and (w, other) in ranks]
        return sum(ranks[w, own] < ranks[w, other] for w in both), len(both)

    def in_the_end(self, own: str, other: str) -> tuple[int, int, int, int]:
        """On how many workloads `own` ends ahead of `other` by the test's values, seeds paired; how many both ran; and
        on how many it is shown to be ahead, and to be behind."""
        found = {(line.workload, line.optimizer): line.ends for line in self.lines}
        leads = []
        for w in self.workloads:
            a, b = found.get((w, own), {}), found.get((w, other), {})
            seeds = [seed for seed in a if seed in b]
            if seeds:
                leads.append(paired_lead([a[seed] for seed in seeds], [b[seed] for seed in seeds]))
        return sum(sign > 0 for sign, _ in leads), len(leads), leads.count((1, True)), leads.count((-1, True))

    def behind_twins(self) -> dict[str, list[str]]:
        """By variant, the workloads on which it is behind its own case without regularization, in the same sense."""
        ranks = self._ranks
        found: dict[str, list[str]] = {}
        for own, twin in TWINS.items():
            both = [w for w in self.workloads if w in self.targets and (w, own) in ranks and (w, twin) in ranks]
            if both:
                found[own] = [w for w in both if ranks[w, own] > ranks[w, twin]]
        return found

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], Any]:
        return {(line.workload, line.optimizer): self._rank(line) for line in self.lines}

    def against_twins(self) -> list[Comparison]:
        """Every variant against its own case without regularization."""
        found = {(line.workload, line.optimizer): line for line in self.lines}
        return [
            compared(found[w, own], found[w, twin])
            for w in self.workloads
            for own, twin in TWINS.items()
            if w in self.targets and (w, own) in found and (w, twin) in found
        ]


def analyse(outcomes: Sequence[Outcome], targets: Mapping[str, Target], clock: str) -> Analysis:
    """Bring the runs of a folder together."""
    runs = [o for o in outcomes if o.trial["phase"] == "run"]
    trials = searched(outcomes)
    known = {w: targets[w] for w in dict.fromkeys(o.workload for o in outcomes) if w in targets}
    lines = []
    for workload in dict.fromkeys(o.workload for o in runs):
        own = [o for o in runs if o.workload == workload]
        ended = [o for o in own if o.status == "finished" and o.rows]
        common = {
            key: min((max(row[key] for row in o.rows) for o in ended), default=math.inf) for key in (clock, "step")
        }
        for name in ordered(o.optimizer for o in own):
            seeds = sorted((o for o in own if o.optimizer == name), key=lambda o: o.seed)
            check_alike(seeds)
            cost = [o for o in trials if o.workload == workload and o.optimizer == name]
            lines.append(line_of(seeds, known.get(workload), clock, common, cost))
        reference = next(
            (o.step["mean"] for o in lines if (o.workload, o.optimizer) == (workload, "adamw") and o.step), 0
        )
        for line in lines:
            if line.workload == workload and reference and line.step:
                line.step_ratio = line.step["mean"] / reference
    tuned = {
        workload: {
            name: study_time(
                studies_of([o for o in trials if (o.workload, o.optimizer) == (workload, name)], target, clock)
            )
            for name in ordered(o.optimizer for o in trials if o.workload == workload)
        }
        for workload, target in known.items()
        if any(o.workload == workload for o in trials)
    }
    return Analysis(clock, known, lines, tuned, list(outcomes))


def searched(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The trials of the search."""
    return [o for o in outcomes if o.trial["phase"] == "tune" and o.trial["study"] != TARGET_STUDY]


def ranked(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Scores, the best first; a workload whose target nobody reached counts 0 for all, as in AlgoPerf's code."""
    reached = any(time < math.inf for row in times.values() for time in row.values())
    return dict(sorted(scores(times).items(), key=lambda pair: -pair[1])) if reached else {}


def check_alike(runs: Sequence[Outcome]) -> None:
    """Raise InputError unless the seeds of a line have the same settings and length."""
    kinds: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for o in runs:
        kind = {key: o.trial[key] for key in ("settings", "horizon", "budget", "lr_warmup")}
        kinds.setdefault(hash_of(kind), (kind, []))[1].append(o.seed)
    if len(kinds) > 1:
        shown = "; ".join(f"seeds {', '.join(map(str, seeds))} with {kind}" for kind, seeds in kinds.values())
        raise InputError(
            f"the runs of {runs[0].optimizer!r} on {runs[0].workload!r} do not belong together ({shown}): run all "
            "seeds alike, or give each setting a folder or a name of its own, OPTIMIZER/LABEL"
        )


def studies_of(trials: Sequence[Outcome], target: Target, clock: str) -> list[list[float]]:
    """Times to target, study by study."""
    numbers = sorted({o.trial["study"] for o in trials})
    return [[o.time_to(target.value, clock) for o in trials if o.trial["study"] == s] for s in numbers]


def line_of(
    runs: Sequence[Outcome], target: Target | None, clock: str, common: Mapping[str, float], cost: Sequence[Outcome]
) -> Line:
    first = runs[0]
    usable = [o for o in runs if o.status != "failed" and o.rows]
    goal = target.value if target else (math.inf if first.goal == "max" else -math.inf)
    value = [o.test.get(o.metric) for o in usable]
    return Line(
        workload=first.workload,
        optimizer=first.optimizer,
        settings=first.trial["settings"],
        horizon=first.trial["horizon"],
        seeds=[o.seed for o in runs],
        times=[o.time_to(goal, clock) for o in runs],
        steps_to=median(o.time_to(goal, "step") for o in runs),
        evaluations_to=median(o.time_to(goal, "evaluations") for o in runs),
        best=spread(o.best() for o in usable),
        test=spread(value),
        ends={o.seed: end_of(o) for o in runs},
        scored=len(present(o.best() for o in usable)),
        tested=len(present(value)),
        test_loss=middle(o.test.get("loss") for o in usable),
        **{name: middle(o.test.get(name) for o in usable) for name in ("brier", "ece", "scaled_ece")},
        equal_time=middle_run(runs, clock, common),
        equal_steps=middle_run(runs, "step", common),
        at_once=2 * sum(o.time_to(goal, "step") == o.rows[0]["step"] for o in usable) > len(runs),
        step={key: median(o.step_seconds[key] for o in usable) for key in usable[0].step_seconds} if usable else {},
        peak_memory=max((o.peak_memory for o in usable if o.peak_memory), default=None),
        state_bytes=max((o.state_bytes for o in usable), default=0),
        trouble={kind: n for kind in ("failed", "diverged") if (n := sum(o.status == kind for o in runs))},
        tuning=sum(total(o, clock) for o in cost) if cost else None,
        diagnosis=diagnosis_of(usable),
    )


def end_of(outcome: Outcome) -> float:
    """The test's value, larger where it is better; -inf without one."""
    value = outcome.test.get(outcome.metric)
    if outcome.status != "finished" or value is None or not math.isfinite(value):
        return -math.inf
    return value if outcome.goal == "max" else -value


def total(outcome: Outcome, clock: str) -> float:
    """What the clock showed in the end."""
    names = {"step": "steps", "evaluations": "gradient_evaluations"}
    return float(getattr(outcome, names.get(clock, clock)))


def best_until(outcome: Outcome, clock: str, limit: float) -> float | None:
    """The best value of the metric while the clock showed at most `limit`."""
    pairs = zip(outcome.rows, outcome.values(outcome.metric), strict=True)
    known = [value for row, value in pairs if row[clock] <= limit and not math.isnan(value)]
    return (max if outcome.goal == "max" else min)(known, default=None)


def middle_run(runs: Sequence[Outcome], clock: str, common: Mapping[str, float]) -> float | None:
    """The median over all seeds of the best value until then; a seed without any counts as the worst."""
    worst = -math.inf if runs[0].goal == "max" else math.inf
    values = [best_until(o, clock, common[clock]) if o.status != "failed" else None for o in runs]
    found = median(worst if value is None else value for value in values)
    return found if math.isfinite(found) else None


def diagnosis_of(runs: Sequence[Outcome]) -> dict[str, float]:
    """Medians over the seeds of gradient norm and sharpness in the end, and of Pearson's r along the run."""
    pearson = [row["pearson"] for o in runs for row in o.rows if row.get("pearson") is not None]
    found = {
        "gradient norm": middle(o.rows[-1].get("gradient_norm") for o in runs),
        "Pearson's r": median(pearson) if pearson else None,
        "sharpness": middle(o.diagnosis.get("sharpness") for o in runs),
    }
    return {name: value for name, value in found.items() if value is not None}


def compared(own: Line, other: Line) -> Comparison:
    """Times to target of two lines, over the seeds that both have."""
    shared = [seed for seed in own.seeds if seed in other.seeds]
    pairs = [(own.times[own.seeds.index(s)], other.times[other.seeds.index(s)]) for s in shared]
    try:
        ratio = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    except ValueError:  # both missed the target with every seed
        ratio = None
    return Comparison(own.workload, own.optimizer, other.optimizer, ratio)


def iqm_of(lines: Sequence[Line], fastest: Mapping[str, float]) -> float:
    """Interquartile mean, over workloads and seeds, of the times over the workload's fastest median; misses count as
    the most that is given credit for, four. Each workload weighs the same, whatever its number of seeds."""
    together = math.lcm(*(len(line.times) for line in lines))
    values = [
        min(MOST, time / fastest[line.workload])
        for line in lines
        for time in line.times
        for _ in range(together // len(line.times))
    ]
    return interquartile_mean(values)


def is_ours(name: str) -> bool:
    """Whether it is one of our variants, under whatever label or regularizer."""
    return base_of(name) in {base_of(own) for own in OURS} and name not in ABLATIONS


def middle(values: Iterable[Any]) -> float | None:
    known = present(values)
    return median(known) if known else None


def spread(values: Iterable[Any]) -> tuple[float, float] | None:
    """Mean and deviation."""
    known = present(values)
    return (fmean(known), stdev(known) if len(known) > 1 else 0.0) if known else None
