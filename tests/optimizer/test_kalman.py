"""The Kalman filter: against the Bayesian posterior, recursive least squares and dense filters with any V."""

import sys
from typing import Any

import pytest
import torch
from grng.kernels import DenseColumns
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.preconditioners import Kalman
from grng.preconditioners.covariance import Diagonal

from .cases import Positions, mlp, relative, stream, train, vector

NOISE = 0.3


def linear(n_in: int, C: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n_in, C, bias=bias, dtype=torch.float64)


def data(n: int, n_in: int, C: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, n_in, generator=generator, dtype=torch.float64)
    truth = torch.randn(C, n_in, generator=generator, dtype=torch.float64)
    return x, x @ truth.T + 0.5 * torch.randn(n, C, generator=generator, dtype=torch.float64)


def rows(x: Tensor, bias: bool) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias else x


def bayes(X: Tensor, y: Tensor, w0: Tensor, p0: float, noise: float) -> tuple[Tensor, Tensor]:
    """Closed form: mean (C, n) and covariance (n, n), the same for every output, of a Gaussian prior and noise."""
    covariance = torch.linalg.inv(torch.eye(X.shape[1]).to(X) / p0 + X.T @ X / noise)
    return (covariance @ (w0.T / p0 + X.T @ y / noise)).T, covariance


def recursive_least_squares(
    X: Tensor, y: Tensor, w0: Tensor, p0: float, noise: float, gamma: float, size: int
) -> tuple[Tensor, Tensor]:
    """One sample at a time, forgetting at the start of every batch."""
    w, P = w0.clone(), p0 * torch.eye(X.shape[1]).to(X)
    for start in range(0, len(X), size):
        P = P / (1 - gamma)
        for x, target in zip(X[start : start + size], y[start : start + size], strict=True):
            k = P @ x / (noise + x @ P @ x)
            w = w + torch.outer(target - w @ x, k)
            P = P - torch.outer(k, x @ P)
    return w, P


def matrix(model: nn.Linear) -> Tensor:
    parts = [model.weight] if model.bias is None else [model.weight, model.bias[:, None]]
    return torch.cat(parts, 1).detach().clone()


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (3, 1), (4, 1), (12, 1), (4, 2), (12, 3)])
@pytest.mark.parametrize(("n_in", "C", "bias"), [(3, 1, True), (5, 1, False), (3, 2, True), (2, 4, False)])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_linear_gaussian(gamma: float, n_in: int, C: int, bias: bool, size: int, parts: int) -> None:
    """Mean and covariance of a linear-Gaussian model: recursive least squares, and for gamma = 0 the Bayesian posterior
    in closed form, whatever the batches and micro-batches. The Kronecker covariance is exact there."""
    model, (x, y), p0 = linear(n_in, C, bias), data(12, n_in, C), 0.7
    X, w0 = rows(x, bias), matrix(model)
    filter_ = Kalman(p0=p0, gamma=gamma, covariance="kron", p_max=1e6)
    # A squared error's gradient does not tell that there are more parts.
    curvature = Curvature(fisher="exact", likelihood="gaussian", noise=NOISE, loss_scale=1 / parts)
    with GRNG(model, "kalman", rho=0.0, preconditioner=filter_, curvature=curvature) as optimizer:
        for start in range(0, 12, size):
            optimizer.zero_grad()
            batch = slice(start, start + size)
            for inputs, targets in zip(x[batch].chunk(parts), y[batch].chunk(parts), strict=True):
                (mse_loss(model(inputs), targets) / parts).backward()
            optimizer.step()
        w, P = recursive_least_squares(X, y, w0, p0, NOISE, gamma, size)
        assert relative(matrix(model), w) < 1e-10
        state = optimizer.state[model.weight]
        found = torch.kron(state["P_out"][0], state["P_in"][0])
        assert relative(found, torch.kron(torch.eye(C).double(), P)) < 1e-10
        variance = optimizer.posterior.variance()["weight"]
        assert relative(variance, P.diagonal()[:n_in].expand(C, -1)) < 1e-10
    if gamma == 0:
        mean, covariance = bayes(X, y, w0, p0, NOISE)
        assert relative(w, mean) < 1e-10
        assert relative(P, covariance) < 1e-10


