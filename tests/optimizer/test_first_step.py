"""One step against dense formulas in float64: factors from autograd, inverses from plain solves, no kernel of GRNG."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.preconditioners import KFAC, Kalman
from grng.variants import VARIANTS

from .cases import METHODS, Method, displacement, methods, mixed, mlp, relative, settings, stream, train, vector


@dataclass
class Block:
    """One Linear layer measured by hand; a bias is the last column.

    x: (B, n_in + 1) inputs; e: (B, n_out) gradients of the per-sample loss; rows: (C, B, n_out), their outer products
    summed over C are the Fisher's.
    """

    x: Tensor
    e: Tensor
    rows: Tensor

    @property
    def gradient(self) -> Tensor:
        return self.e.T @ self.x / len(self.x)

    @property
    def Lambda(self) -> Tensor:
        return self.x.T @ self.x / len(self.x)

    @property
    def Gamma(self) -> Tensor:
        return torch.einsum("cbi,cbj->ij", self.rows, self.rows) / len(self.x)

    @property
    def squares(self) -> Tensor:
        """Mean squared per-sample gradient."""
        return self.squares_in(torch.eye(self.e.shape[1]).double(), torch.eye(self.x.shape[1]).double())

    def squares_in(self, U_g: Tensor, U_l: Tensor) -> Tensor:
        per_sample = torch.einsum("cbo,bi->cboi", self.rows @ U_g, self.x @ U_l)
        return per_sample.square().sum((0, 1)) / len(self.x)


def measure(model: nn.Sequential, x: Tensor, y: Tensor, fisher: str) -> list[Block]:
    """Blocks of a chain of Linear and Tanh under cross-entropy; "exact" weighs each class by its probability."""
    inputs, outputs = [], []
    for module in model:
        if isinstance(module, nn.Linear):
            inputs.append(torch.cat([x, x.new_ones(len(x), 1)], 1).detach())
            x = module(x)
            outputs.append(x)
        else:
            x = module(x)

    def errors(labels: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cross_entropy(x, labels, reduction="sum"), outputs, retain_graph=True)

    true = errors(y)
    classes = range(x.shape[1]) if fisher == "exact" else []
    p = x.detach().softmax(1)
    drawn = [errors(torch.full_like(y, c)) for c in classes]
    return [
        Block(a, e, torch.stack([p[:, c, None].sqrt() * d[i] for c, d in enumerate(drawn)]) if drawn else e[None])
        for i, (a, e) in enumerate(zip(inputs, true, strict=True))
    ]


def kron(b: Block) -> Tensor:
    return torch.kron(b.Gamma, b.Lambda)


def damped(F: Tensor, lam: Tensor, G: Tensor) -> Tensor:
    """-(F + lam I)^{-1} G for a matrix G read row by row."""
    return -torch.linalg.solve(F + lam * torch.eye(len(F)).double(), G.flatten()).view_as(G)


def eigen(b: Block, G: Tensor, lam: Tensor) -> Tensor:
    return damped(kron(b), lam, G)


def factored(b: Block, G: Tensor, lam: Tensor) -> Tensor:
    pi = ((b.Lambda.trace() / len(b.Lambda)) / (b.Gamma.trace() / len(b.Gamma))).sqrt()
    left = b.Gamma + lam.sqrt() / pi * torch.eye(len(b.Gamma)).double()
    right = b.Lambda + pi * lam.sqrt() * torch.eye(len(b.Lambda)).double()
    return -torch.linalg.solve(right, torch.linalg.solve(left, G).T).T


def ekfac(b: Block, G: Tensor, lam: Tensor) -> Tensor:
    U_g, U_l = torch.linalg.eigh(b.Gamma)[1], torch.linalg.eigh(b.Lambda)[1]
    return -U_g @ ((U_g.T @ G @ U_l) / (b.squares_in(U_g, U_l) + lam)) @ U_l.T


def diagonal(b: Block, G: Tensor, lam: Tensor) -> Tensor:
    return -G / (b.squares + lam)


def identity(b: Block, G: Tensor, lam: Tensor) -> Tensor:
    return -G


def as_vector(matrices: list[Tensor]) -> Tensor:
    """Weights and biases in the order of model.parameters()."""
    return torch.cat([part.flatten() for M in matrices for part in (M[:, :-1], M[:, -1])])


def as_matrices(theta: Tensor, blocks: list[Block]) -> list[Tensor]:
    sizes = [(b.e.shape[1], b.x.shape[1] - 1) for b in blocks]
    parts = theta.split([n for o, i in sizes for n in (o * i, o)])
    triples = zip(parts[::2], parts[1::2], sizes, strict=True)
    return [torch.cat([weight.view(size), bias[:, None]], 1) for weight, bias, size in triples]


def flat_loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """theta -> loss."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def f(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return cross_entropy(functional_call(model, named, (x,)), y)

    return f


