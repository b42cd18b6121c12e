"""Calibration: bins counted by hand, temperatures against a grid, and what a workload hands over."""

import pytest
import torch
from grng.benchmarks.calibration import BINS, calibration, calibration_error, temperature
from grng.benchmarks.workloads import find_workload
from grng.benchmarks.workloads.base import Supervised, classification
from torch.nn.functional import cross_entropy


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_the_error_is_that_of_the_bins(n, classes, sharpness):
    torch.manual_seed(n)
    p = (sharpness * torch.randn(n, classes)).softmax(1)
    y = torch.randint(classes, (n,))
    confidence, said = p.max(1)
    total = 0.0
    for i in range(BINS):
        inside = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if inside.any():
            gap = (said == y)[inside].float().mean() - confidence[inside].mean()
            total += float(inside.float().mean() * gap.abs())
    assert calibration_error(p, y) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("factor", [0.2, 1.0, 8.0])
@pytest.mark.parametrize("n", [50, 2000])
def test_the_temperature_is_the_best_of_a_grid(factor, n):
    """Scores that are too wide by a factor are narrowed by it."""
    torch.manual_seed(n)
    scores = torch.randn(n, 4)
    y = torch.distributions.Categorical(logits=scores).sample()
    found = temperature(factor * scores, y)
    losses = [float(cross_entropy(factor * scores.double() / t, y)) for t in torch.logspace(-2, 2, 400)]
    assert float(cross_entropy(factor * scores.double() / found, y)) <= min(losses) + 1e-6
    if n == 2000:
        assert found == pytest.approx(factor, rel=0.1)


def test_scaling_helps_what_is_too_sure_and_is_chosen_elsewhere():
    torch.manual_seed(0)
    scores = torch.randn(4000, 5)
    y = torch.distributions.Categorical(logits=scores).sample()
    test, validation = (6 * scores[:2000], y[:2000]), (6 * scores[2000:], y[2000:])
    found = calibration(test, validation)
    assert found["temperature"] == temperature(*validation)
    assert found["scaled_ece"] < 0.1 < found["ece"]
    assert found["scaled_loss"] < cross_entropy(*test)
    assert calibration(test, None) == {"ece": found["ece"]}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_nothing_is_said_of_what_is_not_finite(broken):
    fine, wrong = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0])), (torch.full((4, 3), broken), torch.zeros(4).long())
    assert calibration(wrong, fine) == {}
    assert calibration(fine, wrong).keys() == {"ece"}


def test_a_classification_hands_its_scores_over():
    task = find_workload("digits-mlp").load(None, torch.device("cpu"))
    torch.manual_seed(0)
    model = task.model()
    found = task.final(model)
    assert found.keys() == {"ece", "temperature", "scaled_ece", "scaled_loss"}
    x, y = task.splits["test"]
    assert found["ece"] == pytest.approx(calibration_error(model(x).softmax(1).detach(), y), abs=1e-6)
    assert model.training
    scaled = model(x).detach() / found["temperature"]
    assert found["scaled_loss"] == pytest.approx(float(cross_entropy(scaled, y)), rel=1e-5)


def test_a_temperature_is_not_chosen_on_the_test_set():
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    splits = {"train": (x, y), "validation": (x, y), "test": (x, y)}
    task = Supervised(splits, lambda: torch.nn.Linear(3, 2), cross_entropy, classification, 5)
    assert task.final(task.model()).keys() == {"ece"}


def test_a_regression_has_none():
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    splits = {"train": (x, y), "validation": (x[:5], y[:5]), "test": (x[5:], y[5:])}
    task = Supervised(splits, lambda: torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, lambda f, y: {}, 5)
    assert task.final(task.model()) == {}