@pytest.mark.parametrize("projection", ["vd", "fd"])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_diagonal_is_exact_on_orthogonal_inputs(size: int, projection: Any) -> None:
    """Where the posterior is diagonal, so that nothing is projected away: one-hot inputs."""
    model, p0 = linear(4, 2, bias=False), 0.7
    w0 = matrix(model)
    x, y = torch.eye(4).double().repeat(2, 1)[:8], data(8, 4, 2)[1]
    filter_ = Kalman(p0=p0, gamma=0.0, projection=projection)
    curvature = Curvature(fisher="exact", likelihood="gaussian", noise=NOISE)
    with GRNG(model, "kalman", rho=0.0, preconditioner=filter_, curvature=curvature) as optimizer:
        for start in range(0, 8, size):
            train(optimizer, model, [(x[start : start + size], y[start : start + size])], mse_loss)
        mean, covariance = bayes(x, y, w0, p0, NOISE)
        assert relative(matrix(model), mean) < 1e-10
        assert relative(optimizer.posterior.variance()["weight"], covariance.diagonal().expand(2, -1)) < 1e-10


class Mixed(nn.Module):
    """Linear layers (one used twice), a convolution, an embedding and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(5, 4), nn.Conv1d(1, 2, 3)
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding((x[:, :3] * 2).long().clamp(0, 4)).sum(1) + self.conv(x.unsqueeze(1)).flatten(1)
        return self.head(self.shared(torch.tanh(self.shared(h))) * self.gain)


def mixed_model() -> Mixed:
    torch.manual_seed(2)
    return Mixed().double()


def root_of(f: Tensor, likelihood: str) -> Tensor:
    """R (n, C, C) with R R^T = S."""
    if likelihood == "gaussian":
        return NOISE**-0.5 * torch.eye(f.shape[1]).double().expand(len(f), -1, -1)
    p = f.softmax(1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)


def dense_columns(model: nn.Module, x: Tensor, likelihood: str) -> dict[str, Tensor]:
    """V^T by parameter, (n C, ...), from Jacobians by torch.func."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda v: functional_call(model, v, (x,)))(values)
    root = root_of(model(x).detach(), likelihood)
    return {n: torch.einsum("bc...,bck->bk...", J, root).flatten(0, 1) for n, J in jacobians.items()}


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("penalty", ["ring", "fading"])
def test_exact_columns(penalty: Any, rho: float, likelihood: Any) -> None:
    """Three steps of the diagonal filter with V = J^T S^{1/2} of layers of every kind against d x d matrices; the bare
    parameter is trained by somebody else here, since its variance is an estimate."""
    model, gamma, p0 = mixed_model(), 0.05, 0.02
    names = [name for name, _ in model.named_parameters() if name != "gain"]
    model.gain.requires_grad_(False)
    filter_ = Kalman(p0=p0, gamma=gamma, penalty=penalty, p_max=1e9)
    curvature = Curvature(fisher="exact", likelihood=likelihood, noise=NOISE)
    p = torch.full((sum(q.numel() for q in model.parameters() if q.requires_grad),), p0, dtype=torch.float64)
    total = 0.0
    generator = torch.Generator().manual_seed(3)
    with GRNG(model, "kalman", rho=rho, preconditioner=filter_, curvature=curvature) as optimizer:
        for _ in range(3):
            x = torch.rand(5, 4, generator=generator).double() * 2
            y = torch.randint(3, (5,), generator=generator)
            target = y if likelihood == "categorical" else torch.randn(5, 3, generator=generator).double()
            loss = cross_entropy if likelihood == "categorical" else mse_loss
            V = torch.cat([dense_columns(model, x, likelihood)[n].flatten(1) for n in names], 1)
            value = loss(model(x), target)
            g = torch.cat([t.flatten() for t in torch.autograd.grad(value, [model.get_parameter(n) for n in names])])
            N = 5.0 if likelihood == "categorical" else 15 * 0.5 / NOISE  # of the negative log likelihood's sum
            before = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
            train(optimizer, model, [(x, target)], loss)
            predictions = 5.0 if likelihood == "categorical" else 15.0
            added = predictions * (N / predictions) ** 2 * rho * g.square().sum()
            total = (1 - gamma) * total + added
            lam = added / gamma if penalty == "ring" else total
            prior = p / (1 - gamma)
            D = -torch.linalg.solve(torch.diag(1 / prior + lam) + V.T @ V, N * g)
            moved = torch.cat([model.get_parameter(n).detach().flatten() for n in names]) - before
            assert relative(moved, D) < 1e-9
            p = 1 / (1 / prior + V.square().sum(0))
        variances = optimizer.posterior.variance()
        assert relative(torch.cat([variances[n].flatten() for n in names]), p) < 1e-9


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("B", [1, 6])
def test_exact_columns_are_those_of_backpack(B: int) -> None:
    """V V^T of every parameter is that of BackPACK's SqrtGGNExact."""
    backpack, extensions = pytest.importorskip("backpack"), pytest.importorskip("backpack.extensions")
    model, loss = mlp(4, 5, 3), nn.CrossEntropyLoss(reduction="sum")
    x, y = stream(1, B)[0]
    backpack.extend(model), backpack.extend(loss)
    with backpack.backpack(extensions.SqrtGGNExact()):
        loss(model(x), y).backward()
    theirs = {name: p.sqrt_ggn_exact.flatten(0, 1).flatten(1) for name, p in model.named_parameters()}  # type: ignore[union-attr]
    ours = {name: v.flatten(1) for name, v in dense_columns(mlp(4, 5, 3), x, "categorical").items()}
    twin, filter_ = mlp(4, 5, 3), Kalman(p0=1e-3)
    found: dict[str, list[Tensor]] = {}
    gather = filter_._gather

    def note() -> Any:
        parts = gather()
        for group, members in zip(optimizer._groups, parts, strict=True):
            for V in members[0][1].dense():
                for layer in group.layers:
                    for p, view in layer.views(V[layer.slots]):
                        found.setdefault(optimizer._names[p], []).append(view.flatten())
        return parts

    filter_._gather = note  # type: ignore[method-assign]
    with GRNG(twin, "kalman", preconditioner=filter_, curvature=Curvature(fisher="exact")) as optimizer:
        train(optimizer, twin, [(x, y)])
    assert theirs.keys() == found.keys()
    for name, V in theirs.items():
        mine = torch.stack(found[name])
        assert len(mine) == 3 * B
        assert relative(mine.T @ mine, V.T @ V) < 1e-10
        assert relative(ours[name].T @ ours[name], V.T @ V) < 1e-10