LAM0, RHO = 0.02, 3.0

# name: the formula, the tolerance, and whether lam is rho ||g||^2 + lam0 or lam0 alone. Newton stops at 1e-4.
DENSE = {
    "kfac": (eigen, 1e-10, False),
    "ring": (eigen, 1e-10, True),
    "ring-factored": (factored, 1e-10, True),
    "ring-newton": (factored, 1e-3, True),
    "ekfac": (ekfac, 1e-10, False),
    "ring-diagonal": (diagonal, 1e-10, True),
    "ring-identity": (identity, 1e-12, True),
}


@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", DENSE)
def test_first_direction(name: str, fisher: Any, norm: Any) -> None:
    """D = -(F + lam I)^{-1} g per layer, lam from the gradient norm of the model or of the layer."""
    formula, tolerance, regularized = DENSE[name]
    model, (x, y), lr = mlp(5, 4, 3), stream(1, 12, 5)[0], 0.3
    blocks = measure(model, x, y, fisher)
    norms = [b.gradient.square().sum() for b in blocks]
    norms = norms if norm == "layer" else [torch.stack(norms).sum()] * len(norms)
    lam = [LAM0 + regularized * RHO * n for n in norms]
    expected = as_vector([formula(b, b.gradient, d) for b, d in zip(blocks, lam, strict=True)])
    rho = {"rho": RHO} if regularized else {}
    curvature = settings(fisher=fisher, damping=LAM0)
    with METHODS[name](model, lr=lr, momentum=0.0, norm=norm, curvature=curvature, **rho) as optimizer:
        moved = displacement(model, lambda: train(optimizer, model, [(x, y)]))
        assert optimizer.diagnostics["lam"].item() == pytest.approx(lam[0].item(), rel=1e-10)
    assert relative(moved / lr, expected) < tolerance
    if formula is not identity:
        assert relative(expected, as_vector([-b.gradient / d for b, d in zip(blocks, lam, strict=True)])) > 0.1


@pytest.mark.parametrize("mode", ["double", "finite", "ggn"])
def test_reng_first_direction(mode: str) -> None:
    """-(F + lam0 I)^{-1} gt: "double" with H from torch.func, "finite" with its difference quotient, whose distance to
    rho H g is linear in eps = 1e-2, "ggn" with F in place of H."""
    model, (x, y), lr, eps = mlp(5, 4, 3), stream(1, 12, 5)[0], 0.3, 1e-2
    blocks, theta, f = measure(model, x, y, "exact"), vector(model), flat_loss(model, x, y)
    g, H = grad(f)(theta), hessian(f)(theta)
    quotient = (grad(f)(theta + eps * g / g.norm()) - g) / eps * g.norm()
    in_blocks = as_vector([(kron(b) @ b.gradient.flatten()).view_as(b.gradient) for b in blocks])
    product = {"double": H @ g, "finite": quotient, "ggn": in_blocks}[mode]
    gt = as_matrices(g + RHO * product, blocks)
    lam = torch.tensor(LAM0, dtype=torch.float64)
    expected = as_vector([eigen(b, G, lam) for b, G in zip(blocks, gt, strict=True)])
    curvature = settings(fisher="exact", damping=LAM0)
    with METHODS[f"reng-{mode}"](model, lr=lr, rho=RHO, momentum=0.0, curvature=curvature) as optimizer:
        moved = displacement(model, lambda: train(optimizer, model, [(x, y)]))
    assert relative(moved / lr, expected) < 1e-9
    assert relative(RHO * product, g) > 0.1
    if mode == "finite":
        assert 1e-6 < relative(quotient, H @ g) < eps


