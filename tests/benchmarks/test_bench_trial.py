"""One run: fairness, what it records, what goes wrong, and going on after it was killed."""

import itertools
import json
import math
import time
from dataclasses import asdict, replace

import pytest
import torch
from grng.benchmarks.bench import Trial, run_trial
from grng.benchmarks.bench import trial as trial_module
from grng.benchmarks.bench.diagnosis import Diagnosis
from grng.benchmarks.bench.listener import describe
from grng.benchmarks.errors import InputError
from grng.benchmarks.loop import WARM_UP_STEPS, fit
from grng.benchmarks.records import storable
from torch.nn import functional as F

from .bench_tools import CPU, Small, generators, run, small_task, small_workload, untimed

ADAMW = Trial("small", "adamw", {"lr": 0.01})
NAMES = ("adamw", "ring", "kalman", "sophia-g", "adamw+gnp")
COUNTED = ("adamw+sam", "reng", "sophia-h", "kfac", "ekfac", "muon", "soap")


def of(name, **changes):
    return replace(ADAMW, optimizer=name, settings={}, **changes)


class Recording(Small):
    """Keeps the batches."""

    def loss(self, model, batch):
        self.__dict__.setdefault("seen", []).append(batch[0])
        return super().loss(model, batch)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_same_seed_gives_the_same_weights_and_batches(noise):
    found, batches = {}, {}
    for name in ("adamw", "sgd-momentum", "ring"):
        for seed in (0, 1):
            task = small_task(Recording, noise)
            found[name, seed] = run(of(name, seed=seed), task)
            batches[name, seed] = task.seen
    assert {o.status for o in found.values()} == {"finished"}
    for seed in (0, 1):
        mine = [o for (_, s), o in found.items() if s == seed]
        assert len({o.init_hash for o in mine}) == len({o.curve["loss"][0] for o in mine}) == 1
        assert torch.equal(batches["adamw", seed][3], batches["sgd-momentum", seed][3])
        assert len({o.curve["loss"][-1] for o in mine}) == 3
    assert len({o.init_hash for o in found.values()}) == 2
    assert not torch.equal(batches["adamw", 0][3], batches["adamw", 1][3])


def test_a_run_can_be_repeated():
    task = small_task(noise=0.1)
    first, second = (run(of("ring"), task) for _ in range(2))
    assert torch.equal(*task.weights)
    assert untimed(first.rows) == untimed(second.rows)
    assert first.curve == second.curve


@pytest.mark.parametrize("horizon", [1.0, 0.5, 0.15, 0.001])
def test_the_horizon_shortens_the_run_and_its_schedule(horizon, monkeypatch):
    asked = []
    made = trial_module.make_schedule
    monkeypatch.setattr(trial_module, "make_schedule", lambda *a: asked.append((a[0], *a[2:])) or made(*a))
    outcome = run(replace(ADAMW, horizon=horizon), steps=40, evaluate_every=10)
    steps = max(1, round(40 * horizon))
    assert outcome.steps == steps
    assert [row["step"] for row in outcome.rows] == [*range(10, steps, 10), steps]
    assert asked == [("cosine", steps, round(0.05 * steps))]


def test_no_warm_up_of_the_rate_under_a_constant_one(monkeypatch):
    asked = []
    monkeypatch.setattr(trial_module, "make_schedule", lambda *a: asked.append((a[0], *a[2:])))
    run(ADAMW, steps=40, schedule="constant")
    assert asked == [("constant", 40, 0)]


def test_what_is_recorded():
    task = small_task()
    outcome = run(ADAMW, task)
    assert (outcome.status, outcome.message, outcome.continued) == ("finished", "", 0)
    assert (outcome.metric, outcome.goal, outcome.data, outcome.key) == ("accuracy", "max", "small", ADAMW.key)
    assert (outcome.steps, outcome.gradient_evaluations, outcome.parameters) == (6, 6, 48 + 72 + 27)
    assert outcome.state_bytes >= 2 * 4 * outcome.parameters
    assert [row["evaluations"] for row in outcome.rows] == [3, 6]
    assert list(outcome.rows[0])[:5] == ["step", "seconds", "cpu_seconds", "evaluations", "train_loss"]
    assert {"loss", "accuracy", "brier"} < outcome.rows[0].keys()
    assert outcome.seconds == outcome.rows[-1]["seconds"] > outcome.rows[0]["seconds"] > 0
    assert outcome.cpu_seconds == outcome.rows[-1]["cpu_seconds"] > 0
    losses = outcome.curve["loss"]
    assert outcome.curve["step"] == [1, 2, 3, 4, 5, 6]
    assert [row["train_loss"] for row in outcome.rows] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert outcome.test.keys() == {"loss", "accuracy", "brier", "extra"}
    assert outcome.trial == asdict(ADAMW) | {"settings": {"lr": 0.01}}
    assert (outcome.workload, outcome.optimizer, outcome.seed) == ("small", "adamw", 0)


