"""Every method, with its defaults, trains what it is for; the thresholds leave room, and plain noise does not pass."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG

from .cases import METHODS, Loss, Method, Transformer, cnn, methods, train


@dataclass(frozen=True)
class Task:
    """A model, a stream of batches from one data set, a loss, and the share of the first loss to be reached."""

    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    loss: Loss
    share: float
    batch: int = 32
    steps: int = 60


def regression() -> tuple[Tensor, Tensor]:
    x = torch.randn(128, 4)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)


def classes() -> tuple[Tensor, Tensor]:
    """Two rings and what lies outside of them."""
    x = torch.randn(192, 2)
    return x, (x.norm(dim=1) > 0.8).long() + (x.norm(dim=1) > 1.5).long()


def images() -> tuple[Tensor, Tensor]:
    """Bars: which third of the image is bright."""
    y = torch.randint(3, (96,))
    x = 0.7 * torch.randn(96, 1, 6, 6)
    for i, label in enumerate(y.tolist()):
        x[i, 0, :, 2 * label : 2 * label + 2] += 1
    return x, y


def sentences() -> tuple[Tensor, Tensor]:
    """Which token comes first: the position matters, the bag of words is not enough."""
    x = torch.randint(7, (128, 6))
    return x, x[:, 0]


def dense(*sizes: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return make


TASKS = {
    "regression": Task(dense(4, 16, 16, 2), regression, mse_loss, 0.5),
    "classification": Task(dense(2, 16, 16, 3), classes, cross_entropy, 0.7),
    "cnn": Task(lambda: cnn(), images, cross_entropy, 0.3, steps=25),
    "transformer": Task(Transformer, sentences, cross_entropy, 0.75),
}


def losses_of(make: Callable[[nn.Module], Any], task: Task) -> tuple[float, float]:
    """The loss over all data before and after training."""
    torch.manual_seed(3)
    model, (x, y) = task.model(), task.data()
    batches = []
    for _ in range(task.steps):
        chosen = torch.randint(len(x), (task.batch,))
        batches.append((x[chosen], y[chosen]))

    def total() -> float:
        model.eval()
        with torch.no_grad():
            value = task.loss(model(x), y).item()
        model.train()
        return value

    first = total()
    with make(model) as optimizer:
        train(optimizer, model, batches, task.loss)
    return first, total()


@pytest.mark.parametrize("name", TASKS)
@methods(*[name for name in METHODS if name not in ("ring-factored", "kalman-fd")])  # as good as their twins
def test_training_with_defaults(method: Method, name: str) -> None:
    task = TASKS[name]
    # The fused attention has no second derivative.
    math = sdpa_kernel(SDPBackend.MATH) if method.name == "reng-double" else nullcontext()
    with math:
        first, last = losses_of(method, task)
    assert last < task.share * first


@pytest.mark.parametrize("name", TASKS)
def test_thresholds_can_fail(name: str) -> None:
    """A step a thousand times smaller does not reach them."""
    task = TASKS[name]
    first, last = losses_of(lambda model: GRNG(model, "ring", lr=1e-4, fallback_lr=1e-6), task)
    assert last > task.share * first


def test_double_says_what_to_do_about_fused_attention() -> None:
    task = TASKS["transformer"]
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(RuntimeError, match=r"sdpa_kernel\(SDPBackend\.MATH\).*mode 'finite'"),
    ):
        losses_of(METHODS["reng-double"], task)
