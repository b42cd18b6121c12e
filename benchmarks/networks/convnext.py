"""ConvNeXt (Liu et al. 2022): depthwise convolutions in place of attention, else a transformer's blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .parts import FeedForward, draw_linear

EPS = 1e-6


def channels_last(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What acts on the last dimension, on the channels of (N, C, H, W)."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + scale * feed(norm(depthwise x)), the scale beginning at 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.feed = nn.LayerNorm(width, eps=EPS), FeedForward(width)
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + channels_last(lambda y: self.scale * self.feed(self.norm(y)), self.depthwise(x))


class Halve(nn.Module):
    """Half the size, another width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(inputs, eps=EPS), nn.Conv2d(inputs, outputs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(channels_last(self.norm, x))


class ConvNeXt(nn.Module):
    """Stages, each of half the size of the one before; the mean over all places is classified.

    Args:
        classes: outputs.
        widths, blocks: of each stage.
        patch: pixels of a patch's side.
    """

    def __init__(self, classes: int, widths: Sequence[int], blocks: Sequence[int], patch: int = 4) -> None:
        super().__init__()
        self.embed, self.first = nn.Conv2d(3, widths[0], patch, patch), nn.LayerNorm(widths[0], eps=EPS)
        layers: list[nn.Module] = []
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += [Halve(widths[stage - 1], width)] if stage else []
            layers += [Block(width) for _ in range(count)]
        self.stages = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1], eps=EPS), nn.Linear(widths[-1], classes)
        draw_linear(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(channels_last(self.first, self.embed(x))).mean((2, 3))))


def convnext_t(classes: int) -> ConvNeXt:
    return ConvNeXt(classes, (96, 192, 384, 768), (3, 3, 9, 3))
