"""What runs come to, by hand, and against AlgoPerf's scoring: written anew, and what its own code gave."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from grng.benchmarks.bench import Store, Trial
from grng.benchmarks.bench.analysis import analyse, best_until, iqm_of, spread, total
from grng.benchmarks.bench.protocol import TARGET_STUDY
from grng.benchmarks.errors import InputError
from grng.benchmarks.statistics import paired_lead, profile

from .bench_tools import made, target

INF = math.inf
GOAL = {"small": target("small", 0.9)}


@pytest.mark.parametrize(
    ("values", "goal", "value", "time", "best"),
    [
        ([0.5, 0.9, 0.95, 0.8], "max", 0.9, 2, 0.95),
        ([0.95, 0.5], "max", 0.9, 1, 0.95),
        ([0.5, None, 0.95], "max", 0.9, 3, 0.95),
        ([0.5, 0.8], "max", 0.9, INF, 0.8),
        ([None], "max", 0.9, INF, None),
        ([], "max", 0.9, INF, None),
        ([0.5, 0.1, 0.05, 0.2], "min", 0.1, 2, 0.05),
        ([0.5, None, 0.2], "min", 0.1, INF, 0.2),
    ],
)
def test_time_to_the_target_and_the_best(values, goal, value, time, best):
    outcome = made("small", "adamw", values, goal=goal, pace=3.0)
    clocks = {"step": 10, "seconds": 3, "cpu_seconds": 6, "evaluations": 20}
    assert {clock: outcome.time_to(value, clock) for clock in clocks} == {c: time * k for c, k in clocks.items()}
    assert outcome.best() == best
    assert replace(outcome, status="diverged").time_to(value, "step") == 10 * time
    assert replace(outcome, status="failed").time_to(value, "step") == INF


RUNS = [
    *(made("small", "kalman", [0.5, v, 0.95], seed=s, pace=1.0) for s, v in enumerate((0.9, 0.8, 0.91))),
    *(made("small", "kalman/rho=0", [0.5, 0.6, 0.7, 0.92], seed=s, pace=1.0) for s in range(3)),
    *(made("small", "adamw", [0.5, 0.6, v, 0.8], seed=s, pace=2.0) for s, v in enumerate((0.9, 0.9, 0.7))),
    *(made("small", "soap", [0.1], seed=s, status="failed", step_seconds={}) for s in range(3)),
]
TRIALS = [
    *(made("small", "kalman", [0.5, 0.9], phase="tune", study=s, number=n, pace=1.0) for s in (0, 1) for n in (0, 1)),
    made("small", "kalman", [0.9] * 9, phase="tune", study=TARGET_STUDY, pace=9.0),
    made("small", "adamw", [0.9], phase="target", seed=7, pace=0.001),
]


def test_lines_by_hand():
    found = analyse([*RUNS, *TRIALS], GOAL, "seconds")
    assert found.workloads == ["small"]
    assert found.optimizers == ["kalman", "kalman/rho=0", "adamw", "soap"]
    ring, _, adamw, soap = (next(x for x in found.lines if x.optimizer == n) for n in found.optimizers)
    assert (ring.times, ring.time, ring.reached) == ([2, 3, 2], 2, 3)
    assert (ring.steps_to, ring.evaluations_to) == (20, 40)
    assert ring.best == pytest.approx((0.95, 0.0))
    assert (ring.test, ring.test_loss, ring.brier) == (pytest.approx((0.95, 0.0)), 0.5, 0.25)
    assert (adamw.times, adamw.time, adamw.reached) == ([6, 6, INF], 6, 2)
    assert adamw.best == pytest.approx((np.mean([0.9, 0.9, 0.8]), np.std([0.9, 0.9, 0.8], ddof=1)))
    assert (soap.time, soap.best, soap.equal_time, soap.step, soap.trouble) == (INF, None, None, {}, {"failed": 3})
    assert [x.optimizer for x in found.lines_of("small")] == ["kalman", "kalman/rho=0", "adamw", "soap"]
    assert (ring.step_ratio, adamw.step_ratio, soap.step_ratio) == (0.5, 1.0, None)
    assert ring.step["gradient"] == 0.05
    assert (ring.tuning, adamw.tuning) == (8.0, None), "without the search of the targets"
    assert found.tuned == {"small": {"kalman": 2.0}}
    assert (ring.settings, ring.horizon, ring.seeds, ring.state_bytes) == ({"lr": 0.1}, 1.0, [0, 1, 2], 1000)


def test_equal_time_and_equal_steps():
    """Until the first had ended: ring, after 3 seconds and 30 steps."""
    found = {x.optimizer: x for x in analyse(RUNS, GOAL, "seconds").lines}
    assert {n: x.equal_time for n, x in found.items()} == {
        "kalman": 0.95,
        "kalman/rho=0": 0.7,
        "adamw": 0.5,
        "soap": None,
    }
    assert {n: x.equal_steps for n, x in found.items()} == {
        "kalman": 0.95,
        "kalman/rho=0": 0.7,
        "adamw": 0.9,
        "soap": None,
    }
    diverged = [made("small", "reng", v, seed=i, status="diverged") for i, v in enumerate(([0.1], [None], [0.6, 0.7]))]
    again = {x.optimizer: x for x in analyse([*RUNS, *diverged], GOAL, "seconds").lines}
    assert {n: again[n].equal_steps for n in found} == {n: x.equal_steps for n, x in found.items()}, "it had not ended"
    assert (again["reng"].equal_steps, again["reng"].scored, again["reng"].tested) == (0.1, 2, 2)
    low = made("lower", "adamw", [0.5, None, 0.3, 0.1], goal="min")
    assert [best_until(low, "step", limit) for limit in (5, 10, 25, 30, INF)] == [None, 0.5, 0.5, 0.3, 0.1]


@pytest.mark.parametrize(
    ("clock", "time", "tuning", "whole"),
    [("seconds", 2, 8, 3), ("cpu_seconds", 4, 16, 6), ("step", 20, 80, 30), ("evaluations", 40, 160, 60)],
)
def test_every_clock(clock, time, tuning, whole):
    found = analyse([*RUNS, *TRIALS], GOAL, clock)
    line = next(x for x in found.lines if x.optimizer == "kalman")
    assert (line.time, line.tuning, total(RUNS[0], clock)) == (time, tuning, whole)
    assert found.tuned["small"]["kalman"] == time


def test_a_seed_without_a_value_counts_as_the_worst():
    values = ([0.7, 0.8], [None, 0.8], [0.6, 0.8])
    runs = [made("small", "kalman", v, seed=i) for i, v in enumerate(values)]
    short = made("small", "adamw", [0.1])
    found = {x.optimizer: x.equal_steps for x in analyse([*runs, short], GOAL, "seconds").lines}
    assert found == {"kalman": 0.6, "adamw": 0.1}
    failed = [replace(runs[0], trial={**runs[0].trial, "seed": i, "study": i}, status="failed") for i in (3, 4, 5)]
    assert analyse([*runs, *failed, short], GOAL, "seconds").lines[0].equal_steps is None


@pytest.mark.parametrize("change", [{"settings": {"lr": 9.0}}, {"horizon": 0.5}, {"budget": 0.5}, {"lr_warmup": 0.0}])
def test_runs_that_do_not_belong_together_are_refused(change):
    other = made("small", "adamw", [0.5], seed=7)
    other.trial |= change
    with pytest.raises(InputError, match=r"the runs of 'adamw' on 'small' do not belong together .*seeds 7 with"):
        analyse([*RUNS, other], GOAL, "seconds")


def test_ours_are_ours_under_any_name():
    names = ("ring/mine", "ring+sam", "kalman/rho=0", "adamw/target", "adamw")
    found = analyse([made("small", n, [0.95], pace=i + 1.0) for i, n in enumerate(names)], GOAL, "seconds")
    assert set(found.rivals) == {"adamw/target", "adamw"}
    assert [(c.own, c.other) for c in found.against_rivals()] == [("ring/mine", "adamw/target")]
    assert set(found.run_scores()) == set(names) - {"adamw/target"}, "it did not search as the others did"


def test_at_the_target_when_first_evaluated():
    runs = [made("small", "adamw", v, seed=i) for i, v in enumerate(([0.95], [0.91, 0.95], [0.1, 0.95]))]
    runs += [made("small", "soap", [0.1, 0.95], seed=i) for i in range(3)]
    found = {x.optimizer: x.at_once for x in analyse(runs, GOAL, "seconds").lines}
    assert found == {"adamw": True, "soap": False}


def test_who_searched_somewhere_has_no_score():
    goals = {name: target(name, 0.9) for name in ("a", "b")}
    runs = [made(w, "kalman", [0.9], phase="tune") for w in goals] + [made("a", "adamw", [0.9], phase="tune")]
    assert analyse(runs, goals, "seconds").tuned_scores() == {"kalman": 1.0}


def test_ahead_by_hand():
    """By time where one reached the target, by the best value where none did; only where both ran and there is one."""
    further = [
        made("high", "kalman", [0.5, 0.7]),
        made("high", "adamw", [0.6, 0.8]),
        made("low", "kalman", [0.5, 0.3], goal="min"),
        made("low", "adamw", [0.2, 0.4], goal="min", seed=0),
        made("low", "adamw", [0.8, 0.9], goal="min", seed=1),
        made("alone", "kalman", [0.95]),
        made("aimless", "kalman", [0.95]),
        made("aimless", "adamw", [0.9]),
    ]
    targets = GOAL | {w: target(w, 0.1 if w == "low" else 0.9) for w in ("high", "low", "alone")}
    found = analyse([*RUNS, *further], targets, "seconds")
    assert found.rivals == ["adamw", "soap"]
    assert found.ahead("kalman", "adamw") == (2, 3), "small by time, low by the mean of 0.2 and 0.8; not high"
    assert found.ahead("kalman", "soap") == (1, 1)
    assert found.ahead("kalman", "muon") == (0, 0)


def test_the_end_by_hand():
    """By the test's values, which are those of the last evaluation here, of the seeds that both have."""
    runs = [
        *(made("high", "kalman", [0.9], seed=s) for s in range(7)),
        *(made("high", "adamw", [0.95 if s == 6 else 0.8], seed=s) for s in range(6)),
        *(made("low", "kalman", [0.9], seed=s, goal="min") for s in range(6)),
        *(made("low", "adamw", [0.8], seed=s, goal="min") for s in range(6)),
        *(made("few", "kalman", [0.9], seed=s) for s in range(3)),
        *(made("few", "adamw", [0.8], seed=s) for s in range(3)),
        *(made("lost", "kalman", [0.5], seed=s) for s in range(6)),
        *(made("lost", "adamw", [0.9], seed=s, status="diverged") for s in range(6)),
        made("even", "kalman", [0.5]),
        made("even", "adamw", [0.5]),
        made("none", "kalman", [None]),
        made("none", "adamw", [None]),
        made("alone", "kalman", [0.5]),
    ]
    found = analyse(runs, {}, "seconds")
    assert found.in_the_end("kalman", "adamw") == (3, 6, 2, 1)
    assert found.in_the_end("kalman", "soap") == (0, 0, 0, 0)


