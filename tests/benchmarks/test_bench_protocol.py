"""The protocol: what runs, in which order, at which settings; what is refused before anything runs."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from grng.benchmarks.bench import Job, protocol, read_targets, write_targets
from grng.benchmarks.bench.protocol import TARGET_STUDY, best_of
from grng.benchmarks.bench.spaces import SETTERS, TARGETS_BY, find_contestant
from grng.benchmarks.bench.targets import best_trial, target_of
from grng.benchmarks.errors import InputError

from .bench_tools import Ear, Small, made, small_task, small_workload, target

PAIR = ("adamw", "sgd-momentum")


class Untested(Small):
    def evaluate(self, model, split):
        assert split == "validation"
        return super().evaluate(model, split)


@pytest.fixture
def small(monkeypatch):
    """Two small workloads instead of those of the package."""
    known = {
        "small": small_workload("small"),
        "lower": small_workload("lower", metric="loss", goal="min"),
        "untested": small_workload("untested", small_task(Untested)),
    }
    monkeypatch.setattr(protocol, "find_workload", known.__getitem__)


@pytest.mark.usefixtures("small")
def test_everybody_runs_a_seed_before_the_next(tmp_path):
    ear = Ear()
    found = Job(["small", "lower"], PAIR, tmp_path).run(2, False, ear)
    expected = [f"{w}, {o}, seed {s}" for s in (0, 1) for w in ("small", "lower") for o in PAIR]
    assert ear.titles == expected
    assert ear.counts == [(8, 0)]
    assert [(o.workload, o.optimizer, o.seed) for o in found] == [
        (w, o, s) for s in (0, 1) for w in ("small", "lower") for o in PAIR
    ]
    assert len({o.init_hash for o in found}) == 2
    assert all(o.test for o in found)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.usefixtures("small")
def test_everybody_tries_a_trial_before_the_next(tmp_path):
    ear = Ear()
    found = Job(["small", "lower"], PAIR, tmp_path).tune(2, 2, ear)
    assert ear.titles == [
        f"{w}, {o}, study {s}, trial {n}"
        for s in (0, 1)
        for n in (0, 1)
        for w in ("small", "lower")
        for o in ("adamw", "sgd-momentum")
    ]
    by_place = {}
    for o in found:
        by_place.setdefault((o.trial["study"], o.trial["number"], o.workload), set()).add((o.seed, o.init_hash))
    assert all(len(pairs) == 1 for pairs in by_place.values()), "the same weights for all"
    assert len({o.seed for o in found}) == 4


@pytest.mark.usefixtures("small")
def test_tuning_does_not_look_at_the_test_set(tmp_path):
    job = Job(["untested"], PAIR, tmp_path)
    assert [(o.status, o.test) for o in job.tune(1, 2)] == [("finished", {})] * 4
    assert {o.status for o in job.run(1, False)} == {"failed"}, "the fixture notices"


@pytest.mark.usefixtures("small")
def test_what_is_there_is_not_run_again_but_what_failed_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: 1 / 0)
        first = Job(["small"], PAIR, tmp_path).run(2, False)
    assert [o.status for o in first] == ["failed", "finished"] * 2
    assert first[0].message == "ZeroDivisionError: division by zero"
    ear = Ear()
    again = Job(["small"], PAIR, tmp_path).run(3, False, ear)
    adam, sgd = PAIR
    assert ear.titles == [f"small, {o}, seed {s}" for o, s in ((adam, 0), (adam, 1), (adam, 2), (sgd, 2))]
    assert ear.counts == [(6, 2)]
    assert {o.status for o in again} == {"finished"}
    ear = Ear()
    assert len(Job(["small"], PAIR, tmp_path).run(3, False, ear)) == 6
    assert ear.titles == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("change", "runs"), [({}, 0), ({"settings": {"adamw": {"lr": 0.5}}}, 1), ({"budget": 0.5}, 2)])
def test_other_conditions_are_other_runs(tmp_path, change, runs):
    Job(["small"], PAIR, tmp_path).run(1, False)
    ear = Ear()
    found = Job(["small"], PAIR, tmp_path, **change).run(1, False, ear)
    assert len(ear.titles) == runs
    assert ear.replaced == runs, "which the user is told"
    assert {o.steps for o in found} == {round(6 * change.get("budget", 1))}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("workloads", "optimizers"), [(["small"] * 2, PAIR), (["small"], (*PAIR, "adamw"))])
def test_a_name_that_stands_twice_runs_once(tmp_path, workloads, optimizers):
    ear = Ear()
    Job(workloads, optimizers, tmp_path).run(1, False, ear)
    assert sorted(ear.titles) == [f"small, {o}, seed 0" for o in PAIR]


@pytest.mark.usefixtures("small")
def test_the_budget_scales_the_length(tmp_path):
    found = [Job(["small"], ["adamw"], tmp_path, budget=b).run(1, False)[0] for b in (0.34, 2, 0.01)]
    assert [(o.steps, len(o.rows)) for o in found] == [(2, 1), (12, 4), (1, 1)]


@pytest.mark.usefixtures("small")
def test_the_length_of_the_warm_up_holds_for_all_runs(tmp_path):
    job = Job(["small"], ["adamw"], tmp_path, lr_warmup=0.5, budget=0.5)
    job.tune(1, 1)
    job.run(1, False)
    job.set_targets(1, 1)
    assert {(o.trial["lr_warmup"], o.trial["budget"]) for o in job.store.outcomes()} == {(0.5, 0.5)}
    assert {o.trial["phase"] for o in job.store.outcomes()} == {"tune", "run", "target"}


# Settings.

TRIALS = [
    made("small", "adamw", [0.5, 0.8, 0.91], phase="tune", number=0, settings={"lr": 0.1}, horizon=0.3),
    made("small", "adamw", [0.5, 0.92, 0.9], phase="tune", number=1, settings={"lr": 0.2}, horizon=0.4),
    made("small", "adamw", [0.5, 0.89, 0.99], phase="tune", number=2, settings={"lr": 0.3}, horizon=0.5),
]
STEADY = [o for o in TRIALS if o.trial["number"] != 1]


@pytest.mark.parametrize(
    ("trials", "goal", "best"),
    [
        (TRIALS, 0.9, 1),
        (TRIALS, 0.985, 2),
        (TRIALS, 0.999, 2),
        (TRIALS, None, 2),
        (STEADY, 0.9, 0),
        ([], 0.9, None),
        ([made("small", "adamw", [None], phase="tune")], None, None),
        ([replace(TRIALS[1], status="failed"), TRIALS[0]], 0.9, 0),
        ([replace(TRIALS[2], status="failed"), TRIALS[0]], 0.999, 0),
        ([replace(TRIALS[1], status="diverged"), TRIALS[0]], 0.9, 1),
    ],
)
def test_the_best_of_a_search(trials, goal, best):
    """The first to the target; where none reached it, the best value."""
    found = best_of(trials, goal, "seconds")
    assert (found and found.trial["number"]) == best


def test_the_best_by_another_clock():
    slow = made("small", "adamw", [0.95], phase="tune", number=0, pace=9.0)
    quick = made("small", "adamw", [0.5, 0.95], phase="tune", number=1, pace=1.0)
    assert [best_of([slow, quick], 0.9, clock) for clock in ("seconds", "cpu_seconds", "step", "evaluations")] == [
        *(quick, quick, slow, slow)
    ]
    low = [made("lower", "adamw", [v], goal="min", phase="tune", number=i) for i, v in enumerate((0.3, 0.1, 0.2))]
    assert best_of(low, None, "seconds") is best_trial(low) is low[1]
    assert best_of(low, 0.25, "seconds") is low[1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("given", "trials", "settings", "horizon"),
    [
        ({}, (), {}, 1.0),
        ({}, TRIALS, {"lr": 0.2}, 0.4),
        ({"lr": 0.7}, TRIALS, {"lr": 0.7}, 0.4),
        ({"eps": 1e-6}, TRIALS, {"lr": 0.2, "eps": 1e-6}, 0.4),
        ({"lr": 0.7, "horizon": 0.25}, TRIALS, {"lr": 0.7}, 0.25),
        ({"horizon": 0.25}, (), {}, 0.25),
        ({"horizon": 0.25}, TRIALS, None, 0.25),
    ],
)
def test_settings_given_replace_those_found_or_the_defaults(tmp_path, given, trials, settings, horizon):
    job = Job(["small"], PAIR, tmp_path, settings={"adamw": given}, targets={"small": target("small", 0.9)})
    frozen = made("small", "adamw", [1.0], phase="tune", study=TARGET_STUDY, settings={"lr": 9.0})
    foreign = [made("small", "soap", [1.0], phase="tune"), made("lower", "adamw", [1.0], phase="tune")]
    found = job.best([frozen, *foreign, *trials, made("small", "adamw", [1.0])], "small", find_contestant("adamw"))
    assert found[1] == horizon
    assert settings in (None, found[0])
    other = job.best([], "small", find_contestant("sgd-momentum"))
    assert other == ({"nesterov": True}, 1.0), "what is fixed"


@pytest.mark.usefixtures("small")
def test_a_search_at_another_length_chooses_nothing(tmp_path):
    Job(["small"], PAIR, tmp_path, budget=0.5).tune(1, 1)
    with pytest.raises(InputError, match=r"holds a search of 'adamw' on 'small' at another length than budget 1 and"):
        Job(["small"], PAIR, tmp_path).run(1, False)
    settings = {name: {"lr": 0.5} for name in PAIR}
    assert [o.steps for o in Job(["small"], PAIR, tmp_path, settings=settings).run(1, False)] == [6, 6]
    Job(["small"], PAIR, tmp_path).tune(1, 1)
    assert [o.status for o in Job(["small"], PAIR, tmp_path).run(1, False)] == ["finished"] * 2


@pytest.mark.usefixtures("small")
def test_who_set_a_target_runs_there_with_its_setting(tmp_path):
    goals = {"small": replace(target("small", 0.9), optimizer="nadamw", settings={"lr": 0.02, "betas": [0.8, 0.9]})}
    job = Job(["small", "lower"], ["adamw", *SETTERS], tmp_path, targets=goals)
    assert {o.optimizer for o in job.tune(1, 1)} == {"adamw"}, "it searches nothing"
    found = job.run(2, False)
    assert [(o.workload, o.optimizer) for o in found if o.optimizer != "adamw"] == [("small", "nadamw/target")] * 2
    setter = found[-1] if found[-1].optimizer == "nadamw/target" else found[1]
    assert setter.trial["settings"] == {"lr": 0.02, "betas": [0.8, 0.9]}
    assert (setter.trial["horizon"], setter.status) == (1.0, "finished")


@pytest.mark.usefixtures("small")
def test_the_value_at_the_full_length(tmp_path):
    """Every trial has the whole budget, and the best in the end is chosen, not the first at the target."""
    goals = {"small": target("small", 0.1)}
    job = Job(["small"], PAIR, tmp_path, aim="value", targets=goals)
    tuned = job.tune(2, 2)
    assert {(o.trial["horizon"], o.steps) for o in tuned} == {(1.0, 6)}
    found = job.run(1, False)
    for o in found:
        best = best_trial([t for t in tuned if t.optimizer == o.optimizer])
        assert o.trial["settings"]["lr"] == best.trial["settings"]["lr"]
        assert o.trial["horizon"] == 1.0
    quick = made("small", "adamw", [0.2, 0.3], phase="tune", pace=0.1, settings={"lr": 0.3})
    slow = made("small", "adamw", [0.0, 0.0, 0.9], phase="tune", number=1, settings={"lr": 0.7})
    for aim, lr in (("time", 0.3), ("value", 0.7)):
        asked = Job(["small"], PAIR, tmp_path, aim=aim, targets=goals)
        assert asked.best([quick, slow], "small", find_contestant("adamw"))[0]["lr"] == lr


@pytest.mark.usefixtures("small")
def test_runs_of_other_code_are_counted(tmp_path, monkeypatch):
    first = Job(["small"], PAIR, tmp_path).run(1, False)
    assert len({o.environment["source"] for o in first}) == 1
    for code, outdated in (("same", 0), ("other", 2)):
        ear = Ear()
        with monkeypatch.context() as patch:
            if code == "other":
                patch.setattr(protocol, "source_hash", lambda: "other")
            Job(["small"], PAIR, tmp_path).run(1, False, ear)
        assert (ear.counts, ear.outdated) == ([(2, 2)], outdated)


@pytest.mark.usefixtures("small")
def test_a_run_takes_the_best_of_the_search(tmp_path):
    job = Job(["small"], ["adamw"], tmp_path)
    tuned = job.tune(1, 3)
    ran = Job(["small"], ["adamw"], tmp_path).run(1, False)[0]
    best = best_trial(tuned)
    assert ran.trial["horizon"] == best.trial["horizon"]
    assert ran.trial["settings"] == best.trial["settings"] | {"betas": list(best.trial["settings"]["betas"])}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("given", "steps"), [({"lr": 0.5}, None), ({"lr": 0.5, "horizon": 0.5}, {3})])
def test_settings_that_are_given_hold_in_the_search(tmp_path, given, steps):
    found = Job(["small"], ["adamw"], tmp_path, settings={"adamw": given}).tune(1, 2)
    assert [o.trial["settings"]["lr"] for o in found] == [0.5, 0.5]
    assert all("weight_decay" in o.trial["settings"] for o in found)
    assert steps in (None, {o.steps for o in found})


# Targets.


@pytest.mark.parametrize(
    ("goal", "values", "expected"),
    [
        ("max", [0.5, 0.7, 0.6], 0.6),
        ("max", [0.5, None, 0.6], 0.5),
        ("min", [0.5, None, 0.6], 0.6),
        ("max", [None, None, 0.6], -math.inf),
        ("min", [0.123456789], 0.12346),
    ],
)
def test_a_target_is_the_median_of_the_reruns(goal, values, expected):
    reruns = [made("small", "adamw", [v], goal=goal, seed=i, phase="target") for i, v in enumerate(values)]
    found = target_of(replace(reruns[0], trial=TRIALS[0].trial), reruns, 20)
    assert (found.value, found.goal, found.metric, found.seeds, found.trials) == (
        expected,
        goal,
        "accuracy",
        len(values),
        20,
    )
    assert (found.workload, found.optimizer, found.settings) == ("small", "adamw", {"lr": 0.1})


@pytest.mark.usefixtures("small")
def test_setting_targets(tmp_path):
    ear = Ear()
    job = Job(["small", "lower"], TARGETS_BY, tmp_path)
    found = job.set_targets(2, 3, ear)
    outcomes = job.store.outcomes()
    assert ear.counts == [(12, 0), (6, 0)]
    assert {(o.trial["phase"], o.trial["horizon"]) for o in outcomes} == {("tune", 1.0), ("target", 1.0)}
    assert {o.trial["study"] for o in outcomes if o.trial["phase"] == "tune"} == {TARGET_STUDY}
    for name in ("small", "lower"):
        reruns = [o for o in outcomes if o.workload == name and o.trial["phase"] == "target"]
        tuned = [o for o in outcomes if o.workload == name and o.trial["phase"] == "tune"]
        assert [sorted(o.best() for o in reruns)[1]] == pytest.approx([found[name].value], rel=1e-4)
        winner = best_trial([o for o in tuned if o.optimizer == found[name].optimizer])
        assert winner.best() == best_trial(tuned).best()  # of several that are as good any
        assert {o.optimizer for o in reruns} == {winner.optimizer}
        assert sorted(o.seed for o in reruns) == [0, 1, 2]
        assert found[name].goal == ("min" if name == "lower" else "max")
    path = tmp_path / "targets.json"
    write_targets(path, found)
    assert {n: asdict(t) | {"settings": None} for n, t in read_targets(path).items()} == {
        n: asdict(t) | {"settings": None} for n, t in found.items()
    }
    assert job.best(outcomes, "small", find_contestant("adamw"))[0] == {}, "the scored search is another one"


@pytest.mark.parametrize("text", ["{", "[1]", '{"small": {"value": 1}}', '{"small": 3}'])
def test_bad_files_of_targets(tmp_path, text):
    (tmp_path / "targets.json").write_text(text)
    with pytest.raises(InputError, match=r"targets\.json holds no targets .*: make them with grng bench targets"):
        read_targets(tmp_path / "targets.json")
