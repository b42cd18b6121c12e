"""Tiny-ImageNet and ImageNet from folders of image files, in the layouts in which they are distributed.

    train/CLASS/*.JPEG, or train/CLASS/images/*.JPEG
    val/CLASS/*.JPEG, or val/images/*.JPEG with the classes in val/val_annotations.txt

The files of "val" are the test set, since the labels of the test sets are not public; what is held out of "train" is
the validation set. Every sample is augmented by a generator of its own, seeded by its place among the batches, so that
the batches of a seed are the same however many workers decode them.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..calibration import Scores
from ..errors import InputError
from ..networks.convnext import convnext_t
from ..networks.resnet import resnet18, resnet50
from ..networks.swin import swin_t
from ..networks.tinyvit import tinyvit_5m
from ..networks.vgg import vgg16bn
from ..records import hash_of
from .base import Split, Task, Workload, classification, folder_of, index_batches

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".jpeg", ".jpg", ".png"}
HELD_OUT = 10_000  # at most, and at most a tenth
WORKERS = 16  # at most, unless more are asked for
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's bytes, as is customary

Sample = tuple[Path, int]
Draw = tuple[int, int | None]  # of a sample: its index, and the seed of its augmentation
Box = tuple[float, float, float, float]


def read_training(root: Path) -> tuple[list[str], list[Sample]]:
    """The classes, by name, and the files of each."""
    classes = folders_in(root / "train")
    samples = []
    for label, name in enumerate(classes):
        place = root / "train" / name
        samples += [(path, label) for path in files_in(place / "images" if (place / "images").is_dir() else place)]
    return classes, samples


def read_validation(root: Path, classes: list[str]) -> list[Sample]:
    """The files of "val", of the classes of the training set."""
    labels = {name: label for label, name in enumerate(classes)}
    place, annotations = root / "val", root / "val" / "val_annotations.txt"
    if annotations.exists():
        rows = [line.split("\t") for line in annotations.read_text("utf-8").splitlines() if line.strip()]
        named = [(place / "images" / row[0], row[1] if len(row) > 1 else "") for row in rows]
    else:
        named = [(path, name) for name in folders_in(place) for path in files_in(place / name)]
    for path, name in named:
        if name not in labels:
            raise InputError(f"{path} is of the class {name!r}, which {root / 'train'} lacks: the two must fit")
    if not named:
        raise InputError(f"{annotations} names no file: fetch it again")
    return [(path, labels[name]) for path, name in named]


def folders_in(place: Path) -> list[str]:
    found = sorted(p.name for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
    if not found:
        raise InputError(f"{place} holds no folder of a class: give the data set as it is distributed, unpacked")
    return found


def files_in(place: Path) -> list[Path]:
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{place} holds no image ({', '.join(sorted(SUFFIXES))}): fetch the class again")
    return found


def decode(path: Path) -> "Image":
    """The image in three channels, whatever its mode is in the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: what a broken PNG raises
        raise InputError(f"{path} is no readable image ({error}): fetch the file again, or remove it") from error


def random_box(width: int, height: int, generator: torch.Generator) -> Box:
    """A part of 8 % to all of an image's area, 3:4 to 4:3 in shape (Szegedy et al. 2015); else its central square."""
    for _ in range(10):
        part, shape, left, top = torch.rand(4, generator=generator).tolist()
        area, ratio = (0.08 + 0.92 * part) * width * height, (4 / 3) ** (2 * shape - 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            return left * (width - w), top * (height - h), left * (width - w) + w, top * (height - h) + h
    return central_box(width, height, 1.0)


def central_box(width: int, height: int, part: float) -> Box:
    """The central square whose side is a part of the image's shorter one.

    >>> central_box(100, 60, 0.5)
    (35.0, 15.0, 65.0, 45.0)
    """
    half = part * min(width, height) / 2
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


@dataclass
class Images(Dataset[tuple[Tensor, int]]):
    """Files as squares of bytes (3, size, size), cropped at random and flipped where a draw has a seed.

    Attributes:
        samples: files and labels.
        size: pixels of a side.
        part: of the shorter side that is looked at in evaluation.
    """

    samples: list[Sample]
    size: int
    part: float

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        import numpy as np
        from PIL.Image import Resampling, Transpose

        index, seed = draw
        path, label = self.samples[index]
        image = decode(path)
        if seed is None:
            box, flipped = central_box(*image.size, self.part), False
        else:
            generator = torch.Generator().manual_seed(seed)
            box = random_box(*image.size, generator)
            flipped = bool(torch.rand((), generator=generator) < 0.5)
        image = image.resize((self.size, self.size), Resampling.BILINEAR, box)
        if flipped:
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), label


