"""TinyViT (Wu et al. 2022): convolutions, then attention in windows with a depthwise convolution in each block."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import FeedForward, draw_linear, heads_joined, heads_of
from .swin import from_windows, to_windows


class Normed(nn.Sequential):
    """A convolution whose bias its BatchNorm takes over."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs))


class MBConv(nn.Module):
    """gelu(x + project gelu(depthwise gelu(expand x)))."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        wide = ratio * width
        self.layers = nn.Sequential(
            Normed(width, wide, 1), nn.GELU(), Normed(wide, wide, 3, groups=wide), nn.GELU(), Normed(wide, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.layers(x))


class Merge(nn.Sequential):
    """Another width, half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        middle = Normed(outputs, outputs, 3, 2, groups=outputs)
        super().__init__(Normed(inputs, outputs, 1), nn.GELU(), middle, nn.GELU(), Normed(outputs, outputs, 1))


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(part) + bias) v of windows (N, windows, side * side, C); the bias depends on how far apart
    two places are in either direction."""

    distances: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(heads, side * side))
        place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        row, column = (place[:, None] - place[None]).abs().unbind(-1)
        self.register_buffer("distances", row * side + column, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (heads_of(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        return self.out(heads_joined(F.scaled_dot_product_attention(q, k, v, self.bias[:, self.distances])))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.side, self.attention = side, WindowAttention(width, heads, side)
        self.local = Normed(width, width, 3, groups=width)
        self.norm, self.feed = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1)
        windows = self.attention(to_windows(tokens, self.side))
        tokens = tokens + from_windows(windows, x.shape[-1], self.side)
        tokens = self.local(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (tokens + self.feed(self.norm(tokens))).permute(0, 3, 1, 2)


class TinyViT(nn.Module):
    """A quarter of the image's size, and half of that in each further stage.

    Args:
        classes: outputs.
        widths, blocks, heads, windows: of each stage, windows in tokens of a side; the first has convolutions alone.
    """

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        heads: Sequence[int],
        windows: Sequence[int],
    ) -> None:
        super().__init__()
        first = widths[0]
        self.embed = nn.Sequential(Normed(3, first // 2, 3, 2), nn.GELU(), Normed(first // 2, first, 3, 2))
        layers: list[nn.Module] = [MBConv(first) for _ in range(blocks[0])]
        for stage in range(1, len(widths)):
            layers.append(Merge(widths[stage - 1], widths[stage]))
            layers += [Block(widths[stage], heads[stage], windows[stage]) for _ in range(blocks[stage])]
        self.stages = nn.Sequential(*layers)
        self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)
        draw_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.embed(x)).mean((2, 3))))


def tinyvit_5m(classes: int) -> TinyViT:
    """For images of 224 pixels."""
    return TinyViT(classes, (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7))
