"""Large matrices: coordinates of negligible curvature are left out, and decompositions come less often."""

import copy

import pytest
import torch
from grng.kernels import leading, sandwich_costs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from grng import GRNG, Curvature
from grng.preconditioners import EKFAC, KFAC

from .cases import METHODS, Method, methods


def wide(dtype: torch.dtype, rank: int, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer whose inputs span `rank` dimensions, another one behind it, and data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(160, 150), nn.Tanh(), nn.Linear(150, 140)).to(dtype)
    x = torch.randn(40, rank, dtype=dtype) @ torch.randn(rank, 160, dtype=dtype)
    return model, x, torch.randint(140, (40,))


def steps(optimizer: GRNG, model: nn.Module, x: Tensor, y: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("variant", ["ring", "kfac", "ekfac", "reng"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-2)], ids=str)
@pytest.mark.parametrize("floor", [0.01, 1.0])
def test_what_is_left_out_is_negligible(
    variant: str, dtype: torch.dtype, tolerance: float, floor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with the corner of the spectrum alone equal those with all of it."""
    found, kept = [], []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr(KFAC, "_worth_keeping", lambda self, rho: [None] * len(self.groups))
        model, x, y = wide(dtype, rank=9)
        before = [p.detach().clone() for p in model.parameters()]
        mode = "ggn" if variant == "reng" else None
        with GRNG(model, variant, mode=mode, curvature=Curvature(floor=floor, stats_every=2)) as optimizer:
            # EKFAC's later moments depend on the basis of null spaces, which rounding decides.
            steps(optimizer, model, x, y, 1 if variant == "ekfac" else 5)
            kept.append(optimizer._preconditioner._kept)
        found.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    assert all(part is None for part in kept[1])
    assert any(part is not None and part[0] * part[1] < 150 * 161 / 4 for part in kept[0])
    for mine, full in zip(*found, strict=True):
        assert (mine - full).norm() <= tolerance * full.norm()


class Doubled(KFAC):
    """One of one's own, twice as bold."""

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return [2 * D for D in super().precondition(gradients, damping)]


SOLVERS = {"kfac": KFAC(), "ekfac": EKFAC(), "factored": KFAC("factored"), "newton": KFAC("newton"), "own": Doubled()}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rho", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("kind", ["small", "wide", "decaying"])
def test_directions_for_the_penalised_gradient(name: str, rho: float, kind: str) -> None:
    """-(F + lam I)^{-1} (G + rho F G), made in the eigenbasis at once, is what product and system make one by one;
    with rho lam from next to nothing to far above 1, with a diagonal factor, and where curvature is of every size,
    of which in float32 some is left out."""
    torch.manual_seed(0)
    tolerance = 0.02 if kind == "decaying" else 1e-9
    if kind == "small":
        model, y = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(15, 4)).double(), torch.randint(4, (40,))
        x = torch.randint(7, (40, 3))
    elif kind == "wide":
        model, x, y = wide(torch.float64, rank=9)
    else:
        (model, _, y), x = wide(torch.float32, rank=9), torch.randn(40, 160) * torch.logspace(0, -3, 160)
    method = copy.copy(SOLVERS[name])
    with GRNG(model, "reng", mode="ggn", preconditioner=method, curvature=Curvature(floor=1.0)) as optimizer:
        steps(optimizer, model, x, y, 2)
        stacks = [torch.randn(g.size, g.n_out, g.n_in, dtype=g.dtype) for g in method.groups]
        lam = [1.0 + torch.rand(g.size, 1, 1, dtype=g.dtype) for g in method.groups]
        strength = torch.tensor(rho, dtype=torch.float64)
        method._kept = None  # of the optimizer's own rho
        found = method.precondition_penalised(stacks, lam, strength)
        for D, expected in zip(found, method.precondition(method.penalised(stacks, strength), lam), strict=True):
            assert (D - expected).norm() <= tolerance * expected.norm()


