"""Grids, the validation set, and the best settings that go into the next recipe."""

import csv
import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from grng.benchmarks import CompareConfig, InputError, compare, report
from grng.benchmarks.cli import make_app
from grng.benchmarks.config import read_recipe
from grng.benchmarks.data import hold_out, load_data
from grng.benchmarks.records import RunRecord, read_runs
from grng.benchmarks.report import DRAWN, drawn
from grng.benchmarks.summary import Summary
from grng.benchmarks.tuning import best_of, expand, toml, write_best
from typer.testing import CliRunner

GRID = """
epochs = 2
seeds = 2
batch-size = 256
validation = true
optimizers = ["sgd"]
[settings."adamw+gnp"]
weight_decay = 0.1
[settings."adamw+gnp".gnp]
alpha = 0.7
[grid."adamw+gnp"]
lr = [1e-5, 3e-3]
"gnp.r" = [0.02, 0.05]
[grid.adamw]
lr = [1e-5, 3e-3]
"""
POINTS = [f"adamw+gnp/lr={lr},gnp.r={r}" for lr in ("1e-05", "0.003") for r in (0.02, 0.05)]


def call(*arguments):
    return CliRunner().invoke(make_app(), ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One grid on a validation set, looked at by several tests."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "job.toml").write_text(GRID)
    result = call("--recipe", folder / "job.toml", "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder, result.output, {(r.optimizer, r.seed): r for r in read_runs(folder / "out")}


def test_a_grid_is_all_combinations_beside_the_optimizers(tuned):
    _, _, runs = tuned
    names = ["sgd", *POINTS, "adamw/lr=1e-05", "adamw/lr=0.003"]
    assert set(runs) == {(name, seed) for name in names for seed in (0, 1)}
    assert runs[POINTS[1], 0].given == {"lr": 1e-5, "weight_decay": 0.1, "gnp": {"alpha": 0.7, "r": 0.05}}
    assert runs["sgd", 0].given == {}


def test_validation_scores_are_called_so(tuned):
    folder, output, runs = tuned
    content = json.loads((folder / "out" / "results.json").read_text())
    page = (folder / "out" / "report.html").read_text()
    with (folder / "out" / "results.csv").open(newline="") as file:
        assert {row["scored_on"] for row in csv.DictReader(file)} == {"validation"}
    assert content["scored_on"] == content["job"]["scored_on"] == "validation"
    assert {r["scored_on"] for r in content["summary"]} == {"validation"}
    assert {r.scored_on for r in runs.values()} == {"validation"}
    assert all(r.config["samples"] == [1437 - 143, 143] for r in runs.values())
    assert "test accuracy" not in output + page
    assert "test " not in output
    assert "sgd, seed 0: validation accuracy" in output
    assert "The test set was not looked at" in page
    assert "adamw+gnp: 4 points, best lr=0.003, gnp.r=" in page
    assert "adamw: 2 points, best lr=0.003" in page
    assert "best.toml" in output


def test_without_validation_it_is_the_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda records, target: {})
    config = CompareConfig(optimizers=("sgd",), epochs=1, seeds=1, batch_size=256, out=tmp_path)
    (record,) = compare(config)
    assert (record.scored_on, record.config["samples"]) == ("test", [1437, 360])
    assert "test accuracy" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "best.toml").exists()
    (other,) = compare(replace(config, validation=True, resume=True))
    assert (other.scored_on, other.key == record.key) == ("validation", False), "another job"