@pytest.mark.parametrize("shift", [0.0, 0.02, -0.3])
@pytest.mark.parametrize("n", [5, 6, 11])
def test_a_lead_exchanged(n: int, shift: float) -> None:
    rng = np.random.default_rng(n)
    own, theirs = (list(map(float, rng.normal(size=n))) for _ in range(2))
    own = [a + shift for a in own]
    sign, shown = paired_lead(own, theirs)
    assert paired_lead(theirs, own) == (-sign, shown)
    assert sign == np.sign(np.median(np.subtract(own, theirs)))


def test_pairs_by_hand():
    found = analyse(RUNS, GOAL, "seconds")
    [rival] = found.against_rivals()
    assert (rival.workload, rival.own, rival.other) == ("small", "kalman", "adamw")
    assert (rival.ratio.median, rival.ratio.pairs, rival.ratio.undecided) == (pytest.approx(1 / 3), 3, 0)
    [twin] = found.against_twins()
    assert (twin.own, twin.other, twin.ratio.median) == ("kalman", "kalman/rho=0", pytest.approx(0.5))


@pytest.mark.parametrize(
    ("ours", "theirs", "median", "pairs", "undecided"),
    [
        ([2, 2, 2], [4, 4, 8], 0.5, 3, 0),
        ([2, None, 2], [4, None, 4], 0.5, 2, 1),
        ([2, None, 2], [4, 4, 4], 0.5, 3, 0),
        ([None, None, 2], [4, 4, 4], INF, 3, 0),
        ([2, 2], [None, None], 0.0, 2, 0),
        ([None], [None], None, 0, 0),
        ([2, 2, 2, 2], [4], 0.5, 1, 0),
    ],
)
def test_pairs_of_misses(ours, theirs, median, pairs, undecided):
    def runs(name, ends):
        values = [[0.1] * 9 if n is None else [0.1] * (n - 1) + [0.9] for n in ends]
        return [made("small", name, v, seed=seed) for seed, v in enumerate(values)]

    found = analyse([*runs("reng", ours), *runs("soap", theirs)], GOAL, "seconds")
    [pair] = found.against_rivals()
    if median is None:
        assert pair.ratio is None
    else:
        assert pair.ratio.median == pytest.approx(median)
        assert (pair.ratio.pairs, pair.ratio.undecided) == (pairs, undecided)
    assert found.against_twins() == []


