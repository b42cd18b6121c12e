"""The Kalman step and the propagation of its covariance against dense d x d inverses."""

import pytest
import torch
from grng.kernels import DenseColumns, absorb_, gain, identity_plus, propagate_fd, propagate_kron_, propagate_vd
from grng.kernels.woodbury import semidefinite_root
from torch import Tensor

# m columns, d
CASES = pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 4), (5, 3), (3, 6), (16, 9), (8, 50)])
SCALES = pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
# k matrices, m columns, R rows a column, n_in, n_out; more rows than a factor has and fewer
KRON = pytest.mark.parametrize(
    ("k", "m", "R", "n_in", "n_out"),
    [(1, 1, 1, 1, 1), (1, 3, 1, 5, 4), (2, 7, 1, 6, 3), (2, 3, 2, 7, 8), (1, 9, 3, 4, 5), (3, 2, 2, 3, 9)],
)


def posterior(q: Tensor, V: Tensor) -> Tensor:
    """(q^-1 + V^T V)^-1, dense; V as rows."""
    return torch.linalg.inv(torch.linalg.inv(q) + V.T @ V)


def spd(k: int, n: int) -> Tensor:
    A = torch.randn(k, n, n)
    return A @ A.mT / n + 0.1 * torch.eye(n)


def propagate_kron(P_out: Tensor, P_in: Tensor, V: DenseColumns, valid: bool = True) -> tuple[Tensor, Tensor]:
    """Of copies."""
    out, into = P_out.clone(), P_in.clone()
    propagate_kron_(out, into, V, V.transformed(P_out, P_in), torch.tensor(valid))
    return out, into


def fd(p: Tensor, V: Tensor) -> Tensor:
    root = torch.linalg.cholesky(identity_plus((V * p) @ V.T))
    half = torch.linalg.solve_triangular(root, V, upper=False)
    return propagate_fd(p, half.square().sum(0), V.square().sum(0))