def test_the_best_points_can_be_read_by_a_recipe(tuned, tmp_path):
    folder, _, runs = tuned
    best = tomllib.loads((folder / "out" / "best.toml").read_text())["settings"]
    means = {name: sum(runs[name, seed].test_metric for seed in (0, 1)) for name in POINTS}
    chosen = max(POINTS, key=lambda n: (means[n], -sum(runs[n, seed].test_loss for seed in (0, 1))))
    assert best == {"adamw+gnp": runs[chosen, 0].given, "adamw": {"lr": 0.003}}
    (folder / "next").mkdir(exist_ok=True)
    recipe = folder / "next" / "job.toml"
    recipe.write_text(
        'settings_from = "../out/best.toml"\noptimizers = ["adamw+gnp"]\n[settings."adamw+gnp".gnp]\nr = 9.0\n'
    )
    config = CompareConfig(**read_recipe(recipe))
    wanted = runs[chosen, 0].given
    assert config.given("adamw+gnp") == {**wanted, "gnp": {**wanted["gnp"], "r": 9.0}}
    assert "adamw" not in config.settings, "what takes no part is left out"
    assert replace(config).settings == config.settings
    assert CompareConfig(**{**read_recipe(recipe), "settings": {}}).given("adamw+gnp") == wanted
    sets = ["--set", "adamw+gnp.gnp.r=0.5", "--epochs", 1, "--seeds", 1, "--batch-size", 512]
    result = call("--recipe", recipe, *sets, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert read_runs(tmp_path)[0].given == {**wanted, "gnp": {**wanted["gnp"], "r": 0.5}}
    assert "Settings from" in result.output
    assert "by hand or by" in (tmp_path / "report.html").read_text()


def test_the_held_out_samples_are_a_part_of_the_training_set_and_fixed():
    data = load_data("digits")
    first, second = hold_out(data), hold_out(data)
    assert torch.equal(first.x_test, second.x_test)
    assert torch.equal(first.x_train, second.x_train)
    rows = [tuple(x.flatten().tolist()) for x in torch.cat([first.x_train, first.x_test])]
    assert sorted(rows) == sorted(tuple(x.flatten().tolist()) for x in data.x_train)
    assert not set(map(tuple, data.x_test.flatten(1).tolist())) & {rows[-1]}
    assert (data.scored_on, first.scored_on) == ("test", "validation")
    assert sorted(torch.cat([first.y_train, first.y_test]).tolist()) == sorted(data.y_train.tolist())


def test_the_test_set_does_not_matter_to_a_validation_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_figures", lambda records, target: {})
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 4)), rng.integers(0, 2, 80)
    y[:2] = 0, 1
    scores = []
    for i in (0, 1):
        np.savez(tmp_path / f"{i}.npz", x_train=x, y_train=y, x_test=rng.normal(size=(9, 4)), y_test=y[:9])
        config = CompareConfig(str(tmp_path / f"{i}.npz"), optimizers=("adamw",), epochs=2, seeds=1, batch_size=8)
        (record,) = compare(replace(config, validation=True, out=tmp_path / str(i)))
        scores.append((record.test_loss, record.test_metric, record.curve["loss"]))
    assert scores[0] == scores[1]


def test_too_few_samples_to_hold_out(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.eye(8), y_train=np.arange(8) % 2, x_test=np.eye(8), y_test=np.arange(8) % 2)
    with pytest.raises(InputError, match="has 8 training samples: a validation set takes 10 or more"):
        compare(CompareConfig(str(tmp_path), validation=True, out=tmp_path / "out"))


def record(name, seed, metric, loss=1.0, kind="accuracy", status="finished") -> RunRecord:
    found = RunRecord("", name, seed, {}, {}, {})
    found.test_metric, found.test_loss, found.metric, found.status = metric, loss, kind, status
    return found


