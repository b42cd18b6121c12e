"""Columns of V kept as rows, against V written out."""

import sys

import pytest
import torch
from grng.kernels import DenseColumns, IndexColumns, by_group
from grng.kernels.columns import products
from torch import Tensor

# k matrices, m columns, R rows a column, n_in, n_out
SHAPES = pytest.mark.parametrize(
    ("k", "m", "R", "n_in", "n_out"),
    [
        *[(1, 1, 1, 1, 1), (1, 5, 1, 4, 3), (3, 4, 1, 2, 5), (1, 3, 4, 5, 2), (2, 7, 2, 3, 6), (2, 2, 9, 4, 1)],
        *[(1, 15, 2, 4, 3), (1, 21, 2, 3, 4), (2, 40, 1, 2, 3), (1, 50, 1, 3, 2)],
    ],
)
CHUNKS = pytest.mark.parametrize("elements", [1, 37, 2**18])


@pytest.fixture
def chunked(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["grng.kernels.columns"], "CACHED", elements)


def written_out(x: Tensor, e: Tensor) -> Tensor:
    """V (m, k, n_out, n_in)."""
    return torch.einsum("kmro,kmri->mkoi", e, x)


def dense(k: int, m: int, R: int, n_in: int, n_out: int) -> tuple[DenseColumns, Tensor]:
    x, e = torch.randn(k, m, R, n_in), torch.randn(k, m, R, n_out)
    return DenseColumns(x, e), written_out(x, e)


def index(m: int, R: int, n_in: int, n_out: int) -> tuple[IndexColumns, Tensor]:
    places, e = torch.randint(n_in, (m, R)), torch.randn(1, m, R, n_out)
    x = torch.nn.functional.one_hot(places, n_in).to(e).unsqueeze(0)
    return IndexColumns(places, e, n_in), written_out(x, e)


def check(columns: DenseColumns | IndexColumns, V: Tensor) -> None:
    """Every quantity, for random diagonal q, gradients G, numbers z."""
    m, like = V.shape[0], torch.zeros(V.shape[1:])
    q, G, z = torch.rand(like.shape), torch.randn(like.shape), torch.randn(m)
    flat, wide = V.flatten(1), (V * q).flatten(1)
    close = torch.testing.assert_close
    close(columns.dense(), V)
    close(columns.gram(), flat @ flat.T)
    close(columns.gram(q), wide @ flat.T)
    lam, squares = torch.rand(len(like), 1, 1), torch.ones_like(like)
    damped = (V * (q / (1 + lam * q))).flatten(1)
    gram, projected = columns.measure(q, lam, G, squares)
    close(gram, damped @ flat.T)
    close(projected, damped @ G.flatten())
    close(squares, 1 + V.square().sum(0))
    close(columns.combine(z), torch.einsum("m,mkoi->koi", z, V))
    close(columns.squares(like), V.square().sum(0))
    close(columns.lengths(q), (wide * flat).sum(1))
    root = torch.linalg.cholesky(torch.eye(m) + flat @ flat.T)
    half = torch.linalg.solve(torch.eye(m) + flat @ flat.T, flat)
    close(columns.whitened_squares(root, like), (half * flat).sum(0).view_as(like))
    assert columns.count == m
    assert columns.zeros(4).dense().shape == (4, *V.shape[1:])
    assert not columns.zeros(4).dense().any()


@SHAPES
@CHUNKS
@pytest.mark.usefixtures("chunked")
def test_dense_columns(k: int, m: int, R: int, n_in: int, n_out: int) -> None:
    columns, V = dense(k, m, R, n_in, n_out)
    check(columns, V)
    G = torch.randn(V.shape[1:])
    torch.testing.assert_close(columns.inner(G), (V * G).flatten(1).sum(1))


@pytest.mark.parametrize(("m", "R", "n_in", "n_out"), [(1, 1, 1, 1), (3, 1, 9, 2), (4, 6, 5, 3), (2, 3, 50, 4)])
@CHUNKS
@pytest.mark.usefixtures("chunked")
def test_index_columns(m: int, R: int, n_in: int, n_out: int) -> None:
    check(*index(m, R, n_in, n_out))


@SHAPES
def test_under_a_kronecker_prior(k: int, m: int, R: int, n_in: int, n_out: int) -> None:
    """V^T (A (x) B) W by products of rows or of columns, whichever is chosen."""
    columns, V = dense(k, m, R, n_in, n_out)
    A, B = torch.randn(k, n_out, n_out), torch.randn(k, n_in, n_in)
    moved = columns.transformed(A, B)
    W = torch.einsum("kpo,mkpj,kji->mkoi", A, V, B)
    torch.testing.assert_close(moved.dense(), W)
    expected = W.flatten(1) @ V.flatten(1).T
    torch.testing.assert_close(moved.cross(columns), expected)
    torch.testing.assert_close(moved.gram(others=columns), expected)
    torch.testing.assert_close(moved.dot(columns), expected.diagonal())


