"""Models that make capture hard, each with what must become of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from grng.benchmarks.architectures.structures import (
    Named,
    added_in_place,
    half_frozen,
    hooked,
    linear,
    slice_in_place,
    tied_linears,
    unrolled,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


class Conv1D(nn.Module):
    """A linear layer with transposed weight, by transformers' name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = nf, nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class OneRMSNorm(nn.Module):
    """As model libraries have it: a name that ends so, and a scale that begins at zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(size)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class OwnLinear(nn.Linear):
    """A subclass as libraries have them: nothing changes."""


@dataclass
class Case:
    """A model and its input; `failed` are layers that must fall back visibly, `unseen` parameters without factors."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor] = lambda B: torch.randn(B, 4)
    failed: set[str] = field(default_factory=set)
    unseen: dict[str, str] = field(default_factory=dict)
    reused: bool = False  # a layer is called more than once


def adapted() -> nn.Module:
    """LoRA at its start: the second matrix is zero, so that the first one receives a gradient of zeros."""
    low, up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
    nn.init.zeros_(up.weight)
    model = Named(lambda m, x: m.base(x) + m.up(m.low(x)), base=linear(4, 3), low=low, up=up)
    model.base.requires_grad_(False)
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))


def decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    run = lambda m, x: m.out(m.layer(x[:, :2], m.memory(x)).flatten(1))  # noqa: E731
    return Named(run, layer=layer, memory=linear(), out=linear(8, 3))


def attending(run: Callable[..., Tensor], **settings: Any) -> Case:
    """MultiheadAttention on three positions of four numbers."""
    return Case(
        lambda: Named(
            lambda m, x: m.out(run(m.attention, x).flatten(1)),
            attention=nn.MultiheadAttention(4, 2, batch_first=True, **settings), out=linear(12, 3),
        ),
        lambda B: torch.randn(B, 3, 4),
    )  # fmt: skip


def normed(norm: Callable[[], nn.Module], *size: int) -> Case:
    """A normalisation of four channels between two layers."""
    return Case(
        lambda: nn.Sequential(norm(), nn.Tanh(), nn.Flatten(), linear(math.prod(size), 3)),
        lambda B: torch.randn(B, *size),
    )


def settled(norm: nn.Module) -> nn.Module:
    """With statistics of its own that stay."""
    nn.init.normal_(norm.running_mean)
    return norm.eval()


