"""The search: the same points for everybody, and for a search that was stopped."""

import math
import warnings

import pytest
from grng.benchmarks.bench import ROSTER, Job, protocol
from grng.benchmarks.bench.search import DIMENSIONS, Search
from grng.benchmarks.bench.spaces import FLOOR, STRENGTH, TWINS, find_contestant

from .bench_tools import Ear, small_workload

ADAMW = find_contestant("adamw")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    known = {name: small_workload(name) for name in ("small", "other")}
    monkeypatch.setattr(protocol, "find_workload", known.__getitem__)


def unit_points(out, contestant=ADAMW, study=0, count=4, workload="small"):
    search = Search(out)
    kept = search.study(workload, contestant, study, "max")
    search.point(kept, contestant, count - 1)
    return [tuple(t.params.values()) for t in kept.get_trials()]


def told(job):
    """What the journal holds, by study: points, values, states."""
    optuna = Search(job.store.out).optuna
    search = Search(job.store.out)
    return {
        s.study_name: [
            (t.number, t.state.name, t.values, t.params, t.user_attrs.get("settings"), t.user_attrs.get("status"))
            for t in optuna.load_study(study_name=s.study_name, storage=search.storage).get_trials()
        ]
        for s in optuna.get_all_study_summaries(search.storage)
    }


def test_a_study_gives_everybody_the_same_points(tmp_path):
    found = {c.name: unit_points(tmp_path, c) for c in (*ROSTER[::3], ADAMW)}
    assert len({tuple(points) for points in found.values()}) == 1
    assert unit_points(tmp_path, workload="other") == found["adamw"]
    points = found["adamw"]
    assert all(len(p) == DIMENSIONS for p in points)
    assert all(0 <= u <= 1 for p in points for u in p)
    assert len(set(points)) == 4


@pytest.mark.parametrize("study", [0, 2, 100])
def test_every_point_is_sobols(tmp_path, study):
    """The first one too, which Optuna by itself draws independently."""
    from scipy.stats import qmc

    expected = qmc.Sobol(DIMENSIONS, scramble=True, seed=study).random(8)
    for found, point in zip(unit_points(tmp_path, study=study, count=8), expected, strict=True):
        assert found == pytest.approx(tuple(point))


def test_studies_differ(tmp_path):
    found = [unit_points(tmp_path, study=study) for study in (0, 1, 2, 100)]
    assert len({p for points in found for p in points}) == 16


def test_points_cover_the_cube(tmp_path):
    points = unit_points(tmp_path, study=7, count=16)
    for axis in zip(*points, strict=True):
        assert {int(4 * u) for u in axis} == {0, 1, 2, 3}


def test_points_are_asked_for_once_and_in_order(tmp_path):
    search = Search(tmp_path)
    study = search.study("small", ADAMW, 0, "max")
    slot, point = search.point(study, ADAMW, 2)
    assert slot.number == 2
    assert len(study.get_trials()) == 3
    again = Search(tmp_path)
    kept = again.study("small", ADAMW, 0, "max")
    assert again.point(kept, ADAMW, 2)[1] == point
    assert again.point(kept, ADAMW, 0)[0].number == 0
    assert len(kept.get_trials()) == 3
    first = again.point(kept, ADAMW, 0)[0]
    assert point == {d.name: d.at(slot.params[f"u{i}"]) for i, d in enumerate(ADAMW.space)}
    assert list(first.params) == [f"u{i}" for i in range(DIMENSIONS)]


@pytest.mark.parametrize("upfront", [True, False])
def test_a_point_does_not_depend_on_what_was_told(tmp_path, upfront):
    search = Search(tmp_path)
    study, points = search.study("small", ADAMW, 3, "min"), []
    for number in range(4):
        slot, _ = search.point(study, ADAMW, number)
        points.append(tuple(slot.params.values()))
        if not upfront:
            search.tell(study, slot, 1.0, {})
    assert len(set(points)) == 4
    assert points == unit_points(tmp_path, study=3, workload="other")


@pytest.mark.parametrize(("own", "twin"), TWINS.items())
def test_twins_share_all_but_the_regularization(tmp_path, own, twin):
    search, found = Search(tmp_path), {}
    for contestant in map(find_contestant, (own, twin)):
        study = search.study("small", contestant, 1, "max")
        points = [search.point(study, contestant, n)[1] for n in range(5)]
        found[contestant.name] = points
    third = "gamma" if own == "kalman" else "weight_decay"
    for a, b in zip(found[own], found[twin], strict=True):
        assert {key: b[key] for key in ("lr", "horizon", third)} == {key: a[key] for key in ("lr", "horizon", third)}
        if own != "kalman":  # the strength where the twin's floor is, but for the part that is 0
            u = math.log(b["floor"] / FLOOR.low) / math.log(FLOOR.high / FLOOR.low)
            assert a["strength"] == pytest.approx(STRENGTH.at(u), rel=0.01)
    assert len({p["lr"] for p in found[own]}) > 1


@pytest.mark.parametrize(("goal", "direction"), [("max", "MAXIMIZE"), ("min", "MINIMIZE")])
def test_telling(tmp_path, goal, direction):
    search = Search(tmp_path)
    study = search.study("small", ADAMW, 0, goal)
    assert study.direction.name == direction
    for number, value in enumerate((0.5, None)):
        slot, _ = search.point(study, ADAMW, number)
        search.tell(study, slot, value, {"status": "finished", "seconds": 1.5})
        search.tell(study, search.point(study, ADAMW, number)[0], 9.0, {"status": "again"})
    trials = Search(tmp_path).study("small", ADAMW, 0, goal).get_trials()
    assert [(t.state.name, t.values) for t in trials] == [("COMPLETE", [0.5]), ("FAIL", None)]
    assert trials[0].user_attrs == {"status": "finished", "seconds": 1.5}


def test_no_warnings_of_optuna(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit_points(tmp_path)


@pytest.mark.parametrize("stop", [{"before": 3}, {"after": 5}])
def test_a_search_that_was_stopped_goes_on(tmp_path, stop):
    options = (["small", "other"], ["adamw", "sgd-momentum"])
    whole = Job(*options, tmp_path / "whole")
    whole.tune(2, 2)
    stopped = Job(*options, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.tune(2, 2, Ear(**stop))
    ear = Ear()
    found = Job(*options, tmp_path / "stopped").tune(2, 2, ear)
    done = next(iter(stop.values()))
    assert ear.counts == [(16, done)]
    assert len(found) == 16
    assert told(stopped) == told(whole)
    assert {state for rows in told(whole).values() for _, state, *_ in rows} == {"COMPLETE"}


def test_a_run_that_was_written_but_not_told_is_told_when_the_search_goes_on(tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    job = Job(["small"], ["adamw"], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            job.tune(1, 2)
    job.tune(1, 2)
    assert [row[1] for rows in told(job).values() for row in rows] == ["COMPLETE"] * 2


def test_a_search_can_be_made_longer(tmp_path):
    short, long = Job(["small"], ["adamw"], tmp_path / "short"), Job(["small"], ["adamw"], tmp_path / "long")
    short.tune(1, 2)
    short.tune(2, 4)
    long.tune(2, 4)
    assert told(short) == told(long)
