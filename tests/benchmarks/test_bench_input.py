"""What `grng bench` refuses, how it ends, and which of its options win."""

import csv
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from grng.benchmarks.bench import Job, protocol, workloads_of
from grng.benchmarks.bench.cli import names
from grng.benchmarks.bench.recipes import read_bench_recipe
from grng.benchmarks.bench.store import Store
from grng.benchmarks.bench.targets import read_targets, write_targets
from grng.benchmarks.cli import make_app
from grng.benchmarks.errors import InputError, MissingExtra
from grng.benchmarks.workloads import Workload
from typer.testing import CliRunner

from .bench_tools import Ear, small_workload

QUICK = ("--workload", "digits-mlp", "--optimizer", "adamw", "--budget", "0.005")


def call(*arguments):
    return CliRunner().invoke(make_app(), ["bench", *map(str, arguments)])


BAD = [
    ({"workloads": ["mnist"]}, "unknown workload 'mnist': choose one of digits-mlp"),
    ({"optimizers": ["adam"]}, "unknown optimizer 'adam': choose one of ring"),
    ({"optimizers": ["adamw+dropout"]}, "unknown regularizer 'dropout' in 'adamw"),
    ({"optimizers": ["adamw/"]}, "the label of 'adamw/' is empty"),
    ({"optimizers": ["none.py"]}, "no file 'none.py': give a Python file with a function `build`"),
    ({"optimizers": ["torch.optim:None_"]}, "no optimizer 'torch.optim:None_' .*: give MODULE:CLASS"),
    ({"device": "tpu"}, "unknown device 'tpu': choose one of cpu, cuda, auto"),
    ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
    ({"clock": "hours"}, "unknown clock 'hours': choose one of seconds, cpu_seconds, step, evaluations"),
    *(
        ({"budget": budget}, f"budget is {budget!r}: give the length as a multiple")
        for budget in (0, -0.1, float("inf"), float("nan"))
    ),
    ({"settings": {"soap": {"lr": 1}}}, "settings for 'soap', which takes no part: choose adamw"),
    *(({"lr_warmup": x}, f"lr_warmup is {x!r}: give a part of the run") for x in (-0.1, 1.5, math.inf, math.nan)),
    ({"threads": 0}, "threads is 0: give a whole number of 1 or more"),
    ({"aim": "both"}, "unknown aim 'both': choose one of time, value"),
    *(
        ({"settings": {"adamw": {"horizon": part}}}, f"the horizon of 'adamw' is {part!r}: give the part of the budget")
        for part in (0, -1.0, 1.5, "abc", True, float("nan"))
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_jobs_are_refused_before_anything_is_made(tmp_path, changes, message):
    options = {"workloads": ["digits-mlp"], "optimizers": ["adamw"], "out": tmp_path / "out", "budget": 0.005}
    with pytest.raises(InputError, match=message):
        Job(**(options | changes)).run(1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "fashion-cnn",
            None,
            "needs the data set 'fashion_mnist': give the folder it lies in with --data, or GRNG_DATA",
        ),
        ("fashion-cnn", "here", r"fashion_mnist, which is not there \(it has out\): give .* with --data"),
        ("packaged", None, r"'packaged' needs no_such_package, nor_this: pip install 'grng\[bench,integrations\]'"),
    ],
)
def test_missing_data_and_packages(tmp_path, monkeypatch, name, data, message):
    if name == "packaged":
        workload = small_workload(name, needs=("torch", "no_such_package", "nor_this"))
        monkeypatch.setattr(protocol, "find_workload", lambda name: workload)
    ear = Ear()
    job = Job([name], ["adamw"], tmp_path / "out", data and tmp_path)
    for make in (lambda: job.run(1, False, ear), lambda: job.tune(1, 1, ear)):
        with pytest.raises(InputError, match=message):
            make()
    assert ear.titles == []


def test_all_that_is_missing_is_named_at_once(tmp_path):
    job = Job(["uci-energy", "fashion-cnn", "mnist1d-cnn", "digits-mlp"], ["adamw"], tmp_path / "out", tmp_path / "no")
    with pytest.raises(InputError, match=r"uci_regression.*no such folder.*fashion_mnist.*mnist1d") as told:
        job.run(1, False)
    assert str(told.value).count("; ") == 2