def test_scores_count_who_ran_everywhere():
    goals = {name: target(name, 0.9) for name in ("a", "b", "c")}
    runs = [
        *(made(w, "kalman", [0.9], pace=p) for w, p in (("a", 1.0), ("b", 4.0), ("c", 1.0))),
        *(made(w, "adamw", [0.9], pace=p) for w, p in (("a", 2.5), ("b", 2.0), ("c", 9.0))),
        made("a", "soap", [0.9], pace=0.1),
    ]
    found = analyse(runs, goals, "seconds")
    assert found.times() == {
        "a": {"kalman": 1.0, "adamw": 2.5},
        "b": {"kalman": 4.0, "adamw": 2.0},
        "c": {"kalman": 1.0, "adamw": 9.0},
    }
    assert found.run_scores() == pytest.approx({"kalman": (1 + 2 / 3 + 1) / 3, "adamw": (0.5 + 1 + 0) / 3})
    assert list(found.run_scores()) == ["kalman", "adamw"]
    assert found.tuned_scores() == {}
    lines = [x for x in found.lines if x.optimizer == "adamw"]
    assert iqm_of(lines, {"a": 1.0, "b": 2.0, "c": 1.0}) == pytest.approx(7.5 / 3), "2.5, 1 and 4 for the nine"