def drawn_labels(optimizer: GRNG) -> list[Tensor]:
    """Notes the labels that the Fisher draws: at the output e = p - onehot(label)."""
    labels: list[Tensor] = []
    observe = optimizer._preconditioner.observe

    def note(layer: Any, statistics: Any) -> None:
        if layer.name == "2":
            labels.append(statistics.e.flatten(0, 2).argmin(1))
        observe(layer, statistics)

    optimizer._preconditioner.observe = note  # type: ignore[method-assign]
    return labels


@pytest.mark.parametrize("rho", [0.0, 2.0])
@pytest.mark.parametrize(("gamma", "p_max"), [(0.0, 1.0), (0.1, 1.0), (0.1, 20.0)])
@pytest.mark.parametrize("projection", ["vd", "fd"])
def test_kalman_first_steps(projection: Any, gamma: float, p_max: float, rho: float) -> None:
    """theta += -(diag(1/q) + V V^T)^{-1} gs with V made of the labels that were drawn, two steps; vd adds to 1/p
    the squares of the samples."""
    model, groups, p0 = mlp(5, 4, 3), 3, 0.05
    p = torch.full_like(vector(model), p0)
    filter_ = Kalman(p0=p0, gamma=gamma, groups=groups, projection=projection, p_max=p_max)
    with GRNG(model, "kalman", lr=1.0, rho=rho, preconditioner=filter_, curvature=settings()) as optimizer:
        labels = drawn_labels(optimizer)
        for x, y in stream(2, 12, 5):
            truth = measure(model, x, y, "empirical")
            moved = displacement(model, lambda x=x, y=y: train(optimizer, model, [(x, y)]))
            model_before = mlp(5, 4, 3)
            nn.utils.vector_to_parameters(vector(model) - moved, model_before.parameters())
            drawn = measure(model_before, x, labels[-1], "empirical")
            V = torch.stack([as_vector([b.e[g::groups].T @ b.x[g::groups] for b in drawn]) for g in range(groups)])
            mean = as_vector([b.gradient for b in truth])
            prior = (p / (1 - gamma)).clamp(max=p_max * p0)
            lam = 12 * rho * mean.square().sum() / (gamma or 1)
            expected = -torch.linalg.solve(torch.diag(1 / prior + lam) + V.T @ V, 12 * mean)
            assert relative(moved, expected) < 1e-10
            precision = torch.diag(1 / prior) + V.T @ V
            squares = as_vector([b.e.square().T @ b.x.square() for b in drawn])
            p = 1 / (1 / prior + squares) if projection == "vd" else torch.linalg.inv(precision).diagonal()