@pytest.mark.parametrize("gain", ["trace", "exact"])
@pytest.mark.parametrize("rho", [0.0, 2.0])
def test_kronecker_steps(rho: float, gain: Any) -> None:
    """The step under P_out (x) P_in against d x d matrices: q = (P^-1 + lam I)^-1, or P / (1 + lam tr(P)/d)."""
    model, gamma, p0 = mlp(4, 5, 3), 0.1, 0.05
    filter_ = Kalman(p0=p0, gamma=gamma, covariance="kron", gain=gain, p_max=1e9)
    layers = [model[0], model[2]]
    P = [p0 * torch.eye(m.weight.numel() + len(m.bias)).double() for m in layers]
    with GRNG(model, "kalman", rho=rho, preconditioner=filter_, curvature=Curvature(fisher="exact")) as optimizer:
        for x, y in stream(4, 6):
            V = dense_columns(model, x, "categorical")
            value = cross_entropy(model(x), y)
            g = dict(zip(V, torch.autograd.grad(value, list(model.parameters())), strict=True))
            blocks = [torch.cat([V[f"{i}.weight"], V[f"{i}.bias"].unsqueeze(2)], 2).flatten(1) for i in (0, 2)]
            gs = torch.cat([torch.cat([g[f"{i}.weight"], g[f"{i}.bias"][:, None]], 1).flatten() for i in (0, 2)])
            lam = 6 * rho * gs.square().sum() / gamma
            prior = [Q / (1 - gamma) for Q in P]
            eye = [torch.eye(len(Q)).double() for Q in prior]
            if gain == "exact":
                q = [torch.linalg.inv(torch.linalg.inv(Q) + lam * one) for Q, one in zip(prior, eye, strict=True)]
            else:
                q = [Q / (1 + lam * Q.diagonal().mean()) for Q in prior]
            rows_ = torch.cat(blocks, 1)
            D = -torch.linalg.solve(torch.linalg.inv(torch.block_diag(*q)) + rows_.T @ rows_, 6 * gs)
            before = torch.cat([matrix(m).flatten() for m in layers])
            train(optimizer, model, [(x, y)])
            assert relative(torch.cat([matrix(m).flatten() for m in layers]) - before, D) < 1e-8
            states = [optimizer.state[m.weight] for m in layers]
            P = [torch.kron(s["P_out"][0], s["P_in"][0]) for s in states]
            for Q, posterior_, block in zip(prior, P, blocks, strict=True):
                exact = torch.linalg.inv(torch.linalg.inv(Q) + block.T @ block)
                assert torch.linalg.eigvalsh(posterior_).min() > 0
                assert 0.5 < float(posterior_.trace() / exact.trace()) < 2