def test_who_is_behind_its_own_case_without_regularization():
    """By the median time, and by the mean best value where both missed the target; not where one did not run."""
    goals = {name: target(name, 0.9) for name in ("a", "b", "c")}
    runs = [
        *(made("a", name, [0.9], pace=p) for name, p in (("ring", 2.0), ("reng", 1.0), ("kfac", 1.5))),
        *(made("b", name, [v]) for name, v in (("ring", 0.6), ("reng", 0.5), ("kfac", 0.55))),
        made("c", "ring", [0.5]),
    ]
    assert analyse(runs, goals, "seconds").behind_twins() == {"ring": ["a"], "reng": ["b"]}


def test_a_target_that_nobody_reaches_counts_in_the_score():
    """0 for everybody, as in AlgoPerf's code, and not left out; in the IQM a workload of more seeds weighs no more."""
    goals = {name: target(name, 0.9) for name in ("a", "b", "c", "d")}
    runs = [
        *(made("a", "kalman", [0.9], pace=1.0, seed=s) for s in range(4)),
        *(made("a", "adamw", [0.9], pace=2.5, seed=s) for s in range(4)),
        *(made("b", name, [0.9], pace=p) for name, p in (("kalman", 2.0), ("adamw", 2.0))),
        *(made(w, name, [0.5], pace=1.0) for name in ("kalman", "adamw") for w in ("c", "d")),
    ]
    found = analyse(runs, goals, "seconds")
    assert found.run_scores() == pytest.approx({"kalman": 2 / 4, "adamw": (0.5 + 1) / 4})
    lines = [x for x in found.lines if x.optimizer == "adamw" and x.workload in ("a", "b")]
    assert iqm_of(lines, {"a": 1.0, "b": 2.0}) == pytest.approx((2 * 2.5 + 2 * 1) / 4)
    assert analyse([r for r in runs if r.workload in ("c", "d")], goals, "seconds").run_scores() == {}