@pytest.mark.parametrize("command", ["run", "tune"])
def test_a_tier_leaves_out_what_lacks_data_and_says_so(tmp_path, monkeypatch, command):
    known = {
        "small": small_workload(),
        "other": small_workload("other", data=("absent", "also_absent")),
        "third": small_workload("third", needs=("no_such_package",)),
    }
    monkeypatch.setattr(protocol, "all_workloads", lambda: known)
    monkeypatch.setattr(protocol, "find_workload", known.__getitem__)
    (tmp_path / "data").mkdir()
    options = "--tier", "fast", "--optimizer", "sgd", "--budget", "0.5", "--out", tmp_path / "out"
    options = *options, *(("--seeds", 1, "--no-diagnose") if command == "run" else ("--studies", 1, "--trials", 1))
    result = call(command, *options, "--data", tmp_path / "data")
    assert result.exit_code == 0, result.output
    assert [line.split(" (")[0] for line in result.stderr.splitlines()] == [
        "left out: other, for want of absent, also_absent",
        "left out: third, for want of no_such_package",
    ]
    assert {o.workload for o in Store(tmp_path / "out").outcomes()} == {"small"}
    del known["small"]
    result = call(command, *options, "--data", tmp_path / "data")
    assert result.exit_code == 2
    assert "workload 'other' needs" in result.stderr
    assert "workload 'third' needs no_such_package" in result.stderr


def test_a_text_where_a_number_is_wanted_is_pointed_out(tmp_path):
    result = call("run", *QUICK, "--out", tmp_path / "out", "--set", "adamw.lr=abc")
    assert result.exit_code == 2
    assert "lr='abc' is text: give a number if one is wanted" in result.stderr


@pytest.mark.parametrize("settings", [{"learning": 1}, {"lr": -1.0}, {"gnp": {"r": 1}}])
def test_settings_that_no_optimizer_takes_are_known_before_the_runs(tmp_path, settings):
    ear = Ear()
    job = Job(["digits-mlp"], ["sgd", "adamw"], tmp_path, budget=0.005, settings={"adamw": settings})
    with pytest.raises(InputError, match="optimizer 'adamw' cannot be built with "):
        job.run(1, False, ear)
    assert ear.titles == []


def test_a_missing_optuna_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises((InputError, MissingExtra), match=r"optuna.*pip install 'grng\[bench\]'"):
        Job(["digits-mlp"], ["adamw"], tmp_path, budget=0.005).tune(1, 1)


