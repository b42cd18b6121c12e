"""How well stated probabilities fit what happens: the calibration error, as it is and after temperature scaling.

It says little by itself (a model that always states the classes' frequencies has none), so that it stands beside the
negative log likelihood and the Brier score, never for them.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

BINS = 15
WIDEST = 5.0  # of log T, to both sides

Scores = tuple[Tensor, Tensor]


def calibration_error(p: Tensor, y: Tensor) -> float:
    r"""sum over bins of share times \|accuracy - mean confidence\|, of probabilities (n, C) for classes (n,).

    >>> p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    >>> round(calibration_error(p, torch.tensor([0, 0, 1, 0])), 4)  # half of 1 - 0.9, and half of 0.6 - 0.5
    0.1
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(p, y, p.shape[1], n_bins=BINS, norm="l1"))


def temperature(scores: Tensor, y: Tensor) -> float:
    """T by which scores (n, C) have to be divided for the least negative log likelihood of classes (n,).

    >>> scores = torch.tensor([[4.0, 0.0]] * 4)
    >>> round(temperature(scores, torch.tensor([0, 0, 0, 1])), 3)  # softmax(4 / T) is 3/4 where 4 / T = log 3
    3.641
    """
    from scipy.optimize import minimize_scalar

    scores = scores.double()

    def loss(log_t: float) -> float:
        return float(cross_entropy(scores * torch.tensor(-log_t).exp(), y))

    return float(torch.tensor(minimize_scalar(loss, bounds=(-WIDEST, WIDEST), method="bounded").x).exp())


def calibration(test: Scores, validation: Scores | None) -> dict[str, float]:
    """Of scores and classes of the test set: "ece"; and with T chosen on `validation`, "temperature", "scaled_ece" and
    "scaled_loss". Nothing of what is not finite."""
    scores, y = test
    if not scores.isfinite().all():
        return {}
    found = {"ece": calibration_error(scores.softmax(1), y)}
    if validation is not None and validation[0].isfinite().all():
        t = temperature(*validation)
        scaled = scores.double() / t
        found |= {"temperature": t, "scaled_ece": calibration_error(scaled.softmax(1), y)}
        found["scaled_loss"] = float(cross_entropy(scaled, y))
    return found