@CASES
@SCALES
@pytest.mark.parametrize("prior", ["diagonal", "dense"])
def test_gain(prior: str, scale: float, m: int, d: int) -> None:
    """q (V z - g) == -(q^-1 + V V^T)^-1 g: q enters through its products only."""
    V, g = scale * torch.randn(m, d), torch.randn(d)
    q = (0.1 + torch.rand(d)).diag() if prior == "diagonal" else spd(1, d)[0]
    z, root = gain(V @ q @ V.T, V @ q @ g)
    torch.testing.assert_close(q @ (z @ V - g), -posterior(q, V) @ g, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(root @ root.T, torch.eye(m) + V @ q @ V.T)
    assert torch.equal(root, root.tril())


def test_without_columns_it_is_the_prior() -> None:
    z, root = gain(torch.zeros(2, 2), torch.zeros(2))
    assert not z.any()
    torch.testing.assert_close(root, torch.eye(2))


def test_equal_columns_are_no_obstacle() -> None:
    """I + V^T q V is positive definite however the columns depend on each other."""
    V, q, g = torch.randn(1, 4).repeat(6, 1), torch.rand(4), torch.randn(4)
    z, _ = gain((V * q) @ V.T, V @ (q * g))
    torch.testing.assert_close(q * (z @ V - g), -posterior(q.diag(), V) @ g)


def kl(covariance: Tensor, precision: Tensor) -> Tensor:
    """KL(N(0, covariance) || N(0, precision^-1)) up to a constant."""
    return 0.5 * ((precision * covariance).sum() - torch.linalg.slogdet(covariance)[1])


@CASES
@SCALES
def test_propagate_vd(scale: float, m: int, d: int) -> None:
    """1 / (1/p + rowsum V^2): the diagonal of the posterior precision, and the minimum of the KL divergence."""
    V, p = scale * torch.randn(m, d), 0.1 + torch.rand(d)
    precision = (1 / p).diag() + V.T @ V
    found = propagate_vd(p, V.square().sum(0))
    torch.testing.assert_close(found, 1 / precision.diagonal(), rtol=1e-10, atol=0)
    for change in (0.99, 1.01):
        other = found * (1 + (change - 1) * torch.rand(d))
        assert kl(found.diag(), precision) < kl(other.diag(), precision)


@CASES
@SCALES
def test_propagate_fd(scale: float, m: int, d: int) -> None:
    """The diagonal of the posterior covariance; never below `vd`, never above the prior."""
    V, p = scale * torch.randn(m, d), 0.1 + torch.rand(d)
    found = fd(p, V)
    torch.testing.assert_close(found, posterior(p.diag(), V).diagonal(), rtol=1e-6, atol=1e-9)
    assert (found >= propagate_vd(p, V.square().sum(0)) * (1 - 1e-6)).all()
    assert (found <= p).all()


@pytest.mark.parametrize("m", [1, 4])
def test_one_parameter(m: int) -> None:
    """Where there is one coordinate, vd, fd, kron and the dense filter are the same."""
    p, V = torch.tensor([0.7]), torch.randn(m, 1)
    expected = 1 / (1 / p + V.square().sum())
    torch.testing.assert_close(propagate_vd(p, V.square().sum(0)), expected)
    torch.testing.assert_close(fd(p, V), expected)
    columns = DenseColumns(V.view(1, m, 1, 1), torch.ones(1, m, 1, 1))
    out, into = propagate_kron(torch.ones(1, 1, 1), p.view(1, 1, 1), columns)
    torch.testing.assert_close((out * into).flatten(), expected)


def test_float32_variances_stay_positive() -> None:
    """Strong columns take nearly all of the variance away: cancellation must not make it negative."""
    p, V = torch.full((6,), 0.5, dtype=torch.float32), 1e4 * torch.randn(8, 6, dtype=torch.float32)
    assert (propagate_vd(p, V.square().sum(0)) > 0).all()
    assert (fd(p, V) > 0).all()


@KRON
@SCALES
def test_absorb(scale: float, k: int, m: int, R: int, n_in: int, n_out: int) -> None:
    """(P^-1 + w sum_c V_c^T Q V_c)^-1, and its trace against P^-1."""
    x, e, weight = torch.randn(k, m, R, n_in), scale * torch.randn(k, m, R, n_out), torch.rand(k, 1, 1) + 0.1
    P, Q = spd(k, n_in), spd(k, n_out)
    V = torch.einsum("kmro,kmri->kmoi", e, x)
    information = weight * torch.einsum("kmoi,kop,kmpj->kij", V, Q, V)
    expected = torch.linalg.inv(torch.linalg.inv(P) + information)
    found = P.clone()
    inner = torch.einsum("kmro,kop,kmsp->kmrs", e, Q, e)
    trace, after = absorb_(found, x, torch.einsum("kmri,kij->kmrj", x, P), inner, weight, torch.tensor(True))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    product = torch.einsum("kij,kji->k", torch.linalg.inv(P), expected)
    torch.testing.assert_close(trace.flatten(), product, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(after, torch.einsum("kmri,kij,kmsj->kmrs", x, expected, x), rtol=1e-6, atol=1e-8)


@KRON
def test_propagate_kron(k: int, m: int, R: int, n_in: int, n_out: int) -> None:
    """Each factor is the minimum of the KL divergence with the other held: P_in first, then P_out with the new P_in."""
    columns = DenseColumns(torch.randn(k, m, R, n_in), torch.randn(k, m, R, n_out))
    P_out, P_in = spd(k, n_out), spd(k, n_in)
    out, into = propagate_kron(P_out, P_in, columns)
    torch.testing.assert_close(out.diagonal(dim1=1, dim2=2).mean(1), torch.ones(k))
    rows = columns.dense().flatten(2)  # (m, k, d)
    for j in range(k):
        precision = torch.linalg.inv(torch.kron(P_out[j], P_in[j])) + rows[:, j].T @ rows[:, j]

        def parted(covariance: Tensor, precision: Tensor = precision) -> Tensor:
            return kl(covariance, precision)

        best = parted(torch.kron(out[j], into[j]))
        assert best <= parted(torch.kron(P_out[j], P_in[j])) + 1e-12
        for _ in range(5):  # P_out is at its minimum given P_in
            other = out[j] + 1e-2 * spd(1, n_out)[0]
            assert best < parted(torch.kron(other, into[j]))
        # P_in is the minimum given the P_out that was held, the old one
        information = torch.einsum("moi,op,mpj->ij", columns.dense()[:, j], P_out[j], columns.dense()[:, j])
        first = torch.linalg.inv(torch.linalg.inv(P_in[j]) + information / n_out)
        torch.testing.assert_close(into[j] / into[j].trace(), first / first.trace(), rtol=1e-7, atol=1e-9)


@KRON
def test_an_invalid_batch_changes_nothing(k: int, m: int, R: int, n_in: int, n_out: int) -> None:
    columns = DenseColumns(torch.full((k, m, R, n_in), torch.nan), torch.randn(k, m, R, n_out))
    P_out, P_in = spd(k, n_out), spd(k, n_in)
    out, into = propagate_kron(P_out, P_in, columns, valid=False)
    assert torch.equal(out, P_out)
    assert torch.equal(into, P_in)


@pytest.mark.parametrize(("n_in", "n_out", "m"), [(4, 1, 3), (4, 1, 9), (5, 3, 2), (3, 4, 6)])
def test_kron_is_exact_where_the_posterior_is_a_product(n_in: int, n_out: int, m: int) -> None:
    """One output, or outputs that see the same inputs with equal information: (P^-1 + V V^T)^-1 itself."""
    x, P_in = torch.randn(m, n_in), spd(1, n_in)
    P_out = torch.eye(n_out).unsqueeze(0)
    e = torch.eye(n_out).repeat(m, 1)
    columns = DenseColumns(x.repeat_interleave(n_out, 0).view(1, m * n_out, 1, n_in), e.view(1, -1, 1, n_out))
    out, into = propagate_kron(P_out, P_in, columns)
    expected = posterior(torch.kron(P_out[0], P_in[0]), columns.dense().flatten(1))
    torch.testing.assert_close(torch.kron(out[0], into[0]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("n", [4, 60])
def test_kron_stays_positive_definite(n: int, R: int) -> None:
    """Thousands of updates in float32 under forgetting, with inputs of which most directions are never seen."""
    P_out, P_in = torch.eye(n, dtype=torch.float32)[None], 1e-2 * torch.eye(n, dtype=torch.float32)[None]
    scales = torch.logspace(2, -6, n, dtype=torch.float32)
    for _ in range(1500):
        x = torch.randn(1, 8, R, n, dtype=torch.float32) * scales
        e = torch.randn(1, 8, R, n, dtype=torch.float32)
        grown = P_in / 0.97
        mean = grown.diagonal(dim1=1, dim2=2).mean()
        P_out, P_in = propagate_kron(P_out, grown * (0.3 / mean).clamp(max=1), DenseColumns(x, e))
    for P in (P_out, P_in):
        assert torch.linalg.eigvalsh(P[0].double()).min() > 0
        assert torch.linalg.cholesky_ex(P)[1].item() == 0


@pytest.mark.parametrize("m", [8, 64])
def test_kron_stays_positive_definite_on_smooth_features(m: int) -> None:
    """Features of one input are so alike that most directions are never seen: the worst conditioned there is."""
    P_out, P_in = torch.ones(1, 1, 1, dtype=torch.float32), torch.eye(51, dtype=torch.float32)[None]
    centers = torch.linspace(-1, 1, 50, dtype=torch.float32)
    for _ in range(600):
        x = torch.rand(m, 1, dtype=torch.float32) * 2 - 1
        rows = torch.cat([torch.tanh(3 * (x - centers)), torch.ones(m, 1, dtype=torch.float32)], 1)
        columns = DenseColumns(rows.view(1, m, 1, 51), torch.full((1, m, 1, 1), 0.3, dtype=torch.float32))
        P_out, P_in = propagate_kron(
            P_out, P_in / 0.97 * (30 / P_in.diagonal(dim1=1, dim2=2).mean()).clamp(max=1), columns
        )
        assert torch.linalg.cholesky_ex(P_in)[1].item() == 0


def test_an_indefinite_covariance_is_repaired() -> None:
    """Rounding may have spoilt it: the batch is passed over, and after some more it is positive definite again."""
    P_in = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1e-4]))[None] + 0.5 - 0.5 * torch.eye(4)
    P_in[0, 3, 3] = 0.2
    assert torch.linalg.eigvalsh(P_in[0]).min() < 0
    P_out = torch.eye(2)[None]
    for _ in range(2000):
        columns = DenseColumns(torch.randn(1, 9, 1, 4), torch.randn(1, 9, 1, 2))
        P_out, P_in = propagate_kron(P_out, P_in / 0.97, columns)
    assert bool(P_in.isfinite().all())
    assert torch.linalg.eigvalsh(P_in[0]).min() > 0


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_semidefinite_root(rank: int) -> None:
    A = torch.randn(2, 5, rank)
    B = semidefinite_root(A @ A.mT)
    torch.testing.assert_close(B @ B.mT, A @ A.mT)