def test_kalman_prior_of_the_first_batch() -> None:
    """Without p0, p0 lambda_max(V^T V) is the same whatever the scale of the inputs, and later batches keep it."""
    products = []
    for scale in (1.0, 30.0):
        model = mlp(5, 4, 3)
        with GRNG(model, "kalman", rho=0.0, preconditioner=Kalman(groups=3)) as optimizer:
            labels = drawn_labels(optimizer)
            for t, (x, y) in enumerate(stream(2, 12, 5)):
                before = mlp(5, 4, 3)
                before.load_state_dict(model.state_dict())
                train(optimizer, model, [(scale * x, y)])
                p0 = optimizer.state[model[0].weight]["p0"].clone()
                if t == 0:
                    drawn = measure(before, scale * x, labels[-1], "empirical")
                    V = torch.stack([as_vector([b.e[g::3].T @ b.x[g::3] for b in drawn]) for g in range(3)])
                    products.append((p0 * torch.linalg.matrix_norm(V, 2) ** 2).item())
                    first = p0
            assert torch.equal(p0, first)
    assert products[0] == pytest.approx(products[1], rel=1e-10)
    assert 0.01 < products[0] < 10


@pytest.mark.parametrize("norm", ["global", "layer"])
def test_grouped_convolution(norm: Any) -> None:
    """-g / (h + lam) with per-sample gradients from torch.func; a layer's norm is over all of its groups."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(5, 4, 3, 3).double(), torch.randint(3, (5,))
    named = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    rows = vmap(grad(loss), (None, 0, 0))({n: p.detach() for n, p in named.items()}, x, y)
    squares = {name: row.mean(0).square().sum() for name, row in rows.items()}
    total = sum(squares.values())
    before = {name: p.detach().clone() for name, p in named.items()}
    curvature = settings(fisher="empirical", damping=LAM0)
    with METHODS["ring-diagonal"](model, lr=1.0, rho=RHO, momentum=0.0, norm=norm, curvature=curvature) as optimizer:
        train(optimizer, model, [(x, y)])
    for name, p in named.items():
        layer = sum(n for other, n in squares.items() if other[0] == name[0])
        lam = LAM0 + RHO * (layer if norm == "layer" else total)
        expected = -rows[name].mean(0) / (rows[name].square().mean(0) + lam)
        assert relative(p.detach() - before[name], expected) < 1e-10, name


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, {}) for name in ("ring", "ring-diagonal", "ring-factored", "kfac", "ekfac")),
        *((name, {"floor": 0.7}) for name in ("ring", "ekfac")),
        *(("ring", given) for given in ({"strength": 0.4}, {"floor": 0.02, "strength": 0.0})),
    ],
    ids=str,
)
def test_automatic_damping(name: str, given: dict[str, float]) -> None:
    """lam0 = floor * S and rho = strength * S / N, N the largest running mean of ||g||^2; one batch is measured."""
    model, batches = mlp(5, 4, 3), stream(4, 12, 5)
    variant = replace(VARIANTS[METHODS[name].variant], **given)
    own = {key: value for key, value in given.items() if key == "strength"}
    floor = {key: value for key, value in given.items() if key == "floor"}
    first = measure(model, *batches[0], "exact")
    largest = {
        "ring-diagonal": max(b.squares.max() for b in first),
        "ring-factored": max(b.Lambda.trace() * b.Gamma.trace() for b in first),
        "ekfac": max(b.squares_in(torch.linalg.eigh(b.Gamma)[1], torch.linalg.eigh(b.Lambda)[1]).max() for b in first),
    }.get(name, max(torch.linalg.matrix_norm(kron(b), 2) for b in first))
    norms, means = [], []
    curvature = settings(fisher="exact", burn_in=1, stats_every=100, relative_to="model", **floor)
    with METHODS[name](model, curvature=curvature, **own) as optimizer:
        for batch in batches:
            norms.append(sum(b.gradient.square().sum() for b in measure(model, *batch, "exact")))
            weights = [0.9**age for age in reversed(range(len(norms)))]
            means.append(sum(w * norm for w, norm in zip(weights, norms, strict=True)) / sum(weights))
            train(optimizer, model, [batch])
            expected = (variant.floor + variant.strength * norms[-1] / max(means)) * largest
            assert optimizer.diagnostics["lam"].item() == pytest.approx(expected.item(), rel=1e-9)
    assert len(set(norms)) == 4


@pytest.mark.parametrize("variant", ["ring", "reng", "kfac", "ekfac"])
def test_damping_follows_the_curvature(variant: str) -> None:
    """S goes up with the scale of the inputs, and fades slowly; a penalty's rho comes back at once."""
    model, seen = mlp(5, 4, 3), []
    curvature = Curvature(fisher="exact", burn_in=0, stats_every=1, ema=0.0, inverse_every=1)
    with GRNG(
        model, variant, lr=0.0, curvature=curvature, **({"mode": "ggn"} if variant == "reng" else {})
    ) as optimizer:
        for scale, (x, y) in zip((1.0, 10.0, 1.0), stream(1, 12, 5) * 3, strict=True):
            train(optimizer, model, [(scale * x, y)])
            seen.append((optimizer._damping.floor.item(), optimizer.diagnostics["rho"].item()))
    floors, rhos = zip(*seen, strict=True)
    assert floors[1] > 2 * floors[0]
    assert floors[2] == pytest.approx(0.98 * floors[1], rel=1e-12)
    if variant == "reng":
        assert rhos[1] < 0.5 * rhos[0]
        assert rhos[2] == pytest.approx(rhos[0], rel=1e-9)


