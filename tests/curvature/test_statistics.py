"""Statistics of a use against gradients of single samples, each taken alone by torch.func."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from grng.curvature import DenseStatistics, IndexStatistics, Layer, Statistics, make_layer
from grng.curvature.statistics import PATCH_ELEMENTS

from .harness import quantity
from .reference import matrices, relative

# module, input of a batch: (B, ...)
CASES = {
    "linear": (lambda: nn.Linear(4, 3), lambda B: torch.randn(B, 4)),
    "linear, positions": (lambda: nn.Linear(4, 3), lambda B: torch.randn(B, 5, 4)),
    "linear, more positions": (lambda: nn.Linear(4, 3, bias=False), lambda B: torch.randn(B, 2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), lambda B: torch.randn(B, 2, 8)),
    "conv2d, groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
        lambda B: torch.randn(B, 4, 4, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, bias=False), lambda B: torch.randn(B, 2, 3, 4, 3)),
    "embedding, one index": (lambda: nn.Embedding(7, 3), lambda B: torch.randint(7, (B,))),
    "embedding": (lambda: nn.Embedding(7, 3), lambda B: torch.randint(7, (B, 5))),
    "embedding, padding_idx": (lambda: nn.Embedding(4, 3, padding_idx=2), lambda B: torch.randint(4, (B, 5))),
}
GRID = [pytest.param(case, B, id=f"{case}-{B}") for case in CASES for B in (1, 3, 8)]
ALL = pytest.mark.parametrize(("case", "B"), GRID)
DENSE = pytest.mark.parametrize(("case", "B"), [g for g in GRID if "embedding" not in g.values[0]])


def build(case: str, B: int, seen: bool = True) -> tuple[nn.Module, Layer, Tensor, Tensor, Statistics]:
    """A layer, its input and output gradient, and their statistics; unless `seen`, some positions have no gradient."""
    make_module, make_input = CASES[case]
    module, x = make_module(), make_input(B)
    layer = make_layer("layer", module, set(module.parameters()))
    e = torch.randn_like(module(x))
    if not seen:
        positions = e.flatten(2).movedim(1, 2) if "conv" in case else e.view(B, -1, e.shape[-1])
        positions[torch.rand(positions.shape[:2]) < 0.4] = 0
        e[-1] = 0
    return module, layer, x, e, layer.statistics(x, e, B, torch.float64)


def alone(module: nn.Module, x: Tensor, e: Tensor) -> Tensor:
    """Gradient of <e_b, module(x_b)> for every sample b alone: (B, k, n_out, n_in)."""
    own = {n: p.detach() for n, p in module.named_parameters()}
    one = lambda o, xb, eb: (functional_call(module, o, (xb[None],))[0] * eb).sum()  # noqa: E731
    return matrices(module, vmap(grad(one), (None, 0, 0))(own, x, e))


def basis(k: int, n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(k, n, n))[0]


@ALL
@pytest.mark.parametrize("seen", [True, False], ids=["all", "some"])
def test_squared_gradients(case: str, B: int, seen: bool) -> None:
    module, _, x, e, statistics = build(case, B, seen)
    expected = alone(module, x, e).square().sum(0)
    torch.testing.assert_close(statistics.squared_gradients(), expected, rtol=1e-11, atol=1e-13)


@ALL
def test_squared_gradients_in_a_basis(case: str, B: int) -> None:
    module, layer, x, e, statistics = build(case, B)
    gradients = alone(module, x, e)
    U_out = basis(layer.blocks, layer.n_out)
    U_in = None if layer.indexed else basis(layer.blocks, layer.n_in)
    rotated = torch.einsum("kop,bkoi->bkpi", U_out, gradients)
    torch.testing.assert_close(statistics.squared_gradients(U_out), rotated.square().sum(0))
    if U_in is None:
        with pytest.raises(ValueError, match="input basis is the identity"):
            statistics.squared_gradients(U_out, basis(1, layer.n_in))
        return
    rotated = torch.einsum("bkpi,kij->bkpj", rotated, U_in)
    torch.testing.assert_close(statistics.squared_gradients(U_out, U_in), rotated.square().sum(0))
    only = torch.einsum("bkoi,kij->bkoj", gradients, U_in)
    torch.testing.assert_close(statistics.squared_gradients(None, U_in), only.square().sum(0))


@ALL
@pytest.mark.parametrize("groups", [1, 2, 5, 16])
@pytest.mark.parametrize("offset", [0, 3, 21])
def test_grouped_columns(case: str, B: int, groups: int, offset: int) -> None:
    """Sample b belongs to part (offset + b) mod groups; empty parts are zero."""
    module, _, x, e, statistics = build(case, B)
    statistics.offset = offset
    gradients = alone(module, x, e)
    expected = gradients.new_zeros(groups, *gradients.shape[1:])
    for b in range(B):
        expected[(offset + b) % groups] += gradients[b]
    found = statistics.columns(groups).dense()
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.sum(0), statistics.gradient())
    torch.testing.assert_close(statistics.columns().dense(), gradients, rtol=1e-11, atol=1e-13)


def rows_of(case: str, layer: Layer, x: Tensor, e: Tensor) -> list[list[tuple[Tensor, Tensor, int]]]:
    """Per block the pairs (x, e, sample) of every position that receives a gradient, one by one."""
    statistics = layer.statistics(x, e, x.shape[0], torch.float64)
    found: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in range(layer.blocks)]
    for k, pairs in enumerate(found):
        for b in range(x.shape[0]):
            if isinstance(statistics, IndexStatistics):
                at = zip(x[b].reshape(-1), e[b].reshape(-1, layer.n_out), strict=True)
                eye = torch.eye(layer.n_in)
                pairs += [(eye[i], g, b) for i, g in at if g.any() and i != layer.module.padding_idx]
            else:
                at = zip(statistics.x[k, b], statistics.e[k, b], strict=True)
                pairs += [(v, g, b) for v, g in at if g.any()]
    return found


@ALL
@pytest.mark.parametrize("seen", [True, False], ids=["all", "some"])
def test_moments_are_sums_over_the_rows_that_count(case: str, B: int, seen: bool) -> None:
    _, layer, x, e, statistics = build(case, B, seen)
    inputs = statistics.input_sum()
    inputs = inputs.diag_embed() if layer.indexed else inputs
    for k, pairs in enumerate(rows_of(case, layer, x, e)):
        zero = (torch.zeros(layer.n_in, layer.n_in), torch.zeros(layer.n_out, layer.n_out))
        torch.testing.assert_close(inputs[k], sum((torch.outer(v, v) for v, _, _ in pairs), zero[0]))
        torch.testing.assert_close(statistics.output_sum()[k], sum((torch.outer(g, g) for _, g, _ in pairs), zero[1]))
        assert statistics.rows[k] == len(pairs)
    total = sum((v.norm() * g.norm() for pairs in rows_of(case, layer, x, e) for v, g, _ in pairs), torch.zeros(()))
    torch.testing.assert_close(statistics.magnitude(), total)


@pytest.mark.parametrize(("case", "B"), [grid for grid in GRID if "conv" in grid.values[0]])
@pytest.mark.parametrize("seen", [True, False], ids=["all", "some"])
@pytest.mark.parametrize("elements", [1, 400])
def test_patches_are_written_out_a_few_at_a_time(
    case: str, B: int, seen: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment is that of all of them, however many there are at a time, and all at once are none in memory."""
    monkeypatch.setitem(PATCH_ELEMENTS, "cpu", elements)
    _, layer, x, e, statistics = build(case, B, seen)
    found = statistics.input_sum()
    assert "x" not in vars(statistics)
    every = layer.statistics(x, e, B, torch.float64).x
    kept = every * (statistics.e != 0).any(-1, keepdim=True)
    torch.testing.assert_close(found, torch.einsum("kbti,kbtj->kij", kept, kept), rtol=1e-12, atol=1e-13)
    assert statistics.x.shape == every.shape
    torch.testing.assert_close(statistics.input_sum(), found, rtol=1e-12, atol=1e-13)


