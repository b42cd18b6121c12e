"""fmnist_2c2d and cifar10_3c3d of DeepOBS (Schneider, Balles, Hennig 2019, arXiv 1903.05499), and its tuned baselines.

Nets, initialisation, preprocessing, augmentation, the penalty, batches of 128 and 100 epochs at a constant learning
rate are those of the authors' TensorFlow code (github.com/fsschneider/DeepOBS), from which the published curves come.
As in their protocol the training set is used whole, and the published test set serves as "validation" and as "test":
settings chosen by it are chosen as theirs were. A training set streams through a buffer of 20,000 samples, which is
drawn from in the same way in every epoch: under a graph's seed TensorFlow repeats a shuffle whenever its iterator is
initialised anew (github.com/tensorflow/tensorflow, issue 13446). So fmnist_2c2d has the same batches in every epoch,
and the curves show it: with others every time, SGD fits sooner and overfits less. CIFAR-10's five files are read in
another order every time, so that its batches change.
What differs: all 10,000 test images are scored, not the 9,984 of complete batches; and CIFAR-10 may come as JPEGs, in
an order of their own, whose fifths stand for the files.
"""

import csv
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import inputs_of, read
from ..errors import InputError
from ..loop import generator_of
from ..records import fingerprint_of
from .augmentation import mirrored, shifted
from .base import Split, Supervised, Workload, classification, folder_of
from .cifar_files import read_images, source_of

BATCH, EPOCHS = 128, 100
TARGETS = {"fmnist_2c2d": 0.91981, "cifar10_3c3d": 0.82833}  # test accuracy
BUFFER, FILES = 20_000, 5  # samples that wait to be drawn; files of CIFAR-10
PENALTY = 0.002  # of cifar10_3c3d; fmnist_2c2d has none
NAMES = {"GradientDescent": "SGD", "Momentum": "momentum", "Adam": "Adam"}


@dataclass
class Penalised(Supervised):
    """The loss has the term factor / 2 * |weights|^2, without the biases, in training and evaluation alike."""

    factor: float = 0.0

    def penalty(self, model: nn.Module) -> Tensor:
        return self.factor / 2 * torch.stack([p.square().sum() for p in model.parameters() if p.ndim > 1]).sum()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) + self.penalty(model)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        found = super().evaluate(model, split)
        return found | {"loss": found["loss"] + self.penalty(model).item()}