def test_a_gradient_out_of_all_proportion() -> None:
    """It counts for 100 times the mean in N, so that later damping is of the old order."""
    model, rhos = mlp(5, 4, 3), []
    with GRNG(model, "ring", lr=0.0, curvature=Curvature(burn_in=1, stats_every=1000)) as optimizer:
        for scale in (1.0, 1.0, 1.0, 1e8, 1.0):
            for x, y in stream(1, 12, 5):
                optimizer.zero_grad()
                (scale * cross_entropy(model(x), y)).backward()
                optimizer.step()
            rhos.append(optimizer.diagnostics["rho"].item())
    assert rhos[2] == pytest.approx(rhos[0], rel=1e-9)
    assert rhos[0] / 40 < rhos[3] < rhos[0]
    assert rhos[4] == rhos[3]


def quadratic(name: str, b: Block, D: Tensor) -> Tensor:
    """<D, F D> of the F that was inverted."""
    if name == "ring-diagonal":
        return (b.squares * D.square()).sum()
    if name == "ekfac":
        U_g, U_l = torch.linalg.eigh(b.Gamma)[1], torch.linalg.eigh(b.Lambda)[1]
        return (b.squares_in(U_g, U_l) * (U_g.T @ D @ U_l).square()).sum()
    return D.flatten() @ kron(b) @ D.flatten()


