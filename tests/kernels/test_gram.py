"""Sums over rows against plain loops over samples and positions, one matrix at a time."""

import sys

import pytest
import torch
from grng.kernels import contract, gram, squared_gradients
from grng.kernels.einsum import _expression
from torch import Tensor

# k, B, T, n_in, n_out
SHAPES = pytest.mark.parametrize(
    ("k", "B", "T", "n_in", "n_out"),
    [(1, 1, 1, 1, 1), (1, 3, 1, 4, 2), (1, 8, 5, 3, 4), (3, 1, 4, 2, 5), (2, 3, 1, 5, 5), (4, 8, 2, 3, 1)],
)


def rows(k: int, B: int, T: int, n: int) -> Tensor:
    return torch.randn(k, B, T, n)


def sample_gradient(x: Tensor, e: Tensor, j: int, b: int) -> Tensor:
    """sum_t e_t x_t^T of one sample of one matrix."""
    return torch.stack([torch.outer(e[j, b, t], x[j, b, t]) for t in range(x.shape[2])]).sum(0)


@SHAPES
def test_gram(k: int, B: int, T: int, n_in: int, n_out: int) -> None:
    x = rows(k, B, T, n_in)
    expected = torch.stack([sum(torch.outer(r, r) for r in x[j].flatten(0, 1)) for j in range(k)])
    torch.testing.assert_close(gram(x), expected)


@pytest.mark.parametrize(("panel", "panels"), [(1, 1), (1, 4), (2, 3), (3, 100), (50, 4)])
@pytest.mark.parametrize("n", [1, 2, 5, 11, 12])
def test_gram_in_panels(n: int, panel: int, panels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number and width, the last one smaller: the same sum, symmetric outside of the panels to the bit."""
    for name, value in (("PANEL", panel), ("PANELS", panels), ("MANY", 8)):
        monkeypatch.setattr(sys.modules["grng.kernels.gram"], name, value)
    x = rows(3, 4, 2, n)
    found = gram(x)
    torch.testing.assert_close(found, torch.einsum("kbti,kbtj->kij", x, x), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found, found.mT, rtol=1e-14, atol=1e-14)


@SHAPES
@pytest.mark.parametrize("elements", [1, 40, 2**24])
def test_squared_gradients(
    elements: int, k: int, B: int, T: int, n_in: int, n_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many per-sample gradients are formed at a time."""
    monkeypatch.setattr(sys.modules["grng.kernels.gram"], "CHUNK_ELEMENTS", elements)
    x, e = rows(k, B, T, n_in), rows(k, B, T, n_out)
    expected = torch.stack([sum(sample_gradient(x, e, j, b).square() for b in range(B)) for j in range(k)])
    torch.testing.assert_close(squared_gradients(x, e), expected)


def test_squared_gradients_keep_to_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than CHUNK_ELEMENTS elements of per-sample gradients are in memory at once."""
    monkeypatch.setattr(sys.modules["grng.kernels.gram"], "CHUNK_ELEMENTS", 2 * 3 * 4 * 2)
    x, e, largest = rows(2, 7, 5, 4), rows(2, 7, 5, 3), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if "bmm" in str(func):
                largest = max(largest, out.numel())
            return out

    with Watch():
        squared_gradients(x, e)
    assert largest == 2 * 3 * 4 * 2


def test_squared_gradients_leave_their_arguments_alone() -> None:
    for T in (1, 3):
        x, e = rows(2, 4, T, 3), rows(2, 4, T, 2)
        before = x.clone(), e.clone()
        squared_gradients(x, e)
        assert torch.equal(x, before[0])
        assert torch.equal(e, before[1])


EQUATIONS = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("kbto,kbti->koi", (2, 3, 4, 5), (2, 3, 4, 6)),
    ("ab,bc,cd->ad", (5, 2), (2, 7), (7, 3)),
    ("ij->", (3, 4)),
]


@pytest.mark.parametrize(("subscripts", "shapes"), [(e[0], e[1:]) for e in EQUATIONS], ids=[e[0] for e in EQUATIONS])
def test_contract(subscripts: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    operands = [torch.randn(shape) for shape in shapes]
    torch.testing.assert_close(contract(subscripts, *operands), torch.einsum(subscripts, *operands))


def test_a_contraction_is_planned_once_a_shape() -> None:
    _expression.cache_clear()
    for _ in range(3):
        contract("ij,jk->ik", torch.randn(2, 3), torch.randn(3, 4))
    assert (_expression.cache_info().misses, _expression.cache_info().hits) == (1, 2)
    contract("ij,jk->ik", torch.randn(2, 3), torch.randn(3, 5))
    assert _expression.cache_info().misses == 2
    assert _expression.cache_info().currsize == 2


def test_contractions_can_be_differentiated() -> None:
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(3, 4)
    (gradient,) = torch.autograd.grad(contract("ij,jk->ik", a, b).sum(), a)
    torch.testing.assert_close(gradient, b.sum(1).expand(2, 3))
