"""CIFAR-10 and CIFAR-100: the networks that gradient regularisation was published with, and transformers.

Crops out of 4 pixels of padding, mirror images, no label smoothing; a tenth of the training set, 5,000 images, is held
out. Where the images came as JPEG mosaics the fingerprint of the data begins with "jpeg-q90-", and results are those of
"CIFAR-10, JPEG q90"; elsewhere it begins with "exact-".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import standardise
from ..networks.cait import CaiT
from ..networks.pyramidnet import PyramidNet
from ..networks.resnet import WideResNet, resnet18, resnet50
from ..networks.shake import ShakeShakeNet, shakedrop_pyramidnet
from ..networks.swin import swin_t
from ..networks.vgg import vgg16bn
from ..networks.vit import vit_s, vit_ti
from ..records import fingerprint_of
from .augmentation import mirrored, mixed_up, shifted
from .base import Supervised, Workload, classification, folder_of, held_out
from .cifar_files import read_images, source_of

TRAINED = 45_000  # images; an evaluation an epoch
DROPOUT = 0.1  # of ViT in the recipes of GNP (Zhao, Zhang & Hu 2022)

# What it is, how it is built for a number of classes, samples a step, and steps: by counts of operations and bytes
# about ten minutes of AdamW on one H200 GPU in float32 (convolutions in TF32), but no more than 200 epochs.
NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module], int, int]] = {
    "resnet18": ("ResNet-18", resnet18, 128, 60_000),
    "resnet50": ("ResNet-50", resnet50, 128, 22_000),
    "wrn16-4": ("WRN-16-4", partial(WideResNet, 16, 4), 128, 70_000),
    "wrn28-10": ("WRN-28-10", partial(WideResNet, 28, 10), 128, 14_000),
    "vgg16bn": ("VGG-16 with BatchNorm", vgg16bn, 128, 70_000),
    "pyramidnet110": ("PyramidNet-110, alpha 270", partial(PyramidNet, 110, 270), 128, 8_000),
    "shake-shake": ("Shake-Shake-26 2x96d", partial(ShakeShakeNet, 26, 96), 128, 10_000),
    "shakedrop": ("PyramidNet-272, alpha 200, with ShakeDrop", partial(shakedrop_pyramidnet, 272, 200), 128, 5_000),
    "vit-ti": ("ViT-Ti/4", partial(vit_ti, dropout=DROPOUT), 256, 22_000),
    "vit-s": ("ViT-S/4", partial(vit_s, dropout=DROPOUT), 256, 7_000),
    "vit-s-mixup": ("ViT-S/4 with mixup", partial(vit_s, dropout=DROPOUT), 256, 7_000),
    "swin-t": ("Swin-T, patch 2, window 4", swin_t, 256, 25_000),
    "cait-xxs": ("CaiT-XXS-24/4", CaiT, 256, 12_000),
}


def augment(x: Tensor) -> Tensor:
    return mirrored(shifted(x, 4))


@dataclass
class Mixed(Supervised):
    """A classification whose training batches are mixed up.

    Attributes:
        classes: how many there are.
    """

    classes: int = 0

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in super().batches(seed):
            yield mixed_up(x, y, self.classes)


def load(folder: str, network: str, root: Path | None, device: torch.device) -> Supervised:
    _, build, batch, _ = NETWORKS[network]
    task = classify(folder_of(root, folder, f"{folder}-{network}"), build, batch, device)
    if network.endswith("-mixup"):
        return Mixed(**vars(task), classes=int(max(y.max() for _, y in task.splits.values())) + 1)
    return task


def classify(place: Path, build: Callable[[int], nn.Module], batch: int, device: torch.device) -> Supervised:
    """The task of classifying the images in a folder by the network that `build` makes for a number of classes."""
    images = read_images(place)
    x, x_test, _ = standardise(*(images[key].to(device).float() for key in ("x_train", "x_test")))
    y, y_test = (images[key].to(device) for key in ("y_train", "y_test"))
    return Supervised(
        held_out(x, y) | {"test": (x_test, y_test)},
        partial(build, int(y.max()) + 1),
        F.cross_entropy,
        classification,
        batch,
        prepare=augment,
        fingerprint=f"{source_of(place)}-{fingerprint_of(*images.values())}",
    )


def workload(folder: str, data: str, network: str) -> Workload:
    about, _, batch, steps = NETWORKS[network]
    return Workload(
        name=f"{folder}-{network}",
        about=f"{data}, {about}",
        tier="full",
        load=partial(load, folder, network),
        batch_size=batch,
        steps=steps,
        evaluate_every=TRAINED // batch,
        metric="accuracy",
        goal="max",
        data=(folder,),
    )


WORKLOADS = [
    *(workload("cifar10", "CIFAR-10", network) for network in NETWORKS),
    workload("cifar100", "CIFAR-100", "resnet18"),
]