def net_2c2d() -> nn.Sequential:
    """Two convolutions, two linear layers; weights from a normal cut at two deviations of 0.05, biases 0.05."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 7 * 64, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.trunc_normal_(p, std=0.05, a=-0.1, b=0.1)
        else:
            nn.init.constant_(p, 0.05)
    return channels_last(model)


def net_3c3d() -> nn.Sequential:
    """Three convolutions, three linear layers; Glorot's initialisation, normal and uniform in turn, biases 0."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)  # TensorFlow's "same" of even sizes pads at the far end only

    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), pool()),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), pool()),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), pool()),
        *(nn.Flatten(), nn.Linear(3 * 3 * 128, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    for p in model.parameters():
        if p.ndim == 4:
            # Cut at two deviations, and then of the deviation that Glorot's rule asks for.
            std = math.sqrt(2 / (p[0].numel() + p[:, 0].numel())) / 0.87962566
            nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)
        elif p.ndim == 2:
            nn.init.xavier_uniform_(p)
        else:
            nn.init.zeros_(p)
    return channels_last(model)


def channels_last(model: nn.Sequential) -> nn.Sequential:
    """In the layout in which a CPU pools ten times as fast."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def standardised(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 of every image, all channels together."""
    deviation = x.std((1, 2, 3), correction=0, keepdim=True).clamp(min=x[0].numel() ** -0.5)
    return (x - x.mean((1, 2, 3), keepdim=True)) / deviation


def augment(images: Tensor) -> Tensor:
    """Window, mirror, brightness, saturation, contrast, then `standardised`; pixels are those of 0 to 255."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    x = mirrored(shifted(images.float(), 2))
    x = x + uniform(-63 / 255, 63 / 255)  # meant for pixels of 0 to 1: as published, hardly anything
    x = saturated(x, uniform(0.5, 1.5))
    mean = x.mean((2, 3), keepdim=True)
    return standardised(mean + (x - mean) * uniform(0.2, 1.8))


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """The saturation times a factor, but at most 1, at the same hue and value."""
    value = x.amax(1, keepdim=True)
    full = value / (value - x.amin(1, keepdim=True)).clamp(min=1e-6)  # the factor that makes the saturation 1
    return value - (value - x) * torch.minimum(factor, full)


@lru_cache(maxsize=2)
def drawn(samples: int, seed: int, size: int = BUFFER) -> Tensor:
    """The order in which a stream leaves a buffer: one of its samples is drawn, and the next of the stream takes the
    place, until there is none and the buffer empties."""
    buffer, order = list(range(min(size, samples))), []
    draws = torch.rand(samples, generator=generator_of(seed, 0), dtype=torch.float64).tolist()
    for following, draw in enumerate(draws, start=size):
        place = int(draw * len(buffer))
        order.append(buffer[place])
        buffer[place] = following if following < samples else buffer[-1]
        if following >= samples:
            buffer.pop()
    return torch.tensor(order)


def repeated(samples: int, seed: int, epoch: int) -> Tensor:
    """The same order in every epoch."""
    return drawn(samples, seed)


def by_files(samples: int, seed: int, epoch: int) -> Tensor:
    """The files in an order of the epoch's own, and what streams out of them drawn in the same way in every epoch."""
    files = torch.arange(samples).tensor_split(FILES)
    order = torch.randperm(FILES, generator=generator_of(seed, epoch)).tolist()
    return torch.cat([files[n] for n in order])[drawn(samples, seed)]


def load_fmnist(root: Path | None, device: torch.device) -> Penalised:
    arrays = read(str(folder_of(root, "fashion_mnist", "deepobs-fmnist-2c2d")))[1]
    x, x_test = (inputs_of(arrays[key]).to(device) for key in ("x_train", "x_test"))
    y, y_test = (torch.tensor(arrays[key], dtype=torch.int64, device=device) for key in ("y_train", "y_test"))
    splits = {"train": (x, y), "validation": (x_test, y_test), "test": (x_test, y_test)}
    found = fingerprint_of(x, y, x_test, y_test)
    return Penalised(splits, net_2c2d, F.cross_entropy, classification, BATCH, fingerprint=found, order=repeated)


def load_cifar10(root: Path | None, device: torch.device) -> Penalised:
    folder = folder_of(root, "cifar10", "deepobs-cifar10-3c3d")
    images = read_images(folder)
    x, y, x_test, y_test = (images[key].to(device) for key in ("x_train", "y_train", "x_test", "y_test"))
    test = (standardised(x_test.float()), y_test)
    return Penalised(
        {"train": (x, y), "validation": test, "test": test},
        net_3c3d,
        F.cross_entropy,
        classification,
        BATCH,
        augment,
        f"{source_of(folder)}-{fingerprint_of(x, y, x_test, y_test)}",
        factor=PENALTY,
        order=by_files,
    )


def published(root: Path | None) -> dict[str, dict[str, Any]]:
    """The tuned baselines of both problems, as far as they can be compared with runs of one's own.

    Of each problem the target and, by optimizer, the chosen learning_rate and momentum, in how many of the seeds the
    target was reached, the median_epochs it took those, the first and the last of them, and the test accuracy over the
    seeds, epoch by epoch from 0: "lowest", "median", "highest".
    """
    folder = folder_of(root, "results_deepobs", "deepobs")
    try:
        chosen = [row for row in rows(folder / "epochs_to_target.csv") if row["problem"] in TARGETS]
        runs = [row for row in rows(folder / "runs.csv") if row["problem"] in TARGETS]
        accuracies: dict[str, list[float]] = {run["run"]: [] for run in runs}
        for row in rows(folder / "curves.csv.xz"):
            if row["run"] in accuracies:
                accuracies[row["run"]].append(float(row["test_acc"]))
        found: dict[str, dict[str, Any]] = {}
        for row in chosen:
            seeds = [run for run in runs if all(run[k] == row[k] for k in ("problem", "optimizer", "learning_rate"))]
            curves = torch.tensor([accuracies[run["run"]] for run in seeds])
            lowest, median, highest = curves.quantile(torch.tensor([0.0, 0.5, 1.0]), dim=0).tolist()
            problem = found.setdefault(row["problem"], {"target": float(row["target"]), "optimizers": {}})
            problem["optimizers"][NAMES[row["optimizer"]]] = {
                "learning_rate": float(row["learning_rate"]),
                "momentum": float(seeds[0]["momentum"] or 0),
                "median_epochs": float(row["median_epoch"]),
                "reached": int(row["n_reached"]),
                "seeds": len(seeds),
                "first": float(row["min_epoch"]),
                "last": float(row["max_epoch"]),
                "lowest": lowest,
                "median": median,
                "highest": highest,
            }
    except (OSError, EOFError, KeyError, ValueError, IndexError, RuntimeError, lzma.LZMAError) as error:
        raise InputError(
            f"{folder} does not hold DeepOBS's baselines ({type(error).__name__}: {error}): it takes "
            "epochs_to_target.csv, runs.csv and curves.csv.xz that belong together"
        ) from error
    return found


def rows(path: Path) -> Iterator[dict[str, str]]:
    with lzma.open(path, "rt", newline="") if path.suffix == ".xz" else path.open(newline="") as file:
        yield from csv.DictReader(file)


WORKLOADS = [
    Workload(
        name="deepobs-fmnist-2c2d",
        about="DeepOBS's fmnist_2c2d: two convolutions, two linear layers",
        tier="full",
        load=load_fmnist,
        batch_size=BATCH,
        steps=EPOCHS * (60_000 // BATCH),
        evaluate_every=60_000 // BATCH,
        metric="accuracy",
        goal="max",
        data=("fashion_mnist",),
        schedule="constant",
    ),
    Workload(
        name="deepobs-cifar10-3c3d",
        about="DeepOBS's cifar10_3c3d: three convolutions, three linear layers, an L2 term",
        tier="full",
        load=load_cifar10,
        batch_size=BATCH,
        steps=EPOCHS * (50_000 // BATCH),
        evaluate_every=50_000 // BATCH,
        metric="accuracy",
        goal="max",
        data=("cifar10",),
        schedule="constant",
    ),
]
