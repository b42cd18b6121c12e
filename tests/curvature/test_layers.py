"""Geometry: rows read from a layer's input and output gradient are those that automatic differentiation sees."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from grng.curvature import conv_windows, make_layer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
BATCHES = pytest.mark.parametrize("B", [1, 3, 8])
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}  # odd and even: padding="same" is lopsided for the even ones

# channels in, channels out, groups, stride, dilation, padding
GEOMETRIES = [
    (2, 3, 1, 1, 1, 0),
    (2, 3, 1, 2, 1, 1),
    (2, 2, 1, 1, 2, 2),
    (4, 2, 2, 2, 1, 1),
    (3, 6, 3, 1, 1, 1),  # depthwise
    (4, 4, 2, 1, 1, "same"),
    (2, 3, 1, 1, 1, "valid"),
]
# one geometry an axis of its own
MIXED = [
    (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), (7, 5)),
    (nn.Conv2d(2, 2, (3, 4), padding="same", dilation=(2, 1), padding_mode="circular"), (7, 5)),
    (nn.Conv3d(2, 2, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="replicate"), (3, 5, 4)),
    (nn.Conv1d(3, 2, 1), (4,)),
]


def conv_cases() -> list[Any]:
    cases = []
    modes = ("zeros", "reflect", "replicate", "circular")
    for dims, mode, (c_in, c_out, groups, stride, dilation, padding) in product(CONVS, modes, GEOMETRIES):
        if padding in (0, "valid") and mode != "zeros":
            continue  # nothing is padded: the same case again
        kernel = KERNELS[dims]
        if dilation == 2:
            kernel = tuple(2 for _ in kernel)
        settings = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode, "groups": groups}
        name = f"{dims}d-{mode}-g{groups}-s{stride}-d{dilation}-p{padding}"
        cases.append(pytest.param((CONVS[dims], (c_in, c_out, kernel), settings), SIZES[dims], id=name))
    return cases


def derived_patches(conv: nn.Module, x: Tensor) -> Tensor:
    """(groups, B, positions, columns): d out[b, o, t] / d weight[o], the same for every o of a group."""
    J = jacrev(lambda w: functional_call(conv, {"weight": w}, (x,)).flatten(2))(conv.weight.detach())
    J = J.flatten(4)  # (B, out, positions, out, columns)
    own = J.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)  # (out, B, positions, columns)
    assert J.norm() == pytest.approx(own.norm().item())  # no output sees another's weight
    per_group = own.unflatten(0, (conv.groups, -1))
    assert torch.equal(per_group, per_group[:, :1].expand_as(per_group))
    return per_group[:, 0]


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """(groups, B, positions, columns)."""
    windows = conv_windows(conv, x)
    return windows.flatten(2, x.ndim - 1).flatten(3)


@BATCHES
@pytest.mark.parametrize(("recipe", "size"), conv_cases())
def test_patches_are_those_of_autograd(recipe: tuple[Any, Any, Any], size: tuple[int, ...], B: int) -> None:
    kind, args, settings = recipe
    conv = kind(*args, **settings)
    x = torch.randn(B, args[0], *size)
    torch.testing.assert_close(patches(conv, x), derived_patches(conv, x), rtol=0, atol=0)


@BATCHES
@pytest.mark.parametrize(("conv", "size"), MIXED, ids=str)
def test_patches_with_a_geometry_per_axis(conv: nn.Module, size: tuple[int, ...], B: int) -> None:
    conv = conv.double()
    x = torch.randn(B, conv.in_channels, *size)
    torch.testing.assert_close(patches(conv, x), derived_patches(conv, x), rtol=0, atol=0)


def frozen(module: nn.Module, which: str) -> nn.Module:
    getattr(module, which).requires_grad_(False)
    return module


def vectors(*lead: int) -> Any:
    return lambda B: torch.randn(*(n or B for n in lead), 4)


def images(*size: int) -> Any:
    return lambda B: torch.randn(B, *size)


def indices(*tail: int) -> Any:
    return lambda B: torch.randint(7, (B, *tail))


# module, input of a batch; 0 in a shape stands for the batch
LAYERS = {
    "linear 1-D": (lambda: nn.Linear(4, 3), vectors()),
    "linear 2-D": (lambda: nn.Linear(4, 3), vectors(0)),
    "linear 3-D": (lambda: nn.Linear(4, 3), vectors(0, 5)),
    "linear 4-D": (lambda: nn.Linear(4, 3), vectors(0, 2, 3)),
    "linear, batch second": (lambda: nn.Linear(4, 3), vectors(5, 0)),
    "linear, positions in the batch": (lambda: nn.Linear(4, 3), lambda B: torch.randn(B * 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), vectors(0, 5)),
    "linear, frozen weight": (lambda: frozen(nn.Linear(4, 3), "weight"), vectors(0, 5)),
    "linear, frozen bias": (lambda: frozen(nn.Linear(4, 3), "bias"), vectors(0, 5)),
    "linear, one output": (lambda: nn.Linear(4, 1), vectors(0)),
    "linear, transposed input": (lambda: nn.Linear(4, 3), lambda B: torch.randn(B, 4, 5).mT),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), images(2, 8)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, dilation=2), images(2, 6, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 4, 3, bias=False, padding_mode="reflect", padding=1), images(2, 6, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), images(4, 6, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding="same"), images(3, 6, 5)),
    "conv2d, frozen weight": (lambda: frozen(nn.Conv2d(4, 6, 3, groups=2), "weight"), images(4, 6, 5)),
    "conv2d, frozen bias": (lambda: frozen(nn.Conv2d(4, 6, 3, groups=2), "bias"), images(4, 6, 5)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last),
        lambda B: torch.randn(B, 4, 6, 5).to(memory_format=torch.channels_last),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="circular"), images(2, 3, 4, 3)),
    "conv1d unbatched": (lambda: nn.Conv1d(2, 4, 3), lambda B: torch.randn(2, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(2, 4, 3, groups=2), lambda B: torch.randn(2, 6, 5)),
    "conv3d unbatched": (lambda: nn.Conv3d(2, 2, 2), lambda B: torch.randn(2, 3, 4, 3)),
    "embedding 1-D": (lambda: nn.Embedding(7, 3), indices()),
    "embedding 2-D": (lambda: nn.Embedding(7, 3), indices(5)),
    "embedding 3-D": (lambda: nn.Embedding(7, 3), indices(5, 2)),
    "embedding, padding_idx": (lambda: nn.Embedding(7, 3, padding_idx=2), indices(5)),
    "bags, sum": (lambda: nn.EmbeddingBag(7, 3, mode="sum"), indices(5)),
    "bags, mean, padding_idx": (lambda: nn.EmbeddingBag(7, 3, mode="mean", padding_idx=2), indices(5)),
    "layer norm": (lambda: nn.LayerNorm(4), vectors(0, 5)),
    "layer norm, one sample": (lambda: nn.LayerNorm(4), vectors()),
    "layer norm of two axes": (lambda: nn.LayerNorm((5, 4)), vectors(0, 5)),
    "layer norm, frozen scale": (lambda: frozen(nn.LayerNorm(4), "weight"), vectors(0, 5)),
    "layer norm, frozen shift": (lambda: frozen(nn.LayerNorm(4), "bias"), vectors(0, 5)),
    "RMS norm": (lambda: nn.RMSNorm(4), vectors(0, 2, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), lambda B: torch.randn(B + 1, 4)),
    "batch norm on images": (lambda: nn.BatchNorm2d(4), images(4, 3, 2)),
    "batch norm, evaluation": (lambda: nn.BatchNorm2d(4).eval(), images(4, 3, 2)),
    "batch norm without statistics": (lambda: nn.BatchNorm3d(4, track_running_stats=False).eval(), images(4, 3, 2, 2)),
    "group norm": (lambda: nn.GroupNorm(2, 4), images(4, 3, 2)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), images(4, 3)),
    "instance norm, evaluation": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        images(4, 3, 2),
    ),
}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# channels in, channels out, groups, stride, dilation, padding, output padding
SPREADS = [
    (2, 3, 1, 1, 1, 0, 0),
    (2, 3, 1, 2, 1, 1, 1),
    (3, 2, 1, 3, 2, 2, 0),
    (3, 6, 3, 2, 1, 1, 0),  # depthwise
    (2, 3, 1, 2, 1, 2, 0),  # more is cut off than the kernel adds
]
LAYERS |= {
    f"transposed {dims}d-{'-'.join(map(str, row))}": (
        lambda dims=dims, row=row: TRANSPOSED[dims](
            *row[:2],
            KERNELS[dims],
            groups=row[2],
            stride=row[3],
            dilation=row[4],
            padding=row[5],
            output_padding=row[6],
        ),
        lambda B, dims=dims, row=row: torch.randn(B, row[0], *SIZES[dims]),
    )
    for dims in TRANSPOSED
    for row in SPREADS
}


@BATCHES
@pytest.mark.parametrize("case", LAYERS)
def test_gradient_is_that_of_autograd(case: str, B: int) -> None:
    """sum e x^T, read as the shapes of weight and bias, == what autograd gives for the same output gradient."""
    build, make_input = LAYERS[case]
    module, x = build(), make_input(B)
    trainable = {p for p in module.parameters() if p.requires_grad}
    layer = make_layer("layer", module, trainable)
    assert layer is not None
    out = module(x)
    e = torch.randn_like(out)
    expected = dict(zip(trainable, torch.autograd.grad(out, list(trainable), e), strict=True))
    statistics = layer.statistics(x, e, B, torch.float64)
    found = dict(layer.views(statistics.gradient()))
    assert found.keys() == trainable
    for p, gradient in found.items():
        torch.testing.assert_close(gradient, expected[p], rtol=1e-12, atol=1e-13)
    assert statistics.gradient().shape == (layer.blocks, layer.n_out, layer.n_in)


SAMPLES = [
    # leading dimensions, batch as the model's output shows it, samples
    ((3,), 3, 3),
    ((3, 5), 3, 3),
    ((3, 5, 2), 3, 3),
    ((15,), 3, 3),  # positions flattened into the batch, sample by sample
    ((15, 2), 3, 3),
    ((2, 3), 3, 2),  # the leading dimension is not made of the batch
    ((2,), 3, 2),
    ((3, 5), None, 3),  # the output did not show a batch
    ((5,), 1, 1),
    ((), 3, 1),
]


@pytest.mark.parametrize(("lead", "batch", "samples"), SAMPLES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_samples_are_those_of_the_batch(kind: str, lead: tuple[int, ...], batch: int | None, samples: int) -> None:
    module = nn.Linear(4, 2) if kind == "linear" else nn.Embedding(7, 2)
    layer = make_layer("layer", module, set(module.parameters()))
    x = torch.randn(*lead, 4) if kind == "linear" else torch.randint(7, lead)
    statistics = layer.statistics(x, torch.randn(*lead, 2), batch, torch.float64)
    assert statistics.samples == samples
    assert statistics.rows.item() == torch.Size(lead).numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_come_in_the_factors_precision(own: torch.dtype, dtype: torch.dtype) -> None:
    module = nn.Linear(4, 3).to(own)
    layer = make_layer("layer", module, set(module.parameters()))
    x = torch.randn(5, 4, dtype=own)
    statistics = layer.statistics(x, torch.randn(5, 3, dtype=own), 5, dtype)
    assert statistics.input_sum().dtype == statistics.output_sum().dtype == statistics.rows.dtype == dtype


class OwnNorm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


UNSUPPORTED = {
    "transposed conv, groups": lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),  # its weight is no view of matrices
    "largest of a bag": lambda: nn.EmbeddingBag(7, 3, mode="max"),
    "normalisation with a formula of its own": OwnNorm,
    "normalisation without parameters": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "recurrent": lambda: nn.LSTM(4, 3),
    "lazy, not built yet": lambda: nn.LazyLinear(3),
    "bilinear": lambda: nn.Bilinear(2, 2, 2),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_other_modules_are_no_layers(case: str) -> None:
    module = UNSUPPORTED[case]()
    assert make_layer("layer", module, set(module.parameters())) is None


def test_a_frozen_layer_is_no_layer() -> None:
    module = nn.Linear(4, 3)
    assert make_layer("layer", module, set()) is None


@pytest.mark.parametrize("case", LAYERS)
def test_put_and_views_are_inverse(case: str) -> None:
    module = LAYERS[case][0]()
    trainable = {p for p in module.parameters() if p.requires_grad}
    layer = make_layer("layer", module, trainable)
    stack = torch.full((layer.blocks, layer.n_out, layer.n_in), torch.nan)
    values = {p: torch.randn_like(p) for p in trainable}
    layer.put(stack, values.get)
    assert not stack.isnan().any()
    for p, view in layer.views(stack):
        assert torch.equal(view, values[p])
        assert view.data_ptr() >= stack.data_ptr()
    missing = layer.owner
    layer.put(stack, lambda p: None if p is missing else values[p])
    assert all(torch.equal(view, torch.zeros_like(p) if p is missing else values[p]) for p, view in layer.views(stack))