@pytest.mark.parametrize("rates", [(0.3, 0.3), (0.3, 0.05)], ids=["one-lr", "two-lr"])
@pytest.mark.parametrize("share", [0.25, 4.0], ids=["clipped", "free"])
@pytest.mark.parametrize("name", [*DENSE, "reng-ggn"])
def test_kl_clip(name: str, share: float, rates: tuple[float, float]) -> None:
    """nu = min(1, sqrt(kappa / (sum over layers of lr^2 <D, (F + lam I) D>))), each layer with the lr of its group."""
    x, y = stream(1, 12, 5)[0]
    clean, clipped = mlp(5, 4, 3), mlp(5, 4, 3)
    blocks = measure(clean, x, y, "exact")

    def move(model: nn.Sequential, kl_clip: float | None) -> tuple[Tensor, float, Tensor]:
        groups = [{"params": model[i].parameters(), "lr": rate} for i, rate in zip((0, 2), rates, strict=True)]
        curvature = settings(fisher="exact", damping=LAM0, kl_clip=kl_clip)
        with METHODS[name](model, params=groups, momentum=0.0, curvature=curvature) as optimizer:
            moved = displacement(model, lambda: train(optimizer, model, [(x, y)]))
            return moved, optimizer.diagnostics["kl_scale"].item(), optimizer.diagnostics["lam"]

    free, one, lam = move(clean, None)
    triples = list(zip(blocks, as_matrices(free, blocks), rates, strict=True))
    if name in ("ring-identity", "ring-factored", "ring-newton"):  # no F, or one that is damped in its factors
        length = sum(-lr * (D * b.gradient).sum() for b, D, lr in triples)  # D is lr D, so that one lr is missing
    else:
        length = sum(quadratic(name, b, D) + lam * D.square().sum() for b, D, _ in triples)
    moved, nu, _ = move(clipped, share * length.item())
    assert one == 1
    assert nu == pytest.approx(min(1, share**0.5), rel=1e-9)
    assert relative(moved, min(1, share**0.5) * free) < 1e-9


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("B", [6, 14])
@pytest.mark.parametrize(
    ("loss", "outputs", "n"),
    [
        (cross_entropy, 3, 1),
        (binary_cross_entropy_with_logits, 3, 3),
        (binary_cross_entropy_with_logits, 1, 1),
        (mse_loss, 4, 4),
    ],
    ids=["categorical", "bernoulli", "one bernoulli", "gaussian"],
)
def test_kl_clip_counts_a_sample(loss: Callable[..., Tensor], outputs: int, n: int, B: int, parts: int) -> None:
    """kappa is in nats a sample: n nu^2 lr^2 <D, (F + lam I) D> = kappa, n elements an output; also in a step without
    statistics, and in one that comes after a checkpoint."""
    model, kappa = mlp(5, 4, outputs), 1e-5
    x = torch.randn(B, 5, generator=torch.Generator().manual_seed(2)).double()
    y = x[:, :outputs].argmax(1) if loss is cross_entropy else x[:, :outputs].sigmoid()
    if loss is binary_cross_entropy_with_logits:
        y = y.round()

    def make() -> GRNG:
        curvature = Curvature(kl_clip=kappa, stats_every=3, burn_in=0, damping=LAM0, draws=3)
        return GRNG(model, "kfac", lr=0.2, momentum=0.0, curvature=curvature)

    def checked(optimizer: GRNG) -> None:
        optimizer.zero_grad()
        for u, v in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss(model(u), v) / parts).backward()
        moved = displacement(model, optimizer.step)
        g = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        nu = optimizer.diagnostics["kl_scale"].item()
        assert nu < 1
        assert -n * 0.2 * nu * float(moved @ g) == pytest.approx(kappa, rel=1e-9)

    with make() as optimizer:
        for _ in range(2):
            checked(optimizer)
        state = optimizer.state_dict()
    with make() as optimizer:
        optimizer.load_state_dict(state)
        checked(optimizer)


def test_momentum_remembers_directions_within_the_trust_region() -> None:
    """m <- mu m + nu D, each direction with its own step's nu; theta moves by lr m."""
    model = mlp(5, 4, 3)
    curvature = settings(fisher="exact", damping=LAM0, kl_clip=1e-4, ema=1e-9)
    with METHODS["kfac"](model, lr=0.2, momentum=0.9, curvature=curvature) as optimizer:
        expected, scales = torch.zeros(()), []
        for batch in stream(3, 12, 5):
            twin = mlp(5, 4, 3)
            twin.load_state_dict(model.state_dict())
            with METHODS["kfac"](twin, lr=0.2, momentum=0.0, curvature=curvature) as alone:
                own = displacement(twin, lambda t=twin, a=alone, b=batch: train(a, t, [b]))
            expected = 0.9 * expected + own
            moved = displacement(model, lambda b=batch: train(optimizer, model, [b]))
            scales.append(optimizer.diagnostics["kl_scale"].item())
            assert relative(moved, expected) < 1e-6
    assert max(scales) < 1