@dataclass
class ImageFolder(Task):
    """Files that are decoded as they are needed.

    Attributes:
        splits: "train", "validation" and "test".
        build: makes the model.
        batch_size: samples a step.
        device: that the model is trained on.
        workers: processes that decode; 0: none but this one.
    """

    splits: dict[str, Images]
    build: Callable[[], nn.Module]
    batch_size: int
    device: torch.device
    workers: int
    fingerprint: str = ""

    def model(self) -> nn.Module:
        return self.build()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches_from(seed, 0)

    def batches_from(self, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Nothing is decoded that is not needed: every sample has a generator of its own."""
        return self._loaded("train", islice(self._draws(seed), start, None), seed)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        output, targets = self.scores(model, split)
        scores = {"loss": F.cross_entropy(output, targets), **classification(output, targets)}
        return {name: value.item() for name, value in scores.items()}

    @torch.no_grad()
    def scores(self, model: nn.Module, split: Split) -> Scores:
        model.eval()
        every = range(len(self.splits[split].samples))
        firsts = every[:: self.batch_size]
        draws: Iterator[list[Draw]] = ([(i, None) for i in every[first : first + self.batch_size]] for first in firsts)
        found = [(model(x), y) for x, y in self._loaded(split, draws, 0)]
        model.train()
        output, targets = map(torch.cat, zip(*found, strict=True))
        return output, targets

    def _draws(self, seed: int) -> Iterator[list[Draw]]:
        """Batches without end, every sample of them with a seed that no other of the run has."""
        chosen = index_batches(len(self.splits["train"].samples), self.batch_size, seed, torch.device("cpu"))
        for step, indices in enumerate(chosen):
            first = (seed << 40) + step * self.batch_size
            yield [(index, first + i) for i, index in enumerate(indices.tolist())]

    def _loaded(self, split: str, draws: Iterator[list[Draw]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, standardised, on the device."""
        loader = DataLoader(
            self.splits[split],
            batch_sampler=draws,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),  # lest the workers' seeds be drawn from training's numbers
        )
        mean, deviation = (torch.tensor(c, device=self.device).view(3, 1, 1) for c in (MEAN, DEVIATION))
        for x, y in loader:
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            yield (x - mean) / deviation, y


def load(
    name: str,
    folder: str,
    build: Callable[[int], nn.Module],
    batch: int,
    size: int,
    part: float,
    root: Path | None,
    device: torch.device,
    workers: int | None = None,
) -> ImageFolder:
    """The task of a data set.

    Args:
        name: of the workload.
        folder: of the data set, in the folder `root` of all of them.
        build: makes the model for a number of classes.
        batch: samples a step.
        size, part: of the images, see `Images`.
        device: that the model is trained on.
        workers: processes that decode; None: one a core, up to sixteen.
    """
    place = folder_of(root, folder, name)
    classes, samples = read_training(place)
    tests = read_validation(place, classes)
    # Of the names alone: to read every pixel takes as long as an epoch.
    fingerprint = hash_of([[str(path.relative_to(place)), label] for path, label in samples + tests])
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(1, min(HELD_OUT, len(samples) // 10))
    parts = {
        "train": [samples[i] for i in order[count:]],
        "validation": [samples[i] for i in order[:count]],
        "test": tests,
    }
    if workers is None:
        workers = min(WORKERS, os.cpu_count() or 1)
    splits = {key: Images(chosen, size, part) for key, chosen in parts.items()}
    return ImageFolder(splits, partial(build, len(classes)), batch, device, workers, fingerprint)


SWIN = partial(swin_t, size=224, patch=4, window=7)

# At 224 x 224 on Tiny-ImageNet, as AGR was published: what it is, how it is built.
LARGE: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "swin-t": ("Swin-T, patch 4, window 7", SWIN),
    "convnext-t": ("ConvNeXt-T", convnext_t),
    "tinyvit-5m": ("TinyViT-5M", tinyvit_5m),
}

WORKLOADS = [
    Workload(
        name="tinyimagenet-resnet18",
        about="Tiny-ImageNet at 64 x 64, ResNet-18",
        tier="full",
        load=partial(load, "tinyimagenet-resnet18", "tiny-imagenet-200", resnet18, 128, 64, 1.0),
        batch_size=128,
        steps=17_000,  # 24 epochs, about ten minutes on one H200 GPU
        evaluate_every=703,
        metric="accuracy",
        goal="max",
        data=("tiny-imagenet-200",),
    ),
    *(
        Workload(
            name=f"tinyimagenet-{network}",
            about=f"Tiny-ImageNet at 224 x 224, {about}",
            tier="full",
            load=partial(load, f"tinyimagenet-{network}", "tiny-imagenet-200", build, 256, 224, 1.0),
            batch_size=256,
            steps=3_510,  # ten epochs, about ten minutes of Swin-T
            evaluate_every=351,
            metric="accuracy",
            goal="max",
            data=("tiny-imagenet-200",),
        )
        for network, (about, build) in LARGE.items()
    ),
    Workload(
        name="imagenet-resnet50",
        about="ImageNet at 224 x 224, ResNet-50",
        tier="full",
        load=partial(load, "imagenet-resnet50", "imagenet", partial(resnet50, large=True), 256, 224, 0.875),
        batch_size=256,
        steps=50_000,  # ten epochs, two to three hours
        evaluate_every=4965,
        metric="accuracy",
        goal="max",
        data=("imagenet",),
    ),
    Workload(
        name="imagenet-vgg16bn",
        about="ImageNet at 224 x 224, VGG-16 with BatchNorm",
        tier="full",
        load=partial(load, "imagenet-vgg16bn", "imagenet", partial(vgg16bn, large=True), 256, 224, 0.875),
        batch_size=256,
        steps=50_000,  # ten epochs, several hours
        evaluate_every=4965,
        metric="accuracy",
        goal="max",
        data=("imagenet",),
    ),
]