def test_patches_of_images_that_are_parts_of_a_sample() -> None:
    """Frames of a video, say: positions of one sample, which comes with all of its frames."""
    module, x = nn.Conv2d(2, 3, 3), torch.randn(12, 2, 4, 5)
    layer = make_layer("layer", module, set(module.parameters()))
    e = torch.randn_like(module(x))
    apart, whole = layer.statistics(x, e, 12, torch.float64), layer.statistics(x, e, 4, torch.float64)
    torch.testing.assert_close(whole.input_sum(), apart.input_sum())
    assert (whole.x.shape, whole.samples, whole.positions) == ((1, 4, 18, 19), 4, 72)
    assert torch.equal(whole.x.flatten(1, 2), apart.x.flatten(1, 2))


@DENSE
@pytest.mark.parametrize("seen", [True, False], ids=["all", "some"])
def test_reduced(case: str, B: int, seen: bool) -> None:
    """One row a sample: inputs averaged over the positions that count, output gradients summed."""
    _, layer, x, e, statistics = build(case, B, seen)
    reduced = statistics.reduced()
    for k, pairs in enumerate(rows_of(case, layer, x, e)):
        Lambda, Gamma, rows = torch.zeros(layer.n_in, layer.n_in), torch.zeros(layer.n_out, layer.n_out), 0
        for b in range(B):
            mine = [(v, g) for v, g, sample in pairs if sample == b]
            if mine:
                v, g = torch.stack([v for v, _ in mine]).mean(0), torch.stack([g for _, g in mine]).sum(0)
                Lambda, Gamma, rows = Lambda + torch.outer(v, v), Gamma + torch.outer(g, g), rows + 1
        torch.testing.assert_close(reduced.input_sum()[k], Lambda)
        torch.testing.assert_close(reduced.output_sum()[k], Gamma)
        assert reduced.rows[k] == rows