def test_bare_parameters_have_a_diagonal() -> None:
    """p = 1/(1/p + s^2), D = -g/(1/q + s^2), s the gradient with drawn labels summed over all micro-batches."""
    torch.manual_seed(0)
    model, p0, gamma = mixed_model(), 0.05, 0.1
    filter_ = Kalman(p0=p0, gamma=gamma)
    x, y = torch.rand(6, 4).double(), torch.randint(3, (6,))
    with GRNG(model, "kalman", rho=0.4, preconditioner=filter_, curvature=Curvature(seed=5)) as optimizer:
        rows_ = {row.parameter: row for row in optimizer.coverage()}
        assert rows_["gain"].treatment == "kalman"
        assert "diagonal" in rows_["gain"].reason
        before = model.gain.detach().clone()
        sums: list[Tensor] = []
        observe = optimizer._preconditioner.observe

        def note(layer: Any, statistics: Any) -> None:
            if layer.plain:
                sums.append(statistics.gradient().flatten())
            observe(layer, statistics)

        optimizer._preconditioner.observe = note  # type: ignore[method-assign]
        for part in (slice(0, 2), slice(2, 6)):
            (cross_entropy(model(x[part]), y[part]) * len(y[part]) / 6).backward()
        g = {p: p.grad.clone() for p in model.parameters()}  # type: ignore[union-attr]
        lam = 6 * 0.4 * torch.stack([v.square().sum() for v in g.values()]).sum() / gamma
        optimizer.step()
        assert len(sums) == 2
        s = sums[0] + sums[1]
        prior = min(p0 / (1 - gamma), 30 * p0)
        q = prior / (1 + lam * prior)
        expected = -6 * g[model.gain] / (1 / q + s.square())
        assert relative(model.gain.detach() - before, expected) < 1e-9
        assert relative(optimizer.posterior.variance()["gain"], 1 / (1 / prior + s.square())) < 1e-10
        assert {row.verified for row in optimizer.coverage()} == {"yes"}


