"""The models of the comparison: small ones that fit the shape of the data, free of dropout and of batch statistics."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError, choose

MODELS = ("mlp", "cnn", "transformer")


def build_model(name: str, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build a model for samples of `shape`, (features,) or (channels, height, width), from torch's global generator."""
    choose("model", name, MODELS)
    if name == "mlp":
        return mlp(math.prod(shape), outputs)
    if len(shape) != 3:
        raise InputError(f"model {name!r} needs images, but the samples have shape {shape}: use --model mlp")
    return cnn(shape, outputs) if name == "cnn" else Transformer(shape, outputs)


def mlp(features: int, outputs: int) -> nn.Sequential:
    """Two hidden layers: features-128-64-outputs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, outputs)
    )


def cnn(shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Two convolutions, each followed by pooling, and two linear layers."""
    channels, height, width = shape
    if min(height, width) < 4:
        raise InputError(f"model 'cnn' needs images of 4 x 4 pixels or more, not {height} x {width}: use --model mlp")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, outputs),
    )


class Block(nn.Module):
    """A pre-norm transformer block.

    Attention is written out because the fused kernels have no second derivative, which reng's double mode takes.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small vision transformer: about 4 x 4 patches as tokens, two blocks, the mean of the tokens classified."""

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int = 32, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        channels, height, wide = shape
        self.patch = max(1, math.ceil(max(height, wide) / 4))
        tokens = math.ceil(height / self.patch) * math.ceil(wide / self.patch)
        self.pad = (0, -wide % self.patch, 0, -height % self.patch)
        self.embed = nn.Linear(channels * self.patch**2, width)
        # As large as the embedded patches: small images differ most by where their strokes are.
        self.position = nn.Parameter(0.3 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.pad(x, self.pad), self.patch, stride=self.patch).mT
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))