def test_both_ways_of_crossing_are_taken() -> None:
    """Few rows: by their products; many rows on a small matrix: by columns."""
    taken = []

    class Watched(DenseColumns):
        def gram(self, q: Tensor | None = None, others: DenseColumns | None = None) -> Tensor:  # type: ignore[override]
            taken.append(True)
            return super().gram(q, others)

    for R, by_columns in ((1, False), (200, True)):
        taken.clear()
        x, e = torch.randn(1, 3, R, 4), torch.randn(1, 3, R, 4)
        found = Watched(x, e).cross(DenseColumns(x, e))
        assert bool(taken) == by_columns
        V = written_out(x, e).flatten(1)
        torch.testing.assert_close(found, V @ V.T)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_joined(axis: int) -> None:
    """Matrices side by side, further columns, further rows of the same columns."""
    (first, V), (second, W) = dense(2, 3, 2, 4, 5), dense(2, 3, 2, 4, 5)
    expected = {0: torch.cat([V, W], 1), 1: torch.cat([V, W], 0), 2: V + W}[axis]
    torch.testing.assert_close(DenseColumns.joined([first, second], axis).dense(), expected)
    if axis:
        (one, V), (two, W) = index(3, 2, 6, 4), index(3, 2, 6, 4)
        expected = torch.cat([V, W], 0) if axis == 1 else V + W
        torch.testing.assert_close(IndexColumns.joined([one, two], axis).dense(), expected)


def test_columns_of_unlike_length_are_joined() -> None:
    (first, V), (second, W) = dense(2, 3, 1, 4, 5), dense(2, 2, 6, 4, 5)
    torch.testing.assert_close(DenseColumns.joined([first, second], 1).dense(), torch.cat([V, W]))
    (one, V), (two, W) = index(3, 5, 6, 4), index(1, 2, 6, 4)
    torch.testing.assert_close(IndexColumns.joined([one, two], 1).dense(), torch.cat([V, W]))


@pytest.mark.parametrize("B", [1, 3, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("offset", [0, 1, 7, 100])
def test_groups(B: int, groups: int, offset: int) -> None:
    """Sample b belongs to group (offset + b) mod groups, with all of its positions."""
    x, e = torch.randn(2, B, 3, 4), torch.randn(2, B, 3, 5)
    columns = DenseColumns(by_group(x, groups, offset), by_group(e, groups, offset))
    expected = torch.zeros(groups, 2, 5, 4)
    for b, V in enumerate(DenseColumns(x, e).dense()):
        expected[(offset + b) % groups] += V
    torch.testing.assert_close(columns.dense(), expected)
    assert columns.e.shape[1] == groups


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("m", [1, 9, 12, 13, 17, 47, 48])
@pytest.mark.parametrize("n", [10, 4095, 4096, 4101])
def test_products(k: int, m: int, n: int) -> None:
    """By whichever way is fastest, also of a part of a larger buffer."""
    for V in (torch.randn(k, m, n), torch.randn(k, m + 2, n)[:, 1:-1]):
        torch.testing.assert_close(products(V), torch.einsum("kan,kbn->ab", V, V))


@pytest.mark.parametrize("R", [1, 2, 3])
@CHUNKS
@pytest.mark.usefixtures("chunked")
def test_rows_that_are_apart(R: int) -> None:
    """Their own squares are what the squares of columns come to in the mean over the rows' signs."""
    x, e = torch.randn(2, 2, R, 4), torch.randn(2, 2, R, 3)
    like = torch.zeros(2, 3, 4)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * R).view(-1, R, 1)
    mean = torch.stack([DenseColumns(x, sign * e).squares(like) for sign in signs]).mean(0)
    apart = DenseColumns(x, e, apart=True)
    torch.testing.assert_close(apart.squares(like), mean)
    squares = torch.zeros_like(like)
    q, G = torch.rand(like.shape), torch.randn(like.shape)
    found = apart.measure(q, torch.ones(2, 1, 1), G, squares)
    torch.testing.assert_close(squares, mean)
    torch.testing.assert_close(found, DenseColumns(x, e).measure(q, torch.ones(2, 1, 1), G, squares))
    for axis, other in ((0, apart), (1, apart.zeros(2)), (2, apart)):
        assert DenseColumns.joined([apart, other], axis).apart
        assert not DenseColumns.joined([apart, DenseColumns(x, e)], axis).apart


def test_no_more_than_a_chunk_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """V has 4 * 64 * 32 elements; of none of the passes over it more than a chunk is in memory."""
    monkeypatch.setattr(sys.modules["grng.kernels.columns"], "CACHED", 4 * 32 * 8)
    columns, V = dense(1, 4, 2, 32, 64)
    q, G = torch.rand(V.shape[1:]), torch.randn(V.shape[1:])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        columns.measure(q, torch.ones(1, 1, 1), G, torch.zeros_like(G))
        columns.squares(G)
        columns.whitened_squares(torch.eye(4), G)
    assert largest == q.numel()  # of the size of the parameters, not m times that