def test_squares_of_sums_are_unbiased() -> None:
    """E s^2 over drawn labels is the diagonal of the summed Fisher of a bare parameter."""
    model = mixed_model()
    x = torch.rand(4, 4).double()
    exact = dense_columns(model, x, "categorical")["gain"].square().sum(0)
    total, n = torch.zeros(4).double(), 3000
    filter_ = Kalman(p0=1e-9, gamma=0.0)
    with GRNG(model, "kalman", rho=0.0, lr=0.0, preconditioner=filter_) as optimizer:

        def note(layer: Any, statistics: Any) -> None:
            if layer.plain:
                total.add_(statistics.gradient().flatten().square())

        optimizer._preconditioner.observe = note  # type: ignore[method-assign]
        for _ in range(n):
            cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.zero_grad()
    assert relative(total / n, exact) < 0.1


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("columns", ["grouped", "sample"])
def test_sampled_columns_are_unbiased(columns: Any, draws: int) -> None:
    """The mean of V V^T over drawn labels is sum_i F_i, with any number of draws a prediction."""
    model, x = mlp(3, 3), torch.randn(6, 3).double()
    exact = torch.cat([v.flatten(1) for v in dense_columns(model, x, "categorical").values()], 1)
    exact = exact.T @ exact
    total, n = torch.zeros_like(exact), 2000 // draws
    filter_ = Kalman(p0=1e-9, gamma=0.0, columns=columns, groups=2)
    with GRNG(model, "kalman", rho=0.0, lr=0.0, preconditioner=filter_, curvature=Curvature(draws=draws)) as optimizer:
        gather = filter_._gather

        def note() -> Any:
            found = gather()
            V = found[0][0][1].dense()[:, 0]
            assert len(V) == (2 if columns == "grouped" else 6) * draws
            rows_ = torch.cat([V[..., :3].flatten(1), V[..., 3]], 1)
            total.add_(rows_.T @ rows_)
            return found

        filter_._gather = note  # type: ignore[method-assign]
        for _ in range(n):
            train(optimizer, model, [(x, torch.tensor([0, 1, 2, 0, 1, 2]))])
    assert relative(total / n, exact) < 0.12


def test_a_layer_that_does_not_see_the_samples() -> None:
    """A position embedding is looked up once for the whole batch: a column of its own, unbiased, any V."""

    x, y = torch.randn(5, 3, 4).double(), torch.randint(3, (5,))
    for settings in ({}, {"columns": "sample"}, {"covariance": "kron"}):
        torch.manual_seed(0)
        model = Positions().double()
        with GRNG(model, "kalman", preconditioner=Kalman(p0=0.05, **settings)) as optimizer:  # type: ignore[arg-type]
            before = model.place.weight.detach().clone()
            train(optimizer, model, [(x, y)] * 5)
            p = optimizer.posterior.variance()["place.weight"]
            assert bool((p < 0.05 / 0.97**5 - 1e-5).any())
            assert relative(model.place.weight.detach(), before) > 1e-3
            assert not [row for row in optimizer.coverage() if row.treatment == "adamw"]


@pytest.mark.parametrize("covariance", ["diag", "kron"])
@pytest.mark.parametrize("gamma", [0.0, 0.05])
def test_process_noise_and_cap(gamma: float, covariance: Any) -> None:
    """The variance grows by what is forgotten and by the noise, up to p_max p0, where the data say nothing."""
    model, p0 = linear(3, 2, bias=False), 0.1
    filter_ = Kalman(p0=p0, gamma=gamma, covariance=covariance, process_noise=0.01, p_max=2.0)
    x = torch.zeros(4, 3).double()
    sizes = []
    with GRNG(model, "kalman", preconditioner=filter_) as optimizer:
        for _ in range(40):
            train(optimizer, model, [(x, torch.randn(4, 2).double())], mse_loss)
            sizes.append(optimizer.posterior.variance()["weight"].mean().item())
    assert sizes[0] == pytest.approx(p0 / (1 - gamma) + 0.01, rel=1e-9)
    assert sizes[-1] == pytest.approx(0.2, rel=1e-9)