@pytest.mark.parametrize(("phase", "tested"), [("run", True), ("tune", False), ("target", False)])
def test_only_a_run_sees_the_test_set(phase, tested):
    task = small_task()
    outcome = run(replace(ADAMW, phase=phase), task)
    assert bool(outcome.test) == ("test" in task.asked) == bool(task.weights) == tested


@pytest.mark.parametrize("name", ["adamw", "ring", "sophia-g", "adamw+sam"])
def test_the_parts_of_a_step_sum_up(name):
    outcome = run(of(name), steps=20, evaluate_every=7)
    split = outcome.step_seconds
    assert split["gradient"] + split["update"] == pytest.approx(split["mean"], rel=1e-12)
    assert min(split["gradient"], split["update"]) > 0
    assert split["median"] <= split["p99"]
    assert 20 * split["mean"] == pytest.approx(outcome.seconds, rel=0.2)


def test_one_step_has_a_split_too():
    split = run(ADAMW, steps=1).step_seconds
    assert split["median"] == split["mean"] == split["p99"] > 0


def test_evaluation_and_listening_are_off_the_clock():
    class Slow(Small):
        def evaluate(self, model, split):
            time.sleep(1.0)
            return super().evaluate(model, split)

    outcome = run(ADAMW, small_task(Slow), lambda outcome: time.sleep(1.0))
    assert len(outcome.rows) == 2
    assert outcome.seconds < 1.0
    assert outcome.step_seconds["p99"] < 1.0


class Raising(Small):
    def loss(self, model, batch):
        calls = self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        if calls > WARM_UP_STEPS + 4:
            raise RuntimeError("singular")
        return super().loss(model, batch)


class Losing(Small):
    """The loss of the fifth step after the warm-up is not finite."""

    def loss(self, model, batch):
        calls = self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return super().loss(model, batch) * (math.nan if calls == WARM_UP_STEPS + 5 else 1)


class Blind(Small):
    def evaluate(self, model, split):
        return super().evaluate(model, split) | {"accuracy": math.nan}


@pytest.mark.parametrize(
    ("kind", "trial", "status", "message", "rows", "best"),
    [
        (Small, ADAMW, "finished", "", 2, True),
        (Small, of("sgd-momentum", horizon=1.0), "finished", "", 2, True),
        (Raising, ADAMW, "failed", "RuntimeError: singular", 1, True),
        (Losing, ADAMW, "diverged", "the training loss was not finite by step 6", 2, True),
        (Blind, ADAMW, "finished", "", 2, False),
        (Small, replace(ADAMW, optimizer="sgd", settings={"lr": 1e38}), "diverged", "the training loss", 2, True),
        (Small, replace(ADAMW, settings={"lr": -1.0}), "failed", "ValueError: Invalid learning rate", 0, False),
        (Small, replace(ADAMW, optimizer="none"), "failed", "ValueError: unknown optimizer 'none'", 0, False),
    ],
)
def test_whatever_happens_is_recorded_and_the_generators_are_left_alone(kind, trial, status, message, rows, best):
    before, count = generators(), torch.get_num_threads()
    outcome = run(trial, small_task(kind, noise=0.1))
    assert generators() == before
    assert torch.get_num_threads() == count
    assert outcome.status == status
    assert outcome.message.startswith(message)
    assert len(outcome.rows) <= rows if status == "diverged" else len(outcome.rows) == rows
    assert (outcome.best() is not None) == best
    assert bool(outcome.test) == (status == "finished"), "the test set is for what was trained to the end"
    assert trial.title in describe(trial, outcome)
    assert ("failed" in describe(trial, outcome)) == (status == "failed")
    json.dumps(storable(asdict(outcome)), allow_nan=False)
    if status == "failed":
        assert outcome.time_to(-1.0, "step") == math.inf


class Greedy(Small):
    """Evaluation takes 300 MB."""

    def evaluate(self, model, split):
        torch.ones(75_000_000)
        return super().evaluate(model, split)


