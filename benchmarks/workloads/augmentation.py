"""Random changes of a batch of images (N, C, H, W), drawn from the global generator."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mirrored(x: Tensor) -> Tensor:
    """Half of the images, left and right exchanged."""
    chosen = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(-1), x)


def shifted(x: Tensor, pad: int) -> Tensor:
    """A window of the images' own size out of what `pad` black pixels on every side make of them.

    >>> shifted(torch.ones(8, 3, 32, 32), 4).shape
    torch.Size([8, 3, 32, 32])
    """
    height, width = x.shape[-2:]
    windows = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    rows, columns = torch.randint(2 * pad + 1, (2, len(x)), device=x.device)
    return windows[torch.arange(len(x), device=x.device), :, rows, columns]


def mixed_up(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A batch mixed with itself, last to first, in one random proportion, and the probabilities (N, classes) of what is
    in each (mixup, Zhang et al. 2018, with alpha = 1)."""
    part = torch.rand((), device=x.device)
    probabilities = F.one_hot(y, classes).to(x.dtype)
    return part * x + (1 - part) * x.flip(0), part * probabilities + (1 - part) * probabilities.flip(0)