class LoRA(nn.Module):
    """W x + B A x with W frozen, B zero at the start."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


@pytest.mark.parametrize("settings", [{}, {"covariance": "kron"}, {"columns": "sample"}, {"projection": "fd"}], ids=str)
def test_lora(settings: dict[str, Any]) -> None:
    """Only adapters train, and A's curvature is zero at the start: it trains, nothing is lost, the base stays."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(128, 6)
    y = (base(x) + 2 * torch.randn(3)).argmax(1)
    model = nn.Sequential(LoRA(base[0], 2), nn.Tanh(), LoRA(base[2], 2))  # type: ignore[arg-type]
    frozen = base[0].weight.clone()
    with GRNG(model, "kalman", preconditioner=Kalman(**settings)) as optimizer:
        losses = train(optimizer, model, [(x, y)] * 30)
        assert {row.parameter for row in optimizer.coverage()} == {f"{i}.{m}.weight" for i in (0, 2) for m in "AB"}
        variances = optimizer.posterior.variance()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(base[0].weight, frozen)
    assert all(bool((v > 0).all()) and bool(v.isfinite().all()) for v in variances.values())
    assert model[0].A.weight.isfinite().all()  # type: ignore[union-attr]


# The noise of a Gaussian likelihood.


@pytest.mark.parametrize("B", [1, 8, 64])
@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
def test_noise_is_found(noise: Any, B: int) -> None:
    """The covariance of the residuals, where the model is right from the start; reported by the posterior."""
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.0], [0.6, 0.4]]).double()
    truth = mix @ mix.T
    model = linear(3, 2)
    filter_ = Kalman(p0=1e-8, gamma=0.0)
    curvature = Curvature(noise=noise, ema=1.0)
    steps = 1600 // B
    with GRNG(model, "kalman", lr=0.0, preconditioner=filter_, curvature=curvature) as optimizer:
        for _ in range(steps):
            x = torch.randn(B, 3).double()
            y = model(x).detach() + torch.randn(B, 2).double() @ mix.T
            train(optimizer, model, [(x, y)], mse_loss)
        R = optimizer.posterior.noise
    expected = {"scalar": truth.diagonal().mean(), "diagonal": truth.diagonal().diag(), "full": truth}[noise]
    assert R.shape == expected.shape
    assert relative(R, expected) < 0.1