BEST = {
    "highest accuracy": ([("a", 0, 0.8), ("b", 0, 0.9)], "b"),
    "mean over the seeds": ([("a", 0, 0.8), ("a", 1, 0.9), ("b", 0, 0.95), ("b", 1, 0.7)], "a"),
    "a tie goes to the lower loss": ([("a", 0, 0.8, 2.0), ("b", 0, 0.8, 1.0)], "b"),
    "a loss that is not finite is the highest": ([("a", 0, 0.8, None), ("b", 0, 0.8, 1.0)], "b"),
    "the first of what is equal": ([("a", 0, 0.8), ("b", 0, 0.8)], "a"),
    "lowest rmse": ([("a", 0, 2.0, 1.0, "rmse"), ("b", 0, 3.0, 1.0, "rmse")], "a"),
    "all seeds before some": ([("a", 0, 0.8), ("a", 1, 0.8), ("b", 0, 0.9), ("b", 1, None)], "a"),
    "a failed run has no score": ([("a", 0, 0.8), ("b", 0, 0.9, 1.0, "accuracy", "failed")], "a"),
    "further seeds do not count": ([("a", 0, 0.8), ("b", 0, 0.7), ("b", 2, 1.0)], "a"),
    "nothing scored": ([("a", 0, None)], None),
    "others do not matter": ([("c", 0, 1.0), ("a", 0, 0.1)], "a"),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_point(case):
    rows, wanted = BEST[case]
    assert best_of(["a", "b"], [record(*row) for row in rows], seeds=2) == wanted


SETTINGS = {
    "adamw+gnp": {"lr": 1e-05, "betas": [0.9, 0.99], "no": False, "gnp": {"r": 0.05, "warmup": 'a "quoted" ä\\'}},
    "sgd/a label=1.5": {"lr": 3, "deep": {"a": {"b": [True, "x"]}}, "odd key": 1e20},
}


def test_settings_survive_best_toml(tmp_path):
    write_best(tmp_path, {**SETTINGS, "ring": None}, "A head.")
    assert tomllib.loads((tmp_path / "best.toml").read_text("utf-8")) == {"settings": SETTINGS}
    assert "# ring: no point" in (tmp_path / "best.toml").read_text("utf-8")
    assert toml((1, 2.5)) == "[1, 2.5]"


def test_labels_of_grids():
    assert list(expand("adamw/zero", {"lr": [1, 2]})) == ["adamw/zero,lr=1", "adamw/zero,lr=2"]
    assert len(expand("adamw", {"lr": [1, 1], "eps": [1, 2, 3]})) == 3


@pytest.mark.parametrize(
    ("grid", "changes", "message"),
    [
        ({"adamw": {}}, {}, "the grid of 'adamw' is empty"),
        ({"adamw": {"lr": 0.1}}, {}, r"grid of 'adamw': lr is 0.1: give a list"),
        ({"adamw": {"lr": []}}, {}, "give a list of values"),
        ({"adamw": {"gnq.r": [1]}}, {}, "'gnq.r' is no setting: write KEY or REGULARIZER.KEY"),
        ({"adamx": {"lr": [1]}}, {}, "unknown optimizer 'adamx'"),
        ({"adamw": {"lr": [1]}}, {"optimizers": ("adamw/lr=1",)}, "'adamw/lr=1' is a point of the grid too"),
        ({"adamw": {"lr": [1]}}, {"settings": {"sgd": {}}}, "settings for 'sgd', which takes no part: choose adamw"),
        ({"adamw": {"lr": [1]}}, {"settings": {"adamw": {"eps": None}}}, "None cannot be written to best.toml"),
        ({"adamw": {"lr": [1]}}, {"settings_from": "no/such.toml"}, "no/such.toml cannot be read"),
    ],
)
def test_bad_grids(grid, changes, message):
    with pytest.raises(InputError, match=message):
        CompareConfig(**{"optimizers": (), "grid": grid, **changes})


def test_a_grid_that_cannot_be_built_is_known_before_the_runs(tmp_path):
    grid = {"adamw": {"gnp.r": [0.1]}}
    with pytest.raises(InputError, match="settings for the regularizer 'gnp', which 'adamw' lacks"):
        compare(CompareConfig(optimizers=(), grid=grid, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_grid_runs_no_default_optimizers(tmp_path):
    (tmp_path / "job.toml").write_text("[grid.adamw]\nlr = [0.1]\n")
    assert CompareConfig(**read_recipe(tmp_path / "job.toml")).names == ("adamw/lr=0.1",)
    (tmp_path / "bad.toml").write_text("[grid]\nadamw = [1]\n")
    with pytest.raises(InputError, match=r"write a table \[grid.adamw\]"):
        read_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize(("metric", "wanted"), [("accuracy", range(8, 20)), ("rmse", range(12))])
def test_figures_show_the_best_where_there_are_many(metric, wanted):
    rows = [Summary(f"adamw/{i}", 1, 0, 0, metric, mean=float(i)) for i in range(20)]
    assert drawn(rows) == [f"adamw/{i}" for i in wanted]
    assert drawn(rows[:DRAWN]) == [f"adamw/{i}" for i in range(DRAWN)]
    rows[19].mean = rows[0].mean = None
    assert len(drawn(rows)) == DRAWN