def test_the_penalised_gradient_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the trust region need one, but for the KL clip."""
    calls = []
    product = KFAC.curvature_product
    model, x, y = wide(torch.float32, rank=9)
    with GRNG(model, "reng", mode="ggn") as optimizer:
        method = optimizer._preconditioner
        monkeypatch.setattr(method, "curvature_product", lambda G: calls.append(1) or product(method, G))
        steps(optimizer, model, x, y, 3)
    assert not calls


def test_all_is_kept_where_it_matters() -> None:
    model, _, y = wide(torch.float64, rank=9)
    x = torch.randn(400, 160, dtype=torch.float64)
    with GRNG(model, "kfac", curvature=Curvature(floor=1e-6)) as optimizer:
        steps(optimizer, model, x, y.repeat(10), 3)
        assert optimizer._preconditioner._kept == [None, None]


def test_small_matrices_are_not_looked_at() -> None:
    model, x = nn.Linear(8, 4), torch.randn(12, 8)
    with GRNG(model, "ekfac") as optimizer:
        steps(optimizer, model, x, torch.randint(4, (12,)), 3)
        assert isinstance(optimizer._preconditioner, EKFAC)
        assert optimizer._preconditioner._kept == [None]


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 7, 5)])
def test_leading_holds_everything_above(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for _ in range(50):
        s = torch.rand(shape) * torch.logspace(-6, 0, shape[1]).view(1, -1, 1) * torch.logspace(-6, 0, shape[2])
        least = 10 ** float(-8 * torch.rand(()))
        a, b = leading(s, least).tolist()
        outside = s.clone()
        outside[:, -a:, -b:] = 0
        assert outside.max() <= least
        assert 1 <= a <= shape[1]
        assert 1 <= b <= shape[2]
        if a > 1:
            assert s[:, -a].max() > least
        if b > 1:
            assert s[:, :, -b].max() > least


def test_costs_of_both_orders() -> None:
    assert sandwich_costs(2, 3, 5, 7) == (2 * 3 * 5 + 2 * 5 * 7, 3 * 5 * 7 + 2 * 3 * 7)


@pytest.mark.parametrize(
    ("settings", "sizes", "samples", "period"),
    [
        ({}, (8, 4), 16, 10),  # fixed costs outweigh it
        ({}, (400, 400), 16, 100),  # 4 * 25 (401^2 651 + 400^2 650) against 1e8 + 6 * 16 * 401 * 400: 181 steps
        ({}, (300, 300), 64, 80),
        ({"stats_every": 4}, (400, 400), 16, 40),
        ({"inverse_every": 7}, (400, 400), 16, 7),
    ],
)
def test_decompositions_are_spaced_by_their_cost(
    settings: dict[str, int], sizes: tuple[int, int], samples: int, period: int
) -> None:
    model = nn.Linear(*sizes)
    with GRNG(model, "kfac", curvature=Curvature(**settings)) as optimizer:
        steps(optimizer, model, torch.randn(samples, sizes[0]), torch.randint(sizes[1], (samples,)), 2)
        n, m = sizes[0] + 1, sizes[1]
        if not settings.get("inverse_every"):
            stats = settings.get("stats_every", 10)
            exact = 4 * 25 * (n**2 * (n + 250) + m**2 * (m + 250)) / (1e8 + 6 * samples * n * m)
            period = stats * min(10, max(1, -(-exact // stats)))
        assert optimizer._schedule.period == period


def test_the_period_is_kept_by_a_checkpoint() -> None:
    """A resumed run decomposes when the one that never stopped does, whatever batch it sees first."""
    model, x, y = wide(torch.float64, rank=30)
    twin = copy.deepcopy(model)
    settings = {"curvature": Curvature(stats_every=2, burn_in=2)}
    with GRNG(model, "ring", **settings) as optimizer, GRNG(twin, "ring", **settings) as other:
        steps(optimizer, model, x, y, 7)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer._schedule.period == other._schedule.period > 2
        for part in (slice(0, 3), slice(None), slice(None)):
            for each, net in ((optimizer, model), (other, twin)):
                steps(each, net, x[part], y[part], 4)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["ring", "kalman"])
@pytest.mark.parametrize("engine", ["hooks", "backpack"])
def test_a_weight_penalty_in_the_loss_is_no_miss(variant: str, engine: str) -> None:
    """Its gradient is a multiple of the weights, which no layer sees; everything else that is missed is still found."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(12, 5).double(), torch.randn(12, 3).double()
    with GRNG(model, variant, curvature=Curvature(capture=engine)) as optimizer:  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.zero_grad()
            penalty = 0.05 * sum(p.square().sum() for p in model.parameters() if p.ndim == 2)
            (mse_loss(model(x), y) + penalty).backward()
            optimizer.step()
        assert all(row.verified for row in optimizer.coverage().rows)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with GRNG(model, variant, curvature=Curvature(capture=engine)) as optimizer:  # type: ignore[arg-type]
        (mse_loss(model(x), y) + model[0].weight.abs().sum()).backward()
        with pytest.warns(UserWarning, match="misses the gradient"):
            optimizer.step()