@pytest.mark.parametrize("noise", [0.3, "scalar", "diagonal", "full"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_step_under_noise(fisher: Any, noise: Any) -> None:
    """The first step with R by the residuals of the first batch, against the dense filter with R^-1 between."""
    model, p0, B = linear(3, 2, bias=False), 0.1, 7
    x, y = torch.randn(B, 3).double(), torch.randn(B, 2).double()
    e = (model(x) - y).detach()
    R = {
        "scalar": e.square().mean() * torch.eye(2).double(),
        "diagonal": (e.T @ e / B).diagonal().diag(),
        "full": e.T @ e / B,
    }.get(noise, 0.3 * torch.eye(2).double())
    J = torch.einsum("cd,bi->bcdi", torch.eye(2).double(), x).flatten(2)
    information = torch.einsum("bci,cd,bdj->ij", J, torch.linalg.inv(R), J)
    scores = torch.einsum("bci,cd,bd->bi", J, torch.linalg.inv(R), e)
    F = information if fisher == "exact" else scores.T @ scores
    expected = -torch.linalg.solve(torch.eye(6).double() / p0 + F, scores.sum(0))
    before = vector(model)
    filter_ = Kalman(p0=p0, gamma=0.0, p_max=1.0)
    curvature = Curvature(noise=noise, fisher=fisher, likelihood="gaussian")
    with GRNG(model, "kalman", rho=0.0, preconditioner=filter_, curvature=curvature) as optimizer:
        train(optimizer, model, [(x, y)], mse_loss)
    assert relative(vector(model) - before, expected) < 1e-9


def test_noise_resumes_and_skips() -> None:
    """It is in the state; a batch that is not finite leaves it alone."""
    x, y = data(16, 3, 2)
    runs = []
    for stop in (False, True):
        model = linear(3, 2)
        optimizer = GRNG(model, "kalman", curvature=Curvature(noise="full"))
        for i in range(6):
            if stop and i == 3:
                saved, weights = optimizer.state_dict(), model.state_dict()
                optimizer.close()
                model = linear(3, 2)
                model.load_state_dict(weights)
                optimizer = GRNG(model, "kalman", curvature=Curvature(noise="full"))
                optimizer.load_state_dict(saved)
            target = y * torch.nan if i == 4 else y
            R = optimizer._capture.fisher.noise.value
            train(optimizer, model, [(x + i, target)], mse_loss)
            if i == 4:
                assert torch.equal(optimizer.posterior.noise, R)
        runs.append((optimizer.posterior.noise.clone(), vector(model)))
        optimizer.close()
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_prior_of_exact_columns() -> None:
    """Of one sample, p0 times the trace of V^T V is 3: its largest eigenvalue alone would start ten times too bold."""
    model, (x, y) = mlp(4, 5, 10), stream(1, 1, 4, 10)[0]
    V = torch.cat([v.flatten(1) for v in dense_columns(model, x, "categorical").values()], 1)
    with GRNG(model, "kalman", preconditioner=Kalman(), curvature=Curvature(fisher="exact")) as optimizer:
        train(optimizer, model, [(x, y)])
        p0 = optimizer.state[model[0].weight]["p0"].item()
    assert p0 * V.square().sum().item() == pytest.approx(3.0, rel=1e-9)
    assert float(torch.linalg.matrix_norm(V, 2)) ** 2 < 0.5 * float(V.square().sum())


@pytest.mark.parametrize("B", [1, 50])
def test_noise_remembers_200_predictions(B: int) -> None:
    """R <- (d c R + sum e^2) / c with d = max(b, 1 - n/200)."""
    model, e, count, R = linear(2, 1), [], 0.0, 0.0
    curvature = Curvature(ema=0.9, likelihood="gaussian")
    with GRNG(model, "kalman", lr=0.0, preconditioner=Kalman(p0=1e-6), curvature=curvature) as optimizer:
        for t in range(8):
            x, y = torch.randn(B, 2).double(), (t + 1) * torch.randn(B, 1).double()
            e.append((model(x) - y).detach().square().sum().item())
            train(optimizer, model, [(x, y)], mse_loss)
            keep = max(0.9, 1 - B / 200)
            R, count = (keep * count * R + e[-1]) / (keep * count + B), keep * count + B
            assert optimizer.posterior.noise.item() == pytest.approx(R, rel=1e-10)


def test_bare_parameters_under_exact_columns() -> None:
    """They see one gradient with drawn labels: sums of exact columns over the batch would say nothing."""
    model, seen = mixed_model(), []
    with GRNG(model, "kalman", curvature=Curvature(fisher="exact")) as optimizer:
        observe = optimizer._preconditioner.observe

        def note(layer: Any, statistics: Any) -> None:
            if layer.plain:
                seen.append(statistics.draw)
            observe(layer, statistics)

        optimizer._preconditioner.observe = note  # type: ignore[method-assign]
        train(optimizer, model, [(torch.rand(6, 4).double(), torch.randint(3, (6,)))])
    assert seen == [0]


@pytest.mark.parametrize(("fisher", "own"), [("mc", 1), ("exact", 3 * 3)])
def test_columns_of_a_layer_that_does_not_see_the_samples(fisher: Any, own: int) -> None:
    """With drawn labels one column, the sum over the batch; otherwise its own rows in place of samples."""

    torch.manual_seed(0)
    model, filter_ = Positions().double(), Kalman(p0=0.05, columns="sample")
    gather, widths = filter_._gather, []

    def note() -> Any:
        found = gather()
        for group, parts in zip(optimizer._groups, found, strict=True):
            V = parts[0][1].dense().flatten(1)
            widths.append((group.layers[0].name, int((V != 0).any(1).sum()), len(V)))
        return found

    filter_._gather = note  # type: ignore[method-assign]
    with GRNG(model, "kalman", preconditioner=filter_, curvature=Curvature(fisher=fisher)) as optimizer:
        train(optimizer, model, [(torch.randn(5, 3, 4).double(), torch.randint(3, (5,)))])
    shared = 5 * (3 if fisher == "exact" else 1)
    assert dict((name, (used, total)) for name, used, total in widths) == {
        "place": (own, shared + own),
        "head": (shared, shared + own),
    }


class Watched(Kalman):
    """Keeps the rows of the last step."""

    def observe(self, layer: Any, statistics: Any) -> None:
        self.rows = statistics.x, statistics.e
        super().observe(layer, statistics)


@pytest.mark.parametrize("B", [3, 7, 16])
@pytest.mark.parametrize("projection", ["vd", "fd"])
@pytest.mark.parametrize("T", [1, 2])
def test_squares_of_grouped_columns(B: int, projection: Any, T: int) -> None:
    """By sample where a layer is used at one position and vd asks for no more; of the groups' sums otherwise."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    model = layer if T == 1 else nn.Sequential(layer, nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten())
    x = torch.randn(B, 4) if T == 1 else torch.randn(B, T, 4)
    p0 = 0.3
    filter_ = Watched(p0=p0, gamma=0.0, groups=2, projection=projection)
    optimizer = GRNG(model, "kalman", rho=0.0, preconditioner=filter_)
    cross_entropy(model(x.double()), torch.arange(B) % 3).backward()
    optimizer.step()
    x, e = filter_.rows
    of_samples = torch.einsum("kbto,kbti->kboi", e, x)[0]
    of_groups = torch.stack([of_samples[g::2].sum(0) for g in range(2)])
    V = of_groups.flatten(1)
    if projection == "fd":
        expected = torch.linalg.inv(torch.eye(V.shape[1]) / p0 + V.T @ V).diagonal().view(of_groups[0].shape)
    else:
        squares = (of_samples if T == 1 else of_groups).square().sum(0)
        expected = 1 / (1 / p0 + squares)
    torch.testing.assert_close(filter_.variance()[0][0], expected)


@pytest.mark.parametrize("elements", [1, 40, 2**18])
def test_every_matrix_has_its_own_cap_and_penalty(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack, also where it is gone through in parts: matrices may start at different times."""
    monkeypatch.setattr(sys.modules["grng.kernels.columns"], "CACHED", elements)
    torch.manual_seed(0)
    k, m, n_out, n_in = 3, 2, 5, 4
    p, g, cap = torch.rand(k, n_out, n_in), torch.randn(k, n_out, n_in), torch.tensor([0.3, 0.6, 5.0])
    lam, N = torch.tensor([0.0, 2.0, 7.0]).view(k, 1, 1), torch.tensor(1.0)
    columns = DenseColumns(torch.randn(k, m, 1, n_in), torch.randn(k, m, 1, n_out))
    parts = [(slice(0, 1), DenseColumns(columns.x[:1], columns.e[:1]))]
    parts.append((slice(1, 3), DenseColumns(columns.x[1:], columns.e[1:])))
    covariance = Diagonal(p.clone(), "vd")
    covariance.predict(1.25, 0.1, cap)
    found = covariance.measure(parts, lam, g)
    assert found is not None
    prior = torch.minimum(1.25 * p + 0.1, cap.view(k, 1, 1))
    q, V = prior / (1 + lam * prior), columns.dense()
    torch.testing.assert_close(found[0], torch.einsum("akoi,koi,bkoi->ab", V, q, V))
    torch.testing.assert_close(found[1], torch.einsum("akoi,koi,koi->a", V, q, g))
    z = torch.randn(m)
    torch.testing.assert_close(covariance.direction(parts, z, g, N), q * (torch.einsum("a,akoi->koi", z, V) - g))
    covariance.commit(parts, None, torch.tensor(True))
    torch.testing.assert_close(covariance.p, 1 / (1 / prior + V.square().sum(0)))