@methods()
def test_learning_rate_of_a_group(method: Method) -> None:
    """The second layer's step is scaled by its own lr, the direction is the same."""
    batch, moves = stream(1)[0], []
    for rate in (0.3, 0.1):
        model = mlp(4, 4, 3)
        groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": rate}]
        with method(model, params=groups, curvature=settings()) as optimizer:
            moves.append(displacement(model, lambda m=model, o=optimizer: train(o, m, [batch])))
    first = sum(p.numel() for p in mlp(4, 4, 3)[0].parameters())
    assert torch.equal(moves[0][:first], moves[1][:first])
    assert relative(moves[1][first:], moves[0][first:] / 3) < 1e-12


@methods()
def test_momentum(method: Method) -> None:
    """m <- mu m + D: the second step with momentum is the one without, plus lr mu times the first."""
    batches, lr, mu, seconds, firsts = stream(2), 0.05, 0.7, [], []
    for momentum in (0.0, mu):
        model = mlp(4, 4, 3)
        with method(model, lr=lr, momentum=momentum, curvature=settings()) as optimizer:
            firsts.append(displacement(model, lambda m=model, o=optimizer: train(o, m, batches[:1])))
            seconds.append(displacement(model, lambda m=model, o=optimizer: train(o, m, batches[1:])))
    assert relative(firsts[1], firsts[0]) < 1e-14
    assert relative(seconds[1] - seconds[0], mu * firsts[0]) < 1e-10


@methods()
def test_weight_decay(method: Method) -> None:
    """theta <- (1 - lr wd) theta + lr m for every parameter, with the fallback's rate for those that follow AdamW."""
    batch, lr, own, decay, moves = stream(1)[0], 0.05, 0.02, 0.4, []
    for weight_decay in (0.0, decay):
        model = mixed()
        theta = vector(model)
        with method(model, lr=lr, fallback_lr=own, weight_decay=weight_decay, curvature=settings()) as optimizer:
            moves.append(displacement(model, lambda m=model, o=optimizer: train(o, m, [batch])))
            rows = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert [name for name, treatment in rows.items() if treatment == "adamw"] == (
        [] if method.kalman else [f"1.{name}" for name, _ in model[1].named_parameters()]
    )
    rates = [torch.full_like(p, own if rows[n] == "adamw" else lr).flatten() for n, p in model.named_parameters()]
    assert relative(moves[1] - moves[0], -torch.cat(rates) * decay * theta) < 1e-10


def test_identity_with_momentum_is_sgd() -> None:
    ours, theirs, batches = mlp(4, 5, 3), mlp(4, 5, 3), stream(10)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=0.8)
    with GRNG(ours, "kfac", preconditioner="identity", lr=0.2, momentum=0.8, curvature=settings()) as optimizer:
        train(optimizer, ours, batches)
    for x, y in batches:
        sgd.zero_grad()
        cross_entropy(theirs(x), y).backward()
        sgd.step()
    assert relative(vector(ours), vector(theirs)) < 1e-12


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_fallback_is_adamw(dtype: torch.dtype, tolerance: float, decay: float) -> None:
    """Parameters without factors move as under torch.optim.AdamW, given the same gradients and schedule."""
    model = mixed(dtype)
    own = list(model[1].parameters())
    copies = [nn.Parameter(p.detach().clone()) for p in own]
    start = torch.cat([p.detach().clone() for p in own])
    adamw = torch.optim.AdamW(copies, lr=0.02, weight_decay=decay)
    with GRNG(model, "kfac", fallback_lr=0.02, weight_decay=decay) as optimizer:
        schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.95) for each in (optimizer, adamw)]
        for _ in range(20):
            train(optimizer, model, [(torch.randn(6, 4, dtype=dtype), torch.randint(3, (6,)))])
            for p, copy in zip(own, copies, strict=True):
                assert p.grad is not None
                copy.grad = p.grad.clone()
            adamw.step()
            for schedule in schedules:
                schedule.step()
            assert relative(torch.cat([*own]).detach(), torch.cat(copies).detach()) < tolerance
    assert relative(start, torch.cat([*own]).detach()) > 0.05


