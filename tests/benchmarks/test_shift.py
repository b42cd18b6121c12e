"""`grng shift`: calibration and what is foreign, on data of a moment's size."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from grng.benchmarks import shift
from grng.benchmarks.cli import make_app
from grng.benchmarks.data import load_data, load_shifted
from grng.benchmarks.uci import Method
from typer.testing import CliRunner

RUN = CliRunner()


def save(path: Path, centres: np.ndarray, seed: int) -> str:
    generator = np.random.default_rng(seed)
    y = np.arange(90) % 3
    x = (centres[y] + generator.integers(0, 20, size=(90, 2, 2))).astype("uint8")
    np.savez(path, x_train=x[:60], y_train=y[:60], x_test=x[60:], y_test=y[60:])
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """Three classes, each one bright corner; and pictures that are bright all over or dark all over."""
    corners = 200 * np.eye(4).reshape(4, 2, 2)[:3]
    alike = np.stack([np.full((2, 2), value) for value in (90, 100, 110)])
    return save(tmp_path / "corners.npz", corners, 0), save(tmp_path / "alike.npz", alike, 1)


def test_the_other_source_is_standardised_as_the_first(sources: tuple[str, str]) -> None:
    inside, outside = load_data(sources[0]), load_shifted(*sources)
    assert torch.equal(inside.x_train, outside.x_train)
    with np.load(sources[0]) as own, np.load(sources[1]) as other:
        scale = own["x_train"].std()
        expected = (other["x_test"] - own["x_train"].mean()) / scale
    np.testing.assert_allclose(outside.x_test.squeeze(1), expected, rtol=1e-4)


def test_shift(sources: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "BATCH", 16)
    small = {
        "adamw": Method(shift.fit_adamw, {"lr": [1e-3, 1e-2]}),
        "kalman-kron": Method(shift.fit_kalman, {"covariance": ["kron"], "gamma": [0.01, 0.03], "rho": [0.0]}),
    }
    monkeypatch.setattr(shift, "METHODS", small)
    out = tmp_path / "out"
    options = ["shift", "--data", sources[0], "--other", sources[1], "--methods", "adamw,kalman-kron"]
    options += ["--epochs", "6", "--seeds", "2", "--out", str(out)]
    done = RUN.invoke(make_app(), options)
    assert done.exit_code == 0, done.output
    for which in small:
        run = json.loads((out / "runs" / f"{which}.json").read_text())
        assert len(run["runs"]) == 2
        for measured in run["runs"]:
            assert measured["accuracy"] == 1.0
            assert 0 <= measured["ECE"] <= measured["Brier"] ** 0.5  # Jensen
            assert measured["AUROC"] > 0.9
    again = RUN.invoke(make_app(), options)
    assert "validation" not in again.output
    assert (out / "table.md").read_text() in again.output
    for changed, name in (
        (["--epochs", "7"], "epochs=6"),
        (["--seeds", "3"], "seeds=2"),
        (["--data", sources[1]], "data="),
    ):
        refused = RUN.invoke(make_app(), [*options, *changed])
        assert refused.exit_code == 2
        assert f"was made with {name}" in refused.output.replace("\n", " ")
    wrong = RUN.invoke(make_app(), [*options, "--methods", "adam"])
    assert wrong.exit_code == 2
    assert "unknown method 'adam'" in wrong.output


@pytest.mark.parametrize("bad", [1, 2])
def test_a_setting_that_diverges_is_not_chosen(
    sources: tuple[str, str], monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    def fit(job: shift.Job, lr: float) -> dict[str, shift.Predict]:
        value = math.nan if lr <= bad else 1 / 3
        return {"plain": lambda x: torch.full((len(x), 3), value)}

    monkeypatch.setattr(shift, "METHODS", {"adamw": Method(fit, {"lr": [1, 2]})})
    data = load_data(sources[0])
    if bad == 1:
        assert shift.run_method("adamw", data, data.x_test, 1, 1, print)["settings"] == {"lr": 2}
    else:
        with pytest.raises(RuntimeError, match="every trial diverged"):
            shift.run_method("adamw", data, data.x_test, 1, 1, print)


def test_measures() -> None:
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.1]])
    found = shift.measures(p, torch.tensor([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["NLL"] == pytest.approx(-np.log([0.8, 0.6, 0.1]).mean())
    assert found["Brier"] == pytest.approx((2 * 0.2**2 + 2 * 0.4**2 + 2 * 0.9**2) / 3)
    assert found["ECE"] == pytest.approx((0.2 + 0.4 + 0.9) / 3)  # each in a bin of its own
    assert shift.unlike(p, torch.full((2, 2), 0.5)) == 1.0
    assert shift.unlike(p, p) == pytest.approx(0.5)


def test_methods_have_as_many_trials() -> None:
    assert {len(method.trials) for method in shift.METHODS.values()} == {4}