def test_without_a_target_nothing_is_timed():
    found = analyse([*RUNS, *TRIALS], {"other": target("other")}, "seconds")
    assert (found.targets, found.tuned, found.times(), found.against_rivals()) == ({}, {}, {}, [])
    assert {x.time for x in found.lines} == {INF}
    assert found.lines_of("small")[0].optimizer == "kalman", "by the best value"


def test_all_runs_of_the_reference_failed():
    runs = [made("small", "kalman", [0.9]), made("small", "adamw", [], status="failed", step_seconds={})]
    found = analyse(runs, GOAL, "seconds")
    assert [(x.optimizer, x.time, x.step_ratio) for x in found.lines] == [("kalman", 1.0, None), ("adamw", INF, None)]


def test_lower_is_better_where_it_is():
    runs = [
        made("small", n, v, goal="min") for n, v in (("kalman", [0.5, 0.3]), ("adamw", [0.5, 0.2]), ("soap", [0.4]))
    ]
    found = analyse(runs, {"small": target("small", 0.1, "min")}, "seconds")
    assert [x.optimizer for x in found.lines_of("small")] == ["adamw", "kalman", "soap"]
    assert found.lines_of("small")[0].best == (0.2, 0.0)


def test_diagnosis_and_memory():
    first, second = RUNS[0], RUNS[1]
    values = zip(first.rows, (3, 2, 1), (None, 0.2, 0.4), strict=True)
    rows = [{**row, "gradient_norm": g, "pearson": p} for row, g, p in values]
    watched = replace(first, rows=rows, diagnosis={"sharpness": 7.0}, peak_memory=2**20)
    [line] = analyse([watched, second], GOAL, "seconds").lines
    assert line.diagnosis == {"gradient norm": 1.0, "Pearson's r": pytest.approx(0.3), "sharpness": 7.0}
    assert line.peak_memory == 2**20
    assert (spread([]), spread([2.0]), spread([1.0, None, 3.0])) == (None, (2.0, 0.0), (2.0, pytest.approx(2**0.5)))


# AlgoPerf's score, from the files.

NAMES, WORKLOADS, STUDIES, TUNED = ("kalman", "adamw", "soap"), ("one", "two", "three"), 3, 5