def test_an_embedding_is_never_reduced() -> None:
    statistics = build("embedding", 3)[-1]
    assert statistics.reduced() is statistics


def test_index_statistics_equal_dense_ones_on_one_hot_rows() -> None:
    index, e = torch.randint(7, (8, 5)), torch.randn(8, 5, 3)
    sparse = IndexStatistics(index, e, 7)
    dense = DenseStatistics(nn.functional.one_hot(index, 7).to(e).unsqueeze(0), e.unsqueeze(0))
    U = basis(1, 3)
    for what, args in (("gradient", ()), ("output_sum", ()), ("squared_gradients", (U,)), ("columns", (3,))):
        assert relative(quantity(sparse, what)(*args), quantity(dense, what)(*args)) < 1e-12
    assert relative(sparse.input_sum().diag_embed(), dense.input_sum()) < 1e-12
    assert sparse.rows.tolist() == dense.rows.tolist()


@ALL
def test_sums_over_uses_are_those_of_both_batches(case: str, B: int) -> None:
    """Splitting a batch into two uses and adding: the same sums, and with the offset the same parts."""
    _, layer, x, e, whole = build(case, B + 2)
    first = layer.statistics(x[:B], e[:B], B, torch.float64)
    second = layer.statistics(x[B:], e[B:], 2, torch.float64)
    second.offset = B
    calls: list[tuple[str, tuple[Any, ...]]] = [("input_sum", ()), ("output_sum", ()), ("gradient", ())]
    calls += [("squared_gradients", ()), ("columns", (3,)), ("magnitude", ())]
    for what, args in calls:
        parts = quantity(first, what)(*args) + quantity(second, what)(*args)
        torch.testing.assert_close(parts, quantity(whole, what)(*args))
    torch.testing.assert_close(first.rows + second.rows, whole.rows)
