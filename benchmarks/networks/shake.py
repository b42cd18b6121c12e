"""Residuals whose forward and backward coefficients differ, drawn for every sample.

Shake-Shake (Gastaldi 2017):            y = x + a f1(x) + (1 - a) f2(x);  a in [0, 1], in the backward pass b in [0, 1].
ShakeDrop (Yamada, Iwamura & Kise 2018): y = x + (c + a - c a) f(x);  a in [-1, 1], in the backward pass b in [0, 1].

c is 1 with the probability p of the block and else 0. In evaluation every coefficient is its expectation: 1/2, and p.
With `true_gradient` both directions have the forward one's: GNP's first pass asks for it, as its authors' code does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .parts import Pooled, conv, draw_convolutions
from .pyramidnet import PyramidNet


class Scale(torch.autograd.Function):
    """x times one coefficient forward, the gradient times another backward.

    Both are drawn before, so that a graph that is walked again, as for the curvature, is the same graph.
    """

    @staticmethod
    def forward(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return x * forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (coefficient,) = ctx.saved_tensors
        return gradient * coefficient, None, None


def draw(x: Tensor, low: float = 0.0) -> Tensor:
    """One number of [low, 1] a sample, to multiply x with."""
    return x.new_empty(len(x), *[1] * (x.ndim - 1)).uniform_(low, 1)


class ShakeShake(nn.Module):
    """The mixture of two residuals."""

    true_gradient = False

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if not self.training:
            return (first + second) / 2
        a, b = draw(first), draw(first)  # both in any case, so that every pass takes as many random numbers
        if self.true_gradient:
            b = a
        return Scale.apply(first, a, b) + Scale.apply(second, 1 - a, 1 - b)


class ShakeDrop(nn.Module):
    """A residual that is sometimes disturbed; `keep` is the probability p that it is not."""

    true_gradient = False

    def __init__(self, keep: float) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.keep * x
        kept, a, b = draw(x) < self.keep, draw(x, -1.0), draw(x)
        return Scale.apply(x, torch.where(kept, 1.0, a), torch.where(kept, 1.0, a if self.true_gradient else b))

    def extra_repr(self) -> str:
        return f"keep={self.keep:g}"


class TwoWays(nn.Module):
    """A shortcut that changes the shape: half of the channels from every second pixel, half from those between."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.ways = nn.ModuleList(conv(inputs, outputs // 2, 1) for _ in range(2))
        self.norm = nn.BatchNorm2d(outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x, (-1, 1, -1, 1))
        places = (y[..., :: self.stride, :: self.stride] for y in (x, shifted))
        return self.norm(torch.cat([way(y) for way, y in zip(self.ways, places, strict=True)], 1))


class Block(nn.Module):
    """Two residuals of ReLU and a 3 x 3 convolution, twice."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                *(nn.ReLU(), conv(inputs, width, 3, stride), nn.BatchNorm2d(width)),
                *(nn.ReLU(), conv(width, width, 3), nn.BatchNorm2d(width)),
            )
            for _ in range(2)
        )
        self.mix = ShakeShake()
        self.shortcut = nn.Identity() if inputs == width else TwoWays(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.mix(self.first(x), self.second(x))


class ShakeShakeNet(nn.Module):
    """Shake-Shake-depth 2 x width d for 32 x 32 pixels: three stages of (depth - 2) / 6 blocks."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, 16, 3), nn.BatchNorm2d(16)]
        inputs = 16
        for stage in range(3):
            for i in range((depth - 2) // 6):
                layers.append(Block(inputs, width << stage, 2 if stage and not i else 1))
                inputs = width << stage
        self.body = nn.Sequential(*layers, nn.ReLU())
        self.head = Pooled(inputs, classes)
        draw_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def shakedrop_pyramidnet(
    depth: int, alpha: float, classes: int, bottleneck: bool = True, last: float = 0.5
) -> PyramidNet:
    """A PyramidNet with ShakeDrop, whose p falls along the network from 1 to `last`."""
    return PyramidNet(depth, alpha, classes, bottleneck, lambda place: ShakeDrop(1 - place * (1 - last)))
