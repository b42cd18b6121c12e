"""The commands behind docs/kalman.md, on data of a moment's size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grng.benchmarks import robustness, step_cost, stream, uci
from grng.benchmarks.cli import make_app
from grng.benchmarks.errors import InputError
from grng.benchmarks.uci import Density, Job, Method, Split
from typer.testing import CliRunner

RUN = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    X = generator.normal(size=(60, 3))
    X[:, 2] = 1.0  # constant, as two of naval's
    y = 5 + 3 * X[:, 0] + 0.1 * generator.normal(size=60)
    tests = np.stack([generator.permutation(60)[:6] for _ in range(3)])
    path = tmp_path / "data"
    path.mkdir()
    np.savez(path / "small.npz", X=X, y=y, test_index=tests.astype("uint16"))
    return path


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "adamw": Method(uci.fit_adamw, {"lr": [0.01, 0.03]}, certain=True),
        "kalman-kron": Method(uci.fit_kalman, {"covariance": ["kron"], "gamma": [0.03, 0.06]}),
    }
    monkeypatch.setattr(uci, "METHODS", small)


@pytest.mark.usefixtures("few_trials")
def test_uci(folder: Path, tmp_path: Path) -> None:
    """Every split of every method, tuned by as many trials; nothing is run twice."""
    out = tmp_path / "out"
    options = ["uci", "--data", str(folder), "--datasets", "small", "--epochs", "8", "--splits", "3", "--out", str(out)]
    done = RUN.invoke(make_app(), [*options, "--methods", "adamw,kalman-kron"])
    assert done.exit_code == 0, done.output
    rows = (out / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3
    runs = {which: json.loads((out / "runs" / f"small-{which}.json").read_text()) for which in uci.METHODS}
    assert {run["trials"] for run in runs.values()} == {2}
    assert all(0 < row["rmse"] < 3 for run in runs.values() for row in run["rows"])
    assert np.mean([row["rmse"] for row in runs["kalman-kron"]["rows"]]) < 1.0  # of a target that varies by 3
    again = RUN.invoke(make_app(), [*options, "--methods", "adamw,kalman-kron"])
    assert again.exit_code == 0
    assert "trials, best" not in again.output
    assert (out / "table.md").read_text() in again.output
    refused = RUN.invoke(make_app(), [*options, "--methods", "adamw", "--splits", "2"])
    assert refused.exit_code == 2
    assert "was made with splits=3" in refused.output.replace("\n", " ")


def test_uci_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRNG_DATA", raising=False)
    for options, message in (
        ([], "give their folder with --data, or GRNG_DATA"),
        (["--data", str(folder), "--datasets", "absent"], "the folder has small"),
        (["--data", str(folder), "--datasets", "small", "--methods", "kalmann"], "unknown method 'kalmann'"),
    ):
        done = RUN.invoke(make_app(), ["uci", "--out", str(tmp_path / "out"), *options])
        assert done.exit_code == 2
        assert message in done.output
    monkeypatch.setenv("GRNG_DATA", str(folder))
    assert uci.data_folder(None) == folder
    with pytest.raises(InputError, match="absent"):
        uci.load(folder, "absent")


def test_splits_are_standardised_by_their_training_set(folder: Path) -> None:
    X, y, tests = uci.load(folder, "small")
    train = torch.ones(60, dtype=torch.bool)
    train[tests[0]] = False
    split = Split(X, y, train.nonzero().squeeze(1), tests[0])
    assert split.x[:, :2].mean(0).abs().max() < 1e-5
    assert split.x.isfinite().all()
    assert not split.x[:, 2].any()
    torch.testing.assert_close(split.y_test.squeeze(1) * split.scale + split.mean, y[tests[0]])


def test_the_density_is_a_gaussian() -> None:
    mean, variance, y = torch.randn(9, 1), torch.rand(9, 1), torch.randn(9, 1)
    expected = torch.distributions.Normal(mean, (0.3 * variance + 1.5 * 0.2).sqrt()).log_prob(y).mean()
    assert Density(0.3, 1.5).score(mean, variance, 0.2, y) == pytest.approx(expected.item(), rel=1e-5)


def test_methods_have_as_many_trials() -> None:
    assert {len(method.trials) for method in uci.METHODS.values()} == {6}


def test_batches_grow_with_the_data() -> None:
    for n, batch in ((100, 64), (2000, 64), (5000, 128)):
        assert Job(torch.zeros(n, 3), torch.zeros(n, 1), 50, 1).batch == batch


def test_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every digit once; the picture moves on, and the label is the digit's."""
    batches = list(stream.drifting_digits(0))
    assert len(batches) == 1797
    from sklearn.datasets import load_digits

    images = load_digits().images
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = batches[700]
    assert torch.equal(x.view(8, 8), torch.tensor(images[order[700]]).float().roll(2, 1) / 16)
    assert y.item() == load_digits().target[order[700]]
    monkeypatch.setattr(stream, "METHODS", {"sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1)})
    done = RUN.invoke(make_app(), ["stream", "--seeds", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert 60 < 100 * json.loads((tmp_path / "results.json").read_text())["accuracies"]["sgd"][0][-1] < 95
    monkeypatch.setattr(stream, "accuracies", None)  # what is there is not run again
    assert RUN.invoke(make_app(), ["stream", "--seeds", "1", "--out", str(tmp_path)]).exit_code == 0
    refused = RUN.invoke(make_app(), ["stream", "--seeds", "2", "--out", str(tmp_path)])
    assert refused.exit_code == 2
    assert "holds 1 seeds, not 2" in refused.output


def test_p0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "P0", (1e-9, 1e-2))
    monkeypatch.setattr(robustness, "GAMMAS", (0.03, 0.1))
    table = robustness.robustness(tmp_path, seeds=1, epochs=3, say=lambda text: None)
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(found) == 2 * 2 * 2
    assert all(run["accuracy"][1] > 0.6 for run in found if run["rho"])
    assert (tmp_path / "p0.png").stat().st_size > 10_000
    assert table.count("\n") == 2 + len(found)


def test_step_cost(tmp_path: Path) -> None:
    """Every method at a small size, AdamW's ratio one, memory of processes of their own."""
    options = ["step-cost", "--parameters", "1e4", "--classes", "3", "--no-memory", "--out", str(tmp_path)]
    done = RUN.invoke(make_app(), options)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(step_cost.METHODS)
    assert rows[0]["ratio"] == 1
    assert all(row["ms"] > 0 and 5e3 < row["parameters"] < 2e4 for row in rows)
    assert 10 < step_cost.peak_memory("grouped, m = 8", 10**4, 3) < 250  # not what this process has come to
    wrong = RUN.invoke(make_app(), ["step-cost", "--parameters", "5"])
    assert wrong.exit_code == 2
    assert "choose from [10000, " in wrong.output


@pytest.mark.parametrize(("size", "low", "high"), [(s, 0.5 * s, 2 * s) for s in step_cost.WIDTHS])
def test_networks_have_their_sizes(size: int, low: float, high: float) -> None:
    with torch.device("meta"):
        model = step_cost.network(step_cost.WIDTHS[size], 10)
    assert low < sum(p.numel() for p in model.parameters()) < high
