"""Our runs of DeepOBS's problems beside its published curves."""

import math
from pathlib import Path

import pytest
from grng.benchmarks.bench import Job, Store, Trial, read_targets
from grng.benchmarks.bench.landing import at
from grng.benchmarks.bench.recipes import read_bench_recipe
from grng.benchmarks.bench.report import write_report
from grng.benchmarks.workloads import deepobs

from .bench_tools import made

FMNIST = "deepobs-fmnist-2c2d"
CURVE = {"lowest": [0.1, 0.5, 0.7, 0.9], "median": [0.1, 0.6, 0.8, 0.92], "highest": [0.1, 0.7, 0.9, 0.94]}
KNOWN = {"median_epochs": 3.0, "first": 2.0, "last": 3.0, "reached": 8, "seeds": 10}
PUBLISHED = {
    "fmnist_2c2d": {
        "target": 0.9,
        "optimizers": {
            "SGD": {"learning_rate": 0.158489, "momentum": 0.0, **KNOWN, **CURVE},
            "momentum": {"learning_rate": 0.0025, "momentum": 0.99, **KNOWN, **CURVE},
            "Adam": {"learning_rate": 0.001, "momentum": 0.0, **KNOWN, **CURVE},
        },
    }
}
SGD, MOMENTUM, ADAM = {"lr": 0.158489}, {"lr": 0.0025, "momentum": 0.99}, {"lr": 0.001, "weight_decay": 0.0}


def landed(folder, found, published=PUBLISHED, title="Landing on"):
    store = Store(folder)
    store.prepare()
    for o in found:
        store.write(Trial(**o.trial), o)
    text = write_report(store, "seconds", targets={}, published=published)[1].read_text()
    _, _, part = text.partition(f"## {title} DeepOBS's baselines")
    rows = [line.strip("| ").split(" | ") for line in part.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def test_rows_by_hand(tmp_path):
    found = [
        made(FMNIST, "sgd", [0.6, 0.95, 0.91], settings=SGD, seed=0),
        made(FMNIST, "sgd", [0.4, 0.85, 0.89], settings=SGD, seed=1),
        made(FMNIST, "sgd-momentum", [0.65, 0.9], settings=MOMENTUM),
        made(FMNIST, "adamw", [0.45, 0.85, 0.95], settings=ADAM),
        made(FMNIST, "ring", [0.9, 0.95, 0.96]),
    ]
    rows = landed(tmp_path, found)
    assert list(rows) == [(FMNIST, name) for name in ("sgd", "sgd-momentum", "adamw")]
    theirs = ["3 (2 to 3)", "8/10"]
    # Medians 0.5, 0.9, 0.9: half of three epochs is the last two, (0.9 - 0.8 + 0.9 - 0.92) / 2 apart.
    assert rows[FMNIST, "sgd"] == [*theirs, "2, missed", "1/2", "missed", "92.00", "90.00", "+4.00", "3/3"]
    assert rows[FMNIST, "sgd-momentum"] == [*theirs, "2", "1/1", "2", "80.00", "90.00", "+10.00", "2/2"]
    assert rows[FMNIST, "adamw"] == [*theirs, "3", "1/1", "3", "92.00", "95.00", "+4.00", "1/3"]
    assert (tmp_path / "figures" / "landing.png").read_bytes().startswith(b"\x89PNG")


def test_everything_else_is_beside_them(tmp_path):
    found = [
        made(FMNIST, "adamw", [0.45, 0.85, 0.95], settings=ADAM),
        made(FMNIST, "ring", [0.91, 0.95, 0.96], seed=0),
        made(FMNIST, "ring", [0.89, 0.94, 0.92], seed=1),
        made(FMNIST, "kfac", [0.5, 0.7], settings={"lr": 0.1}),
        made("digits-mlp", "ring", [0.91, 0.95, 0.96]),
    ]
    rows = landed(tmp_path, found, title="Beside")
    theirs = "SGD 3, momentum 3, Adam 3"
    assert list(rows) == [(FMNIST, "ring"), (FMNIST, "kfac")]
    assert rows[FMNIST, "ring"] == ["90", "1, 2", "2/2", "1.5", "0.50", theirs, "3", "95.00", "94.00"]
    assert rows[FMNIST, "kfac"] == ["90", "missed", "0/1", "missed", "missed", theirs, "2", "70.00", "70.00"]
    assert (tmp_path / "figures" / "landing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {"lr": 0.1}),
        ("sgd", SGD | {"momentum": 0.9}),
        ("sgd", SGD | {"weight_decay": 0.1}),
        ("sgd-momentum", {"lr": 0.0025}),
        ("sgd-momentum", MOMENTUM | {"nesterov": True}),
        ("adamw", ADAM | {"weight_decay": 0.01}),
        ("ring", SGD),
    ],
)
def test_other_settings_do_not_land(name, settings, tmp_path):
    found = [made(FMNIST, name, [0.5, 0.9], settings=settings)]
    assert landed(tmp_path, found) == {}


def test_without_published_curves_there_is_no_section(tmp_path):
    assert landed(tmp_path, [made(FMNIST, "sgd", [0.5, 0.9], settings=SGD)], None) == {}


def test_targets_are_the_published_ones():
    targets = read_targets()
    for problem, value in deepobs.TARGETS.items():
        target = targets[f"deepobs-{problem.replace('_', '-')}"]
        assert (target.value, target.metric, target.goal) == (value, "accuracy", "max")
        assert math.isfinite(value)


@pytest.mark.parametrize("recipe", ["deepobs-fmnist", "deepobs-cifar10"])
def test_what_the_recipes_run_lands(recipe, tmp_path):
    """With the settings as they reach the optimizer, those that its row of the roster fixes included."""
    options = read_bench_recipe(Path(__file__).parents[2] / "recipes" / "bench" / f"{recipe}.toml")
    job = Job(options["workloads"], options["optimizers"], tmp_path, device="cpu", settings=options["settings"])
    for contestant in job.contestants:
        settings, horizon = job.best([], options["workloads"][0], contestant)
        given = options["settings"][contestant.name]
        theirs = {"learning_rate": given["lr"], "momentum": given.get("momentum", 0.0)}
        assert at(theirs, made(FMNIST, contestant.name, [0.5], settings=settings)), contestant.name
        assert horizon == 1.0