CASES = {
    "in-place ReLU": Case(lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), linear(4, 3))),
    "in-place addition": Case(lambda: Named(added_in_place, a=linear(), b=linear(), c=linear(4, 3))),
    "in-place on a slice": Case(lambda: Named(slice_in_place, a=linear(), c=linear(4, 3))),
    "residual": Case(lambda: Named(lambda m, x: m.b(x + m.a(x).tanh()), a=linear(), b=linear(4, 3))),
    "called twice": Case(
        lambda: Named(lambda m, x: m.b(m.a(m.a(x).tanh())), a=linear(), b=linear(4, 3)), reused=True
    ),
    "recurrent": Case(
        lambda: Named(unrolled, a=linear(), b=linear(), c=linear(4, 3)), lambda B: torch.randn(B, 3, 4), reused=True
    ),
    "keyword-only call": Case(lambda: Named(lambda m, x: m.b(input=m.a(input=x).tanh()), a=linear(), b=linear(4, 3))),
    "subclass": Case(lambda: nn.Sequential(OwnLinear(4, 4), nn.Tanh(), OwnLinear(4, 3))),
    "checkpointed": Case(
        lambda: Named(
            lambda m, x: m.b(checkpoint(lambda h: m.inner(m.a(h).tanh()).tanh(), x, use_reentrant=False)),
            a=linear(), inner=linear(), b=linear(4, 3),
        )
    ),
    "the model is a layer": Case(lambda: linear(4, 3)),
    "a layer within a layer's output": Case(
        lambda: Named(lambda m, x: m.b(x) * m.a(x).softmax(-1), a=linear(4, 3), b=linear(4, 3))
    ),
    "one output broadcast": Case(lambda: Named(lambda m, x: m.a(x) * torch.arange(3.0), a=linear(4, 1))),
    "adapted": Case(adapted),
    "partly frozen": Case(half_frozen),
    "somebody else's hook": Case(hooked),
    "parametrized weight": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear(4, 3)),
        unseen={f"0.parametrizations.weight.original{i}": "no factors" for i in (0, 1)},
    ),
    "tied weights": Case(
        tied_linears,
        unseen={n: "a weight is shared between a, b" for n in ("a.weight", "a.bias", "b.bias")},
    ),
    "functional use": Case(
        lambda: Named(lambda m, x: m.b(F.linear(x, m.a.weight, m.a.bias)), a=linear(), b=linear(4, 3)), failed={"a"}
    ),
    "functional use beside a call": Case(
        lambda: Named(lambda m, x: m.b(m.a(x) + F.linear(x, m.a.weight)), a=linear(), b=linear(4, 3)), failed={"a"}
    ),
    "embedding as output matrix": Case(
        lambda: Named(lambda m, x: F.linear(m.emb(x).mean(1), m.emb.weight), emb=nn.Embedding(5, 4)),
        lambda B: torch.randint(5, (B, 3)),
        failed={"emb"},
    ),
    "embedding scaled by frequency": Case(
        lambda: nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), linear(12, 3)),
        lambda B: torch.zeros(B, 3, dtype=torch.long),
        failed={"0"},
    ),
    "attention": Case(
        lambda: Named(
            lambda m, x: m.out(m.attention(x, x, x)[0].flatten(1)),
            attention=nn.MultiheadAttention(4, 2, batch_first=True), out=linear(12, 3),
        ),
        lambda B: torch.randn(B, 3, 4),
    ),
    "attention, cross": attending(lambda attention, x: attention(x, x[:, :2].tanh(), x[:, :2].tanh())[0]),
    "attention, three inputs": attending(lambda attention, x: attention(x, x.tanh(), x.exp())[0]),
    "attention, keywords, no bias": attending(
        lambda attention, x: attention(query=x, key=x, value=x, need_weights=False)[0], bias=False
    ),
    "attention, added rows": attending(lambda attention, x: attention(x, x, x)[0], add_zero_attn=True),
    "attention, weights apart": replace(
        attending(lambda attention, x: attention(x, x[..., :3], x[..., :2])[0], kdim=3, vdim=2),
        unseen={"attention.in_proj_bias": "no factors for MultiheadAttention"},
    ),
    "encoder layer": Case(encoder, lambda B: torch.randn(B, 3, 4)),
    "decoder layer": Case(decoder, lambda B: torch.randn(B, 3, 4)),
    "layer norm": normed(lambda: nn.LayerNorm(4), 3, 4),
    "layer norm of two axes": normed(lambda: nn.LayerNorm((3, 4), bias=False), 3, 4),
    "RMS norm": normed(lambda: nn.RMSNorm(4), 3, 4),
    "RMS norm of a library": normed(lambda: OneRMSNorm(4), 3, 4),
    "group norm": normed(lambda: nn.GroupNorm(2, 4), 4, 3),
    "instance norm": normed(lambda: nn.InstanceNorm2d(4, affine=True), 4, 2, 3),
    "batch norm, settled": normed(lambda: settled(nn.BatchNorm2d(4)), 4, 2, 3),
    "transposed weight": Case(lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), linear(5, 3))),
    "transposed convolution": Case(
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), linear(15, 3)),
        lambda B: torch.randn(B, 2, 3),
    ),
    "bags": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean"), nn.Tanh(), linear(4, 3)),
        lambda B: torch.randint(5, (B, 3)),
    ),
    "bags by offsets": Case(
        lambda: Named(
            lambda m, x: m.out(m.bag(x.flatten(), torch.arange(len(x)) * 3).tanh()),
            bag=nn.EmbeddingBag(5, 4, mode="sum"), out=linear(4, 3),
        ),
        lambda B: torch.randint(5, (B, 3)),
        failed={"bag"},
    ),
}  # fmt: skip