class Recording(KFAC):
    """K-FAC that notes at which step it observes, refreshes and decomposes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.calls: dict[str, list[int]] = {"observe": [], "refresh": [], "decompose": []}

    def observe(self, layer: Any, statistics: Any) -> None:
        if layer.name == "0":
            self.calls["observe"].append(self.now)
        super().observe(layer, statistics)

    def refresh(self, batch: Any, decompose: bool) -> None:
        self.calls["refresh"].append(self.now)
        self.calls["decompose"] += [self.now] * decompose
        super().refresh(batch, decompose)


class EveryStep(Recording):
    every_step = True


ALL = list(range(20))


@pytest.mark.parametrize(
    ("kind", "config", "observed", "decomposed"),
    [
        (Recording, {"stats_every": 1, "burn_in": 0}, ALL, ALL),
        (Recording, {"stats_every": 5, "burn_in": 0}, [0, 5, 10, 15], [0, 5, 10, 15]),
        (Recording, {"stats_every": 3, "inverse_every": 6, "burn_in": 0}, [0, 3, 6, 9, 12, 15, 18], [0, 6, 12, 18]),
        (Recording, {"stats_every": 4, "inverse_every": 6, "burn_in": 0}, [0, 4, 8, 12, 16], [0, 8, 12]),
        (Recording, {"stats_every": 6, "inverse_every": 2, "burn_in": 0}, [0, 6, 12, 18], [0, 6, 12, 18]),
        (Recording, {"stats_every": 8, "burn_in": 6}, [0, 1, 2, 3, 4, 5, 8, 16], [0, 1, 2, 4, 8, 16]),
        (EveryStep, {"stats_every": 5, "inverse_every": 10, "burn_in": 0}, ALL, [0, 10]),
    ],
)
def test_schedule(kind: type[Recording], config: dict[str, int], observed: list[int], decomposed: list[int]) -> None:
    """Statistics every `stats_every` steps, decompositions at the first of them in each period of `inverse_every`;
    during burn-in at every step, and at steps 0, 1, 2, 4, 8, ..."""
    model, recording = mlp(4, 5, 3), kind()
    with GRNG(model, "kfac", preconditioner=recording, curvature=Curvature(**config)) as optimizer:  # type: ignore[arg-type]
        for recording.now, batch in enumerate(stream(20)):
            train(optimizer, model, [batch])
        assert optimizer.diagnostics["refreshes"].item() == len(observed)
    assert recording.calls == {"observe": observed, "refresh": observed, "decompose": decomposed}


def test_average_and_stale_factors() -> None:
    """Between measurements the direction is made with the last factors; b = 0.5 weighs the second batch by 2/3."""
    model, batches, b = mlp(5, 4, 3), stream(4, 12, 5), 0.5
    curvature = settings(fisher="exact", damping=LAM0, ema=b, stats_every=2, burn_in=0)
    with GRNG(model, "kfac", lr=0.1, momentum=0.0, curvature=curvature) as optimizer:
        factors: list[tuple[Tensor, Tensor]] = []
        for t, (x, y) in enumerate(batches):
            blocks = measure(model, x, y, "exact")
            if t == 0:
                factors = [(block.Lambda, block.Gamma) for block in blocks]
            elif t == 2:
                new = [(block.Lambda, block.Gamma) for block in blocks]
                both = zip(factors, new, strict=True)
                factors = [(L / 3 + 2 * nL / 3, G / 3 + 2 * nG / 3) for (L, G), (nL, nG) in both]
            lam = torch.tensor(LAM0, dtype=torch.float64)
            expected = [
                damped(torch.kron(Gamma, Lambda), lam, block.gradient)
                for block, (Lambda, Gamma) in zip(blocks, factors, strict=True)
            ]
            moved = displacement(model, lambda x=x, y=y: train(optimizer, model, [(x, y)]))
            assert relative(moved / 0.1, as_vector(expected)) < 1e-10