def test_memory_is_that_of_training():
    plain, greedy = (run(ADAMW, small_task(kind)).peak_memory for kind in (Small, Greedy))
    assert greedy < plain + 100e6


def test_an_interruption_is_not_a_failure(tmp_path):
    def stop(outcome):
        raise KeyboardInterrupt

    before = generators()
    with pytest.raises(KeyboardInterrupt):
        run(ADAMW, None, stop, tmp_path / "checkpoint.pt")
    assert generators() == before


# Going on.


def killed_and_continued(trial, path, monkeypatch, at=2, kind=Small):
    """The same trial twice: at a stretch, and killed at an evaluation and gone on with."""
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0)
    whole, task = small_task(kind, noise=0.1), small_task(kind, noise=0.1)
    options = {"steps": 24, "evaluate_every": 6}

    def stop(outcome):
        if len(outcome.rows) == at:
            raise KeyboardInterrupt

    first = run(trial, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        run(trial, task, stop, path, **options)
    assert path.exists()
    second = run(trial, task, lambda outcome: None, path, **options)
    assert not path.exists()
    assert not list(path.parent.iterdir())
    assert [o.status for o in (first, second)] == ["finished"] * 2, second.message
    return first, second, whole.weights[0], task.weights[0]


@pytest.mark.parametrize(("name", "at"), [*((n, at) for n in NAMES for at in (1, 4)), *((n, 2) for n in COUNTED)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, at, tmp_path, monkeypatch):
    first, second, *weights = killed_and_continued(of(name), tmp_path / "checkpoint.pt", monkeypatch, at)
    assert torch.equal(*weights)
    assert untimed(first.rows) == untimed(second.rows)
    assert (first.curve, first.test, first.steps) == (second.curve, second.test, second.steps)
    assert first.gradient_evaluations == second.gradient_evaluations
    assert (first.continued, second.continued) == (0, 1)
    seconds = [row["seconds"] for row in second.rows]
    assert seconds == sorted(seconds)
    assert second.seconds == seconds[-1]


class Dropping(Small):
    """The loss takes from the global generator, as dropout does."""

    def loss(self, model, batch):
        return super().loss(model, (F.dropout(batch[0], 0.2), batch[1]))


def test_the_generators_go_on_too(tmp_path, monkeypatch):
    first, second, *weights = killed_and_continued(ADAMW, tmp_path / "checkpoint.pt", monkeypatch, kind=Dropping)
    assert torch.equal(*weights)
    assert untimed(first.rows) == untimed(second.rows)


def test_diagnostics_go_on_too(tmp_path, monkeypatch):
    trial = replace(ADAMW, diagnose=True)
    first, second, *weights = killed_and_continued(trial, tmp_path / "checkpoint.pt", monkeypatch)
    assert torch.equal(*weights)
    assert untimed(first.rows) == untimed(second.rows)


@pytest.mark.parametrize(
    ("lr_warmup", "horizon", "rising"),
    [(0.0, 1.0, 0), (0.25, 1.0, 10), (0.25, 0.5, 5), (7, 1.0, 7), (7, 0.5, 7), (1, 0.5, 1)],
)
def test_a_rate_rises_over_a_part_of_the_run_or_so_many_steps(lr_warmup, horizon, rising):
    trial = replace(ADAMW, lr_warmup=lr_warmup, horizon=horizon)
    workload = small_workload(steps=40)
    assert trial.rising(workload) == rising
    assert trial.rising(replace(workload, schedule="constant")) == 0
    with pytest.raises(InputError, match=r"lr_warmup is 40 steps, and a run of small, .* has 40: give fewer"):
        replace(ADAMW, lr_warmup=40).rising(workload)


@pytest.mark.parametrize("name", ["adamw", "ring", "kalman", "sophia-g", "sophia-g+agr", "soap+gnp"])
def test_diagnostics_do_not_change_the_run(name):
    """Hooks in the model take nothing from them, and draw no labels for them."""
    plain, watched = small_task(noise=0.1), small_task(noise=0.1)
    run(of(name), plain, steps=24)
    outcome = run(of(name, diagnose=True), watched, steps=24)
    assert all(row["gradient_norm"] > 0 for row in outcome.rows)
    assert len(outcome.rows) == 8
    assert all(-1 <= row["pearson"] <= 1 for row in outcome.rows)
    assert math.isfinite(outcome.diagnosis["sharpness"])
    assert torch.equal(plain.weights[0], watched.weights[0])


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0])
def test_pearson_is_of_the_gradients_before_and_after_a_step(scale):
    task = small_task()
    torch.manual_seed(1)
    model = task.model()
    diagnosis = Diagnosis(task, CPU)
    gradients = []
    for _ in range(2):
        task.loss(model, diagnosis.batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if len(gradients) == 1:
            diagnosis.before(model)
        for p in model.parameters():
            p.data.add_(torch.randn_like(p), alpha=scale)
            p.grad = None
        if len(gradients) == 1:
            row = diagnosis(model)
    assert row["pearson"] == pytest.approx(torch.corrcoef(torch.stack(gradients))[0, 1].item(), rel=1e-4, abs=1e-5)
    assert row["gradient_norm"] == pytest.approx(gradients[1].norm().item(), rel=1e-5)
    assert "pearson" not in diagnosis(model)  # nothing was measured a step before


@pytest.mark.parametrize("every", [1, 3, 4])
def test_the_clock_stands_while_something_is_measured_before_a_step(every):
    steps, seen = [], []

    def stepper(batch):
        steps.append(batch)
        return torch.zeros(())

    def before_last():
        seen.append(len(steps))
        time.sleep(0.02)

    trace = fit(stepper, None, itertools.count(), 9, every, CPU, lambda trace: None, None, before_last)
    ends = sorted({*range(every, 10, every), 9})
    assert seen == [end - 1 for end in ends]
    assert steps == list(range(9))
    assert len(trace.losses) == len(trace.step_seconds) == 9
    assert trace.seconds < 0.02 * len(ends)
    assert trace.seconds == pytest.approx(sum(trace.step_seconds))


def test_a_run_that_goes_on_with_other_code_is_neither_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0)

    def stop(outcome):
        raise KeyboardInterrupt

    for source in ("old", "newer"):  # killed twice
        with pytest.raises(KeyboardInterrupt):
            run(ADAMW, small_task(), stop, tmp_path / "checkpoint.pt", source=source)
    outcome = run(ADAMW, small_task(), lambda outcome: None, tmp_path / "checkpoint.pt", source="newest")
    assert outcome.environment["source"] == "old, then newer, then newest"