# Sides beyond `max_dim`.


class Wide(nn.Module):
    """An embedding of many words, a convolution and a head; the sides of factors are 6, 3, 6, 6 * 3, 5 and 7 + 1."""

    def __init__(self, classes: int = 5, words: int = 50) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv = nn.Embedding(words, 6), nn.Conv1d(6, 7, 3, bias=False)
        self.head = nn.Linear(7, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.conv(self.words(tokens).mT).tanh().mean(-1))


NAMES = {"words": ["words.weight"], "conv": ["conv.weight"], "head": ["head.weight", "head.bias"]}
LIMITS = {8: ("words", "head"), 18: ("words", "conv", "head"), 7: ("words",), 5: (), None: ("words", "conv", "head")}


@pytest.mark.parametrize("limit", list(LIMITS))
@methods("ring", "ring-newton", "reng-ggn", "kfac", "ekfac")
def test_layers_beyond_the_limit_follow_the_fallback(method: Method, limit: int | None) -> None:
    model, tokens = Wide(), torch.randint(50, (16, 9))
    labels = tokens[:, 0] % 5
    with method(model, fallback_lr=1e-2, curvature=Curvature(max_dim=limit)) as optimizer:
        first = cross_entropy(model(tokens), labels).item()
        steps(optimizer, model, tokens, labels, 12)
        rows = {row.parameter: row for row in optimizer.coverage()}
        shapes = [t.shape for state in optimizer.state.values() for name, t in state.items() if "exp_avg" not in name]
    covered = {name for layer in LIMITS[limit] for name in NAMES[layer]}
    assert {name for name, row in rows.items() if row.treatment != "adamw"} == covered
    assert {row.reason.split(" of")[0] for name, row in rows.items() if name not in covered} <= {"a factor"}
    assert cross_entropy(model(tokens), labels) < 0.9 * first
    if limit is not None:  # none of the square matrices is larger
        assert max([shape[-1] for shape in shapes if len(shape) == 3 and shape[-1] == shape[-2]], default=0) <= limit


def test_a_vocabulary_of_outputs_allocates_nothing_of_its_square() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 100_000))
    with GRNG(model) as optimizer:
        assert max(t.numel() for state in optimizer.state.values() for t in state.values()) <= 9 * 9
        (row,) = [row for row in optimizer.coverage() if row.parameter == "2.weight"]
    assert (row.treatment, row.reason) == ("adamw", "a factor of 100000 x 100000 is beyond max_dim=8192")


@pytest.mark.parametrize(("name", "limit"), [("kalman-vd", 5), ("kalman-kron", 7), ("kalman-kron", None)])
def test_the_filter_takes_a_diagonal_beyond_the_limit(name: str, limit: int | None) -> None:
    model, tokens = Wide(), torch.randint(50, (16, 9))
    with METHODS[name](model, curvature=Curvature(max_dim=limit)) as optimizer:
        first = cross_entropy(model(tokens), tokens[:, 0] % 5).item()
        steps(optimizer, model, tokens, tokens[:, 0] % 5, 8)
        rows = {row.parameter: row for row in optimizer.coverage()}
        structured = {n for n, p in model.named_parameters() if optimizer.state[p].get("P_in", torch.empty(0)).numel()}
        assert cross_entropy(model(tokens), tokens[:, 0] % 5) < first
    assert {row.treatment for row in rows.values()} == {"kalman"}
    assert structured == ({"conv.weight", "head.weight"} if (name, limit) == ("kalman-kron", None) else set())
    said = {n for n, row in rows.items() if "diagonal: a factor of" in row.reason}
    assert said == ({"conv.weight", "head.weight", "head.bias"} if (name, limit) == ("kalman-kron", 7) else set())
