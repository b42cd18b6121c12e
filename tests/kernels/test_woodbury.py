"""The Kalman step and the propagation of its covariance against dense d x d inverses."""

import pytest
import torch
from grng.kernels import propagate_fd, propagate_vd, woodbury_direction, woodbury_matrix
from torch import Tensor

# m columns, sizes of the blocks
CASES = pytest.mark.parametrize(
    ("m", "sizes"), [(1, (1,)), (1, (4,)), (5, (3,)), (3, (4, 2)), (16, (3, 1, 5)), (8, (20, 30))]
)
SCALES = pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])


def blocks(m: int, sizes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(m, n) for n in sizes]


def posterior(q: Tensor, V: list[Tensor]) -> Tensor:
    """(q^-1 + V V^T)^-1, dense; V as rows over all blocks."""
    rows = torch.cat(V, 1)
    return torch.linalg.inv(torch.linalg.inv(q) + rows.T @ rows)


@CASES
def test_woodbury_matrix(m: int, sizes: tuple[int, ...]) -> None:
    V, q = blocks(m, sizes), [torch.rand(n) for n in sizes]
    rows = torch.cat(V, 1)
    found = woodbury_matrix(V, [v * p for v, p in zip(V, q, strict=True)])
    torch.testing.assert_close(found, torch.eye(m) + rows @ torch.cat(q).diag() @ rows.T)


@CASES
@SCALES
def test_direction_under_a_diagonal_prior(scale: float, m: int, sizes: tuple[int, ...]) -> None:
    V, q, g = blocks(m, sizes, scale), [0.1 + torch.rand(n) for n in sizes], [torch.randn(n) for n in sizes]
    D, root = woodbury_direction(
        [a * b for a, b in zip(q, g, strict=True)], V, [v * p for v, p in zip(V, q, strict=True)]
    )
    expected = -posterior(torch.cat(q).diag(), V) @ torch.cat(g)
    assert [len(d) for d in D] == list(sizes)
    torch.testing.assert_close(torch.cat(D), expected, rtol=1e-8, atol=1e-10)
    rows = torch.cat(V, 1)
    torch.testing.assert_close(root @ root.T, torch.eye(m) + rows @ torch.cat(q).diag() @ rows.T)
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize("m", [1, 3, 12])
def test_direction_under_a_dense_and_a_kronecker_prior(m: int) -> None:
    """q enters through q g and q V only."""
    A, B = torch.randn(3, 5), torch.randn(4, 6)
    P_out, P_in = A @ A.T, B @ B.T
    q = torch.kron(P_out, P_in)
    V, G = torch.randn(m, 3, 4), torch.randn(3, 4)
    expected = -posterior(q, [V.flatten(1)]) @ G.flatten()
    dense, _ = woodbury_direction([q @ G.flatten()], [V.flatten(1)], [V.flatten(1) @ q])
    kron, _ = woodbury_direction([(P_out @ G @ P_in).flatten()], [V.flatten(1)], [(P_out @ V @ P_in).flatten(1)])
    torch.testing.assert_close(dense[0], expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(kron[0], expected, rtol=1e-8, atol=1e-9)


def test_without_columns_it_is_the_prior() -> None:
    q, g = torch.rand(4), torch.randn(4)
    D, root = woodbury_direction([q * g], [torch.zeros(2, 4)], [torch.zeros(2, 4)])
    torch.testing.assert_close(D[0], -q * g)
    torch.testing.assert_close(root, torch.eye(2))


def test_equal_columns_are_no_obstacle() -> None:
    """I + V^T q V is positive definite however the columns depend on each other."""
    V, q, g = torch.randn(1, 4).repeat(6, 1), torch.rand(4), torch.randn(4)
    D, _ = woodbury_direction([q * g], [V], [V * q])
    torch.testing.assert_close(D[0], -posterior(q.diag(), [V]) @ g)


def kl(p: Tensor, precision: Tensor) -> Tensor:
    """KL(N(0, diag p) || N(0, precision^-1)) up to a constant: what `vd` minimises over p."""
    return 0.5 * ((precision.diagonal() * p).sum() - p.log().sum())


@CASES
@SCALES
def test_propagate_vd(scale: float, m: int, sizes: tuple[int, ...]) -> None:
    """1 / (1/p + rowsum V^2): the diagonal of the posterior precision, and the minimum of the KL divergence."""
    V, p = blocks(m, sizes, scale), [0.1 + torch.rand(n) for n in sizes]
    rows, prior = torch.cat(V, 1), torch.cat(p)
    precision = (1 / prior).diag() + rows.T @ rows
    found = torch.cat([propagate_vd(a, v) for a, v in zip(p, V, strict=True)])
    torch.testing.assert_close(found, 1 / precision.diagonal(), rtol=1e-10, atol=0)
    for change in (0.99, 1.01):
        assert kl(found, precision) < kl(found * (1 + (change - 1) * torch.rand(len(found))), precision)


@CASES
@SCALES
def test_propagate_fd(scale: float, m: int, sizes: tuple[int, ...]) -> None:
    """The diagonal of the posterior covariance, all blocks together; never below `vd`, never above the prior."""
    V, p = blocks(m, sizes, scale), [0.1 + torch.rand(n) for n in sizes]
    root = torch.linalg.cholesky(woodbury_matrix(V, [v * a for v, a in zip(V, p, strict=True)]))
    found = torch.cat([propagate_fd(a, v, root) for a, v in zip(p, V, strict=True)])
    expected = posterior(torch.cat(p).diag(), V).diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    least = torch.cat([propagate_vd(a, v) for a, v in zip(p, V, strict=True)])
    assert (found >= least * (1 - 1e-6)).all()
    assert (found <= torch.cat(p)).all()


@pytest.mark.parametrize("m", [1, 4])
def test_one_parameter(m: int) -> None:
    """Where there is one coordinate, vd, fd and the dense filter are the same."""
    p, V = torch.tensor([0.7]), torch.randn(m, 1)
    expected = 1 / (1 / p + V.square().sum())
    torch.testing.assert_close(propagate_vd(p, V), expected)
    torch.testing.assert_close(propagate_fd(p, V, torch.linalg.cholesky(woodbury_matrix([V], [V * p]))), expected)


def test_float32_variances_stay_positive() -> None:
    """Strong columns take nearly all of the variance away: cancellation must not make it negative."""
    p, V = torch.full((6,), 0.5, dtype=torch.float32), 1e4 * torch.randn(8, 6, dtype=torch.float32)
    root = torch.linalg.cholesky(woodbury_matrix([V], [V * p]))
    assert (propagate_vd(p, V) > 0).all()
    assert (propagate_fd(p, V, root) > 0).all()