@pytest.mark.parametrize(
    "other", [replace(ADAMW, seed=1), replace(ADAMW, settings={"lr": 0.02}), replace(ADAMW, horizon=0.5)]
)
def test_the_checkpoint_of_another_trial_is_ignored(other, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0)
    path, task, fresh = tmp_path / "checkpoint.pt", small_task(), small_task()

    def stop(outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ADAMW, task, stop, path)
    found, expected = run(other, task, lambda outcome: None, path), run(other, fresh)
    assert (found.continued, len(found.rows)) == (0, len(expected.rows))
    assert torch.equal(task.weights[0], fresh.weights[0])


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"text"])
def test_a_run_whose_checkpoint_cannot_be_read_begins_anew(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0)
    path = tmp_path / "checkpoint.pt"

    def stop(outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ADAMW, None, stop, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="checkpoint.pt cannot be read .*: the run begins anew"):
        outcome = run(ADAMW, None, lambda outcome: None, path)
    assert (outcome.status, outcome.continued, outcome.steps) == ("finished", 0, 6)


def test_short_runs_write_no_checkpoint(tmp_path):
    path, seen = tmp_path / "checkpoint.pt", []
    run(ADAMW, None, lambda outcome: seen.append(path.exists()), path)
    assert seen == [False, False]


def test_keys_tell_trials_apart():
    changes = [
        {"workload": "other"},
        {"optimizer": "adamw/x"},
        {"settings": {"lr": 0.02}},
        {"horizon": 0.5},
        {"budget": 0.5},
        {"lr_warmup": 0.1},
        {"seed": 1},
        {"phase": "tune"},
    ]
    trials = [ADAMW, *(replace(ADAMW, **change) for change in changes)]
    assert len({t.key for t in trials}) == len(trials)
    listed, paired = (replace(ADAMW, settings={"betas": betas}) for betas in ([0.9, 0.99], (0.9, 0.99)))
    assert listed.key == paired.key, "JSON knows no tuples"
    assert [replace(ADAMW, phase=p).title for p in ("run", "tune")] == [
        "small, adamw, seed 0",
        "small, adamw, study 0, trial 0",
    ]


def test_labels_share_the_optimizer():
    task = small_task()
    for name in ("adamw", "adamw/x"):
        run_trial(replace(ADAMW, optimizer=name), small_workload(), task, CPU, {})
    assert torch.equal(*task.weights)
