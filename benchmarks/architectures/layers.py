"""Rows for single kinds of layers, each followed by a head of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import OUTSIDE, Architecture, Claim, uncovered

SHAPES = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}


class Last(nn.Module):
    """The last position of what a recurrent module returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


class Cell(nn.Module):
    """A recurrent cell, unrolled."""

    def __init__(self, inner: nn.LSTMCell) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = self.inner(x[:, t], state)
        return state[0]


class Square(nn.Module):
    """A bilinear module of one argument."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


class OwnLinear(nn.Linear):
    """A subclass as libraries have them: nothing changes."""


def vectors(*shape: int) -> Callable[[int], Tensor]:
    return lambda B: torch.randn(B, *shape)


def tokens(*shape: int, count: int = 5) -> Callable[[int], Tensor]:
    return lambda B: torch.randint(count, (B, *shape))


def mlp(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Tanh(), nn.Linear(4, 3))


def headed(module: nn.Module, features: int, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(module, nn.Tanh(), nn.Flatten(), nn.Linear(features, classes))


def conv(name: str, dims: int, make: Callable[[], nn.Module], **options: object) -> Architecture:
    """Two channels in, then the layer and a head."""
    channels = int(getattr(make(), "in_channels", 2))
    shape = (channels, *SHAPES[dims])
    features = make()(torch.zeros(2, *shape)).flatten(1).shape[1]
    return Architecture(name, lambda: headed(make(), features), vectors(*shape), **options)  # type: ignore[arg-type]


def pictures(name: str, norm: Callable[[], nn.Module], claims: dict[str, Claim], **options: object) -> Architecture:
    """A convolution, a norm over its four channels, a head."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))

    return Architecture(name, build, vectors(2, 5, 4), claims, **options)  # type: ignore[arg-type]


ROWS = [
    Architecture("mlp", mlp, vectors(4)),
    Architecture(
        "linear_no_bias",
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)),
        vectors(4),
    ),
    Architecture("linear_subclass", lambda: nn.Sequential(OwnLinear(4, 4), nn.Tanh(), OwnLinear(4, 3)), vectors(4)),
    Architecture("linear_seq", mlp, vectors(3, 4)),
    Architecture("the_model_is_a_layer", lambda: nn.Linear(4, 3), vectors(4), backpack={"*": OUTSIDE}),
    conv("conv2d", 2, lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1)),
    conv("conv2d_groups", 2, lambda: nn.Conv2d(4, 6, 3, groups=2)),
    conv("conv2d_depthwise", 2, lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1)),
    conv("conv2d_dilation", 2, lambda: nn.Conv2d(2, 4, 2, dilation=2)),
    conv("conv2d_same_pad", 2, lambda: nn.Conv2d(2, 4, 3, padding="same")),
    conv("conv2d_circular", 2, lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")),
    conv("conv2d_reflect", 2, lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")),
    conv("conv2d_replicate", 2, lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate")),
    conv("conv1d", 1, lambda: nn.Conv1d(2, 4, 3, padding=1)),
    conv("conv3d", 3, lambda: nn.Conv3d(2, 3, 2)),
    conv("convT1d", 1, lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)),
    conv("convT2d", 2, lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1)),
    conv("convT2d_depthwise", 2, lambda: nn.ConvTranspose2d(4, 8, 2, groups=4, dilation=2)),
    conv(
        "convT2d_groups",
        2,
        lambda: nn.ConvTranspose2d(4, 4, 2, groups=2),
        claims={"0.*": uncovered("no factors for ConvTranspose2d")},
    ),
    conv("convT3d", 3, lambda: nn.ConvTranspose3d(2, 2, 2, bias=False)),
    pictures("batchnorm", lambda: nn.BatchNorm2d(4), {}, coupled=True),
    Architecture("layernorm", lambda: mlp(nn.LayerNorm(4)), vectors(4)),
    pictures("groupnorm", lambda: nn.GroupNorm(2, 4), {}),
    Architecture("rmsnorm", lambda: mlp(nn.RMSNorm(4)), vectors(3, 4)),
    pictures("instancenorm", lambda: nn.InstanceNorm2d(4, affine=True), {}),
    Architecture(
        "embedding", lambda: nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)), tokens(3)
    ),
    Architecture(
        "embedding_bag",
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3)),
        tokens(3),
        {"0.weight": Claim("approximation", "every index of a bag counts as a row")},
    ),
    Architecture("prelu", lambda: mlp(nn.PReLU(4)), vectors(4), {"1.weight": uncovered("no factors for PReLU")}),
    Architecture(
        "bilinear", lambda: mlp(Square(nn.Bilinear(4, 4, 4))), vectors(4), {"1.*": uncovered("no factors for Bilinear")}
    ),
    Architecture(
        "lstm",
        lambda: nn.Sequential(Last(nn.LSTM(4, 3, num_layers=2, batch_first=True)), nn.Linear(3, 3)),
        vectors(5, 4),
        {"0.*": uncovered("no factors for LSTM")},
    ),
    Architecture(
        "gru",
        lambda: nn.Sequential(Last(nn.GRU(4, 3, bidirectional=True, batch_first=True)), nn.Linear(6, 3)),
        vectors(5, 4),
        {"0.*": uncovered("no factors for GRU")},
    ),
    Architecture(
        "lstm_cell",
        lambda: nn.Sequential(Cell(nn.LSTMCell(4, 3)), nn.Linear(3, 3)),
        vectors(3, 4),
        {"0.*": uncovered("no factors for LSTMCell")},
    ),
]