# The command line.


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizer", "adam"), "unknown optimizer 'adam'"),
        (("--workload", "mnist"), "unknown workload 'mnist'"),
        (("--budget", "-2"), "budget is -2.0: give"),
        (("--device", "tpu"), "unknown device 'tpu'"),
        (("--set", "adamw.lr"), "--set 'adamw.lr' is malformed"),
        (("--lr-warmup", "5000", "--budget", "1"), "lr_warmup is 5000 steps, and a run of digits-mlp, adamw, "),
        (("--set", "soap.lr=1"), "settings for 'soap', which takes no part"),
        (("--set", "adamw.rate=1"), "optimizer 'adamw' cannot be built with {"),
        (("--recipe", "none.toml"), "recipe none.toml cannot be read"),
        (("--log", "paper"), "unknown log 'paper': choose one of tensorboard, wandb"),
        (("--workload", "fashion-cnn"), "workload 'fashion-cnn' needs the data set"),
    ],
)
def test_bad_input_gets_one_line_and_status_two(tmp_path, monkeypatch, command, arguments, message):
    monkeypatch.delenv("GRNG_DATA", raising=False)
    result = call(command, *QUICK, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"grng bench {command}: error: {message}")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report",), "holds no runs: make some with grng bench tune or grng bench run"),
        (("report", "--clock", "hours"), "holds no runs"),
        (("targets", "--tier", "middle"), "unknown tier 'middle': choose one of fast, full"),
        (("run", "--tier", "middle"), "unknown tier 'middle': choose one of fast, full"),
    ],
)
def test_further_refusals(tmp_path, arguments, message):
    result = call(*arguments, "--out", tmp_path / "out")
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "run_trial", stop)
        result = call("run", *QUICK, "--seeds", 1, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "grng bench run: interrupted; the same command goes on where it was\n"
    again = call("run", *QUICK, "--seeds", 1, "--no-diagnose", "--out", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("[1/1] digits-mlp, adamw, seed 0: best accuracy ")
    assert "1 runs, 0 failed" in again.stdout
    third = call("run", *QUICK, "--seeds", 1, "--no-diagnose", "--out", tmp_path / "out")
    assert third.stdout.startswith("1 of 1 runs are there already\n")


def test_a_failed_run_makes_the_status_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: 1 / 0)
    result = call("run", *QUICK, "--seeds", 1, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "seed 0: failed, ZeroDivisionError: division by zero" in result.stdout
    assert "1 runs, 1 failed" in result.stdout
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 2


def test_names_are_separated_by_commas_or_repeated():
    assert names(["a, b", "c", ","]) == ["a", "b", "c"]
    assert names(None) == []


def test_status_without_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("GRNG_DATA", raising=False)
    result = call("status", "--out", tmp_path / "none")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "none needed" in lines["digits-mlp"]
    assert "missing fashion_mnist" in lines["fashion-cnn"]
    assert not (tmp_path / "none").exists()


# Recipes.

RECIPE = """
workloads = ["digits-mlp"]
optimizers = ["adamw", "sgd"]
studies = 1
trials = 2
seeds = 1
budget = 0.005
device = "cpu"
threads = 1
clock = "step"
[settings.adamw]
lr = 0.02
weight_decay = 0.5
"""


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that commands make, and how they are called; nothing runs, and no data is missing."""
    found = []
    monkeypatch.setattr(Workload, "lacks", lambda workload, root: {})
    for phase in ("run", "tune"):
        monkeypatch.setattr(Job, phase, lambda job, *rest: found.append((job, rest)) or [])
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {}),
        (("--budget", "0.01"), {"budget": 0.01}),
        (("--clock", "seconds"), {"clock": "seconds"}),
        (("--lr-warmup", "20"), {"lr_warmup": 20.0}),
        (("--optimizer", "adamw"), {"optimizers": ("adamw",)}),
        (("--workload", "digits-mlp"), {}),
        (("--tier", "fast"), {"workloads": workloads_of("fast", [])}),
        (("--seeds", "2"), {"seeds": 2}),
        (("--set", "adamw.lr=0.1"), {"settings": {"adamw": {"lr": 0.1, "weight_decay": 0.5}}}),
        (("--set", "sgd.lr=0.1"), {"settings": {"adamw": {"lr": 0.02, "weight_decay": 0.5}, "sgd": {"lr": 0.1}}}),
    ],
)
def test_a_recipe_gives_options_and_the_command_line_overrides_them(tmp_path, jobs, arguments, expected):
    (tmp_path / "job.toml").write_text(RECIPE)
    result = call("run", "--recipe", tmp_path / "job.toml", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 0, repr(result.exception)
    [(job, (seeds, *_))] = jobs
    found = {key: getattr(job, key) for key in ("budget", "lr_warmup", "clock", "device", "threads", "settings")}
    found |= {"optimizers": tuple(job.optimizers), "workloads": list(job.workloads), "seeds": seeds}
    assert (
        found
        == {
            "budget": 0.005,
            "lr_warmup": 0.05,
            "clock": "step",
            "device": "cpu",
            "threads": 1,
            "settings": {"adamw": {"lr": 0.02, "weight_decay": 0.5}},
            "optimizers": ("adamw", "sgd"),
            "workloads": ["digits-mlp"],
            "seeds": 1,
        }
        | expected
    )


def test_a_recipe_of_a_tier(tmp_path, jobs):
    (tmp_path / "job.toml").write_text('tier = "fast"\nstudies = 2\ntrials = 4\n')
    for tier in ((), ("--tier", "full")):
        result = call("tune", "--recipe", tmp_path / "job.toml", "--out", tmp_path / "out", *tier)
        assert result.exit_code == 0, repr(result.exception)
    assert jobs[0][1][:2] == (2, 4)
    assert all(w.tier == "fast" for w in jobs[0][0].known.values())
    assert all(w.tier == "full" for w in jobs[1][0].known.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds =", r"job\.toml cannot be read .*: give a TOML file"),
        ("epochs = 3", "unknown key in .*job.toml: 'epochs': choose one of workloads, optimizers"),
        ("out = 'x'", "'out': choose one of"),
        ("seeds = 'many'", "seeds is 'many', of the wrong type: see grng bench run --help"),
        ("seeds = 1.5", "seeds is 1.5, of the wrong type"),
        ("seeds = true", "seeds is True, of the wrong type"),
        ("budget = '1'", "budget is '1', of the wrong type"),
        ("workloads = 'digits-mlp'", "workloads is 'digits-mlp', of the wrong type"),
        ("tier = 1", "tier is 1, of the wrong type"),
        ("settings = 3", "settings is 3, of the wrong type"),
        ("[settings]\nadamw = 3", r"settings\.adamw"),
        ("optimizers = [1]", "optimizers"),
        ("workloads = [1]", "workloads"),
        ("lr_warmup = '1'", "lr_warmup is '1', of the wrong type"),
        ("seeds = 0", "seeds"),
        ("trials = -1", "trials"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_bench_recipe(tmp_path / "job.toml")


def test_a_recipe_is_read(tmp_path):
    (tmp_path / "job.toml").write_text(RECIPE)
    found = read_bench_recipe(tmp_path / "job.toml")
    assert found["settings"] == {"adamw": {"lr": 0.02, "weight_decay": 0.5}}
    assert (found["trials"], found["budget"], found["optimizers"]) == (2, 0.005, ["adamw", "sgd"])


def test_a_part_of_a_recipe_can_be_run(tmp_path):
    """Settings of its optimizers that are not asked for go with them; those of others are still a mistake."""
    recipe = tmp_path / "job.toml"
    recipe.write_text(
        'workloads = ["digits-mlp"]\noptimizers = ["sgd", "adamw"]\nbudget = 0.01\n'
        "[settings.sgd]\nlr = 0.1\n[settings.adamw]\nlr = 0.01\n"
    )
    arguments = ("run", "--recipe", recipe, "--seeds", 1, "--no-diagnose", "--out", tmp_path / "out")
    done = call(*arguments, "--optimizer", "adamw")
    assert done.exit_code == 0, done.output
    assert "1 runs, 0 failed" in done.stdout
    recipe.write_text(recipe.read_text() + "[settings.soap]\nlr = 0.1\n")
    refused = call(*arguments, "--optimizer", "adamw")
    assert "settings for 'soap', which takes no part: choose adamw" in refused.stderr


def test_own_targets(tmp_path):
    """Targets of one's own count in run, report and status, beside the frozen ones, from the line or from a recipe."""
    path = tmp_path / "mine.json"
    frozen = read_targets()
    write_targets(path, {"digits-mlp": replace(frozen["digits-mlp"], value=0.05)})
    out = tmp_path / "out"
    done = call("run", *QUICK, "--seeds", 1, "--no-diagnose", "--out", out, "--targets", path)
    assert done.exit_code == 0, done.output
    report = call("report", "--out", out, "--clock", "step", "--targets", path)
    assert report.exit_code == 0, report.output
    assert "target accuracy ≥ 0.05" in (out / "results.md").read_text()
    rows = [line.split() for line in call("status", "--out", out, "--targets", path).stdout.splitlines()]
    assert next(row for row in rows if row[:1] == ["digits-mlp"])[4] == "0.05"
    recipe = tmp_path / "job.toml"
    recipe.write_text('targets = "mine.json"\n')
    assert read_bench_recipe(recipe)["targets"] == path
    missing = call("run", *QUICK, "--out", out, "--targets", tmp_path / "none.json")
    assert (missing.exit_code, "none.json holds no targets" in missing.stderr) == (2, True)


def test_own_optimizers_are_set_by_the_name_they_get(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "import torch\n\n\ndef build(params, lr=0.1):\n    return torch.optim.SGD(params, lr)\n"
    (tmp_path / "mine_own.py").write_text(text)
    arguments = ("--workload", "digits-mlp", "--budget", 0.01, "--seeds", 1, "--no-diagnose", "--out", tmp_path / "out")
    both = "mine_own.py,mine_own/two"
    done = call("run", *arguments, "--optimizer", both, "--set", "mine_own.lr=0.25")
    assert done.exit_code == 0, done.output
    (settings,) = (tmp_path / "out").glob("run/mine_own/*/*/*/hparams.json")
    assert json.loads(settings.read_text())["lr"] == 0.25
    for code, said in (
        (text, "there already\n"),
        (text + "\n", "there already, 2 of them made by other code: give a new"),
    ):
        (tmp_path / "mine_own.py").write_text(code)
        again = call("run", *arguments, "--optimizer", both, "--set", "mine_own.lr=0.25")
        assert f"2 of 2 runs are {said}" in again.output


def test_who_set_a_target_is_not_searched(tmp_path):
    refused = call("tune", "--workload", "digits-mlp", "--optimizer", "adamw/target", "--out", tmp_path / "out")
    assert (refused.exit_code, "is not searched; leave out /target" in refused.stderr) == (2, True)


def test_tables_of_what_was_interrupted(tmp_path, monkeypatch):
    made = protocol.run_trial
    done = []

    def stop(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return made(*arguments, **options)

    monkeypatch.setattr(protocol, "run_trial", stop)
    assert call("run", *QUICK, "--seeds", 3, "--no-diagnose", "--out", tmp_path / "out").exit_code == 130
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 1
    assert {"budget", "lr_warmup", "test_brier", "test_ece"} < rows[0].keys()