def written(store):
    """Curves of random speed, some of which miss the target."""
    rng = np.random.default_rng(3)
    for w, workload in enumerate(WORKLOADS):
        goal = "min" if workload == "two" else "max"
        for o, optimizer in enumerate(NAMES):
            for study in range(STUDIES):
                pace = float(
                    rng.uniform(0.5, 1.5)
                )  # one a study: AlgoPerf's code takes the trial of fewest evaluations
                for number in range(TUNED):
                    speed, top = rng.uniform(0.05, 0.5) * (1 + 0.5 * o), rng.uniform(0.8, 1.05)
                    top = 0.5 if (w, o) == (2, 2) else top
                    curve = top * (1 - np.exp(-speed * np.arange(1, 30)))
                    values = [float(v) for v in (1 - curve if goal == "min" else curve)]
                    place = {"phase": "tune", "study": study, "number": number, "seed": 10 * study + number}
                    made_up = made(workload, optimizer, values, pace=pace, goal=goal, **place)
                    store.write(Trial(**made_up.trial), made_up)
    return {w: target(w, 0.2 if w == "two" else 0.8, "min" if w == "two" else "max") for w in WORKLOADS}


def algoperf(out, goals, count):
    """Profiles on a grid of ratios and the area under them, as the benchmark's scoring does it."""
    times = {}
    for name in NAMES:
        for workload in WORKLOADS:
            studies = []
            for study in sorted((out / "tune" / name).iterdir()):
                reached = [math.inf]
                for path in (study / f"{workload}_pytorch").glob("trial_*/eval_measurements.csv"):
                    with path.open(newline="") as file:
                        rows = list(csv.DictReader(file))
                    metric = np.array([float(row["validation/accuracy"]) for row in rows])
                    clock = np.array([float(row["score"]) for row in rows])
                    there = metric <= goals[workload].value if workload == "two" else metric >= goals[workload].value
                    if there.any():
                        reached.append(clock[np.argmax(there)])
                studies.append(min(reached))
            times[name, workload] = float(np.median(studies))
    table = np.array([[times[n, w] for w in WORKLOADS] for n in NAMES])
    ratios = table / table.min(axis=0)
    ratios[ratios > 4] = np.inf
    tau = np.linspace(1, 4, count)
    area = [np.trapezoid(sum((r <= tau).astype(float) for r in row) / len(row), tau) / 3 for row in ratios]
    return table, dict(zip(NAMES, area, strict=True))


# What AlgoPerf's own scoring (github.com/mlcommons/submissions_algorithms, commit 05f7967) makes of the files of
# `written`: time to target, by NAMES and WORKLOADS, and the scores, of a profile at 100 points.
THEIR_TIMES = [[5.270843, 5.637818, 5.797519], [3.101498, 3.504472, 3.658965], [2.701802, 2.615643, INF]]
THEIR_SCORES = {"kalman": 0.6986531986531986, "adamw": 0.946127946127946, "soap": 0.6666666666666657}


def test_the_score_is_what_their_code_gives(tmp_path):
    store = Store(tmp_path)
    goals = written(store)
    found = analyse(store.outcomes(), goals, "seconds")
    for i, workload in enumerate(WORKLOADS):
        assert found.tuned[workload] == pytest.approx({n: t[i] for n, t in zip(NAMES, THEIR_TIMES, strict=True)})
    tau = np.linspace(1.0, 4.0, 100)
    area = {name: np.trapezoid(values, tau) / 3 for name, values in profile(found.tuned, tau).items()}
    assert area == pytest.approx(THEIR_SCORES, abs=1e-12)
    assert found.tuned_scores() == pytest.approx(THEIR_SCORES, abs=1 / 99), "the same without a grid"


def test_the_score_is_that_of_algoperf(tmp_path):
    store = Store(tmp_path)
    goals = written(store)
    table, expected = algoperf(tmp_path, goals, 3_000_001)
    found = analyse(store.outcomes(), goals, "seconds")
    assert np.isinf(table).any()
    assert len({round(score, 3) for score in expected.values()}) == 3
    assert found.tuned == {w: dict(zip(NAMES, map(float, table[:, i]), strict=True)) for i, w in enumerate(WORKLOADS)}
    assert found.tuned_scores() == pytest.approx(expected, abs=1e-6)
    assert found.workloads == []
