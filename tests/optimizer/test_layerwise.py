"""Damping by each layer's own curvature, and a trust region of every layer's own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature
from grng.preconditioners import KFAC, Preconditioner

from .cases import METHODS, Root, displacement, mlp, relative, settings, stream, tensors_of, train, vector
from .test_first_step import DENSE, as_vector, kron, measure

KNOWN = [name for name in DENSE if name != "ring-identity"]  # methods that know the curvature of a layer


@pytest.mark.parametrize("B", [7, 24])
@pytest.mark.parametrize("name", KNOWN)
def test_damping_by_layer(name: str, B: int) -> None:
    """lam_l = lam S_l / S in the dense formula of every method."""
    x, y = stream(1, B, 5)[0]
    x = 3 * x
    model = mlp(5, 4, 3)
    formula, tolerance, _ = DENSE[name]
    blocks = measure(model, x, y, "exact")
    tops = {
        "ring-diagonal": [b.squares.max() for b in blocks],
        "ekfac": [b.squares_in(*(torch.linalg.eigh(m)[1] for m in (b.Gamma, b.Lambda))).max() for b in blocks],
        "ring-factored": [b.Gamma.trace() * b.Lambda.trace() for b in blocks],
        "ring-newton": [b.Gamma.trace() * b.Lambda.trace() for b in blocks],
    }.get(name, [torch.linalg.matrix_norm(kron(b), 2) for b in blocks])
    given = settings(fisher="exact", relative_to="layer")
    with METHODS[name](model, lr=0.3, momentum=0.0, curvature=given) as optimizer:
        moved = displacement(model, lambda: train(optimizer, model, [(x, y)]))
        lam = optimizer.diagnostics["lam"]  # of the first layer
    lams = [lam * top / tops[0] for top in tops]
    assert not 0.8 < lams[1] / lams[0] < 1.25, "the layers differ"
    expected = as_vector([0.3 * formula(b, b.gradient, own) for b, own in zip(blocks, lams, strict=True)])
    assert relative(moved, expected) < tolerance


class Grouped(nn.Module):
    """A grouped convolution, which is several matrices of one layer, and a classifier that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv1d(4, 6, 3, groups=2), nn.Linear(18, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(1) + 1)


@pytest.mark.parametrize("momenta", [(0.0, 0.0), (0.9, 0.9), (0.5, 0.8)])
@pytest.mark.parametrize("eta", [1e-3, 0.3, 1e9])
@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac", "diagonal", "identity"])
@pytest.mark.parametrize("B", [6, 20])
def test_a_step_within_reach(preconditioner: str, eta: float, momenta: tuple[float, float], B: int) -> None:
    """nu_l = min(1, eta (1 - mu) max(||W_l||, 0.1 sqrt(n_out)) / ||D_l||), weight and bias of all groups of a layer
    together."""
    x = torch.randn(B, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    y = torch.arange(B) % 3

    def moves(step_clip: float | None) -> list[list[Tensor]]:
        model = Grouped()
        # Nearly at zero: from zero itself nothing would reach the convolution.
        with torch.no_grad():
            model.head.weight[0, 0] = 1e-3
        curvature = settings(fisher="exact", step_clip=step_clip)
        layers = [list(layer.parameters()) for layer in (model.conv, model.head)]
        before = [[p.detach().clone() for p in layer] for layer in layers]
        params = [
            {"params": list(layer.parameters()), "momentum": mu}
            for layer, mu in zip((model.conv, model.head), momenta, strict=True)
        ]
        given: dict[str, Any] = {"params": params, "preconditioner": preconditioner, "curvature": curvature}
        with GRNG(model, "kfac", lr=0.5, **given) as optimizer:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        return [[p.detach() - b for p, b in zip(*pair, strict=True)] for pair in zip(layers, before, strict=True)]

    start = Grouped()
    sizes = [float(torch.cat([p.detach().flatten() for p in start.conv.parameters()]).norm()), 0.1 * 3**0.5]
    assert sizes[0] > 0.1 * 3**0.5, "a group has three outputs"
    for free, found, size, mu in zip(moves(None), moves(eta), sizes, momenta, strict=True):
        length = float(torch.cat([part.flatten() for part in free]).norm()) / 0.5
        assert length > 0
        nu = min(1.0, eta * (1 - mu) * size / length)
        for a, b in zip(free, found, strict=True):
            assert torch.allclose(b, nu * a, rtol=1e-9, atol=0)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("preconditioner", ["kfac", "identity"])
@pytest.mark.parametrize("factor", [0.25, 2.0, 10.0])
def test_the_reach_grows_with_the_weights_up_to_three_times(factor: float, preconditioner: str, resumed: bool) -> None:
    """eta min(||W_l||, 3 ||W_l^0||), W^0 being what the first step found, also after a checkpoint."""
    model, eta, lr = mlp(5, 4, 3), 1e-3, 0.5
    given: dict[str, Any] = {"lr": lr, "momentum": 0.0, "preconditioner": preconditioner}
    given["curvature"] = settings(fisher="exact", step_clip=eta)

    def sizes() -> list[Tensor]:
        return [torch.cat([p.detach().flatten() for p in layer.parameters()]).norm() for layer in (model[0], model[2])]

    def moved(optimizer: GRNG) -> list[float]:
        before = [p.detach().clone() for p in model.parameters()]
        train(optimizer, model, stream(1, 12, 5))
        parts = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
        return [float(torch.cat(pair).norm()) for pair in (parts[:2], parts[2:])]

    optimizer = GRNG(model, "kfac", **given)
    start = sizes()
    assert moved(optimizer) == pytest.approx([lr * eta * float(size) for size in start], rel=1e-9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    if resumed:
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.close()
        optimizer = GRNG(model, "kfac", **given)
        optimizer.load_state_dict(saved)
    expected = [lr * eta * min(float(now), 3 * float(first)) for now, first in zip(sizes(), start, strict=True)]
    assert moved(optimizer) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("variant", ["ring", "kfac", "ekfac"])
def test_noise_does_not_undo_what_was_learnt(variant: str) -> None:
    """At defaults: no schedule, no decay, small batches, some labels wrong. Steps are mostly noise then, and lengthen
    weights; a trust region that grew with them all the way ended at 34 % here, after 84 %."""
    generator = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(1024, 16, generator=generator), torch.randn(16, 4, generator=generator)
    y = (x.tanh() @ teacher).argmax(1)
    wrong = torch.rand(1024, generator=generator) < 0.1
    labels = torch.where(wrong, torch.randint(4, (1024,), generator=generator), y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    start = model[2].weight.norm().item()
    with GRNG(model, variant) as optimizer:
        for _ in range(1500):
            chosen = torch.randint(1024, (16,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), labels[chosen]).backward()
            optimizer.step()
    assert model[2].weight.norm().item() < 15 * start
    assert (model(x).argmax(1) == y).double().mean().item() > 0.75


@pytest.mark.parametrize("name", ["ring", "ekfac", "reng-ggn"])
def test_resumed(name: str) -> None:
    """To the bit, also between two refreshes."""
    curvature = Curvature(relative_to="layer", step_clip=0.02, stats_every=3, burn_in=1)
    batches = stream(8, 12, 5)
    straight, resumed = mlp(5, 4, 3), mlp(5, 4, 3)
    with METHODS[name](straight, curvature=curvature) as optimizer:
        train(optimizer, straight, batches[:5])
        saved, weights = copy.deepcopy((optimizer.state_dict(), straight.state_dict()))
        train(optimizer, straight, batches[5:])
        expected = tensors_of(optimizer)
    resumed.load_state_dict(weights)
    with METHODS[name](resumed, curvature=curvature) as optimizer:
        optimizer.load_state_dict(saved)
        train(optimizer, resumed, batches[5:])
        found = tensors_of(optimizer)
    assert torch.equal(vector(straight), vector(resumed))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("which", ["kalman", "identity", "of one's own"])
def test_without_a_known_curvature_it_is_refused(which: str) -> None:
    given: dict[str, Any] = {"preconditioner": {"identity": "identity", "of one's own": Root()}.get(which)}
    if which == "kalman":
        given = {}
    with pytest.raises(ValueError, match=r"relative_to must be 'model' with preconditioner .*knows no curvature"):
        GRNG(mlp(4, 3), "kalman" if which == "kalman" else "kfac", curvature=Curvature(relative_to="layer"), **given)


def test_scales_are_the_largest_eigenvalues() -> None:
    model, (x, y) = mlp(5, 4, 3), stream(1, 12, 5)[0]
    blocks = measure(model, x, y, "exact")
    with METHODS["kfac"](model, curvature=settings(fisher="exact")) as optimizer:
        train(optimizer, model, [(x, y)])
        method = optimizer._preconditioner
        assert isinstance(method, KFAC)
        found = sorted(float(v) for scale in method.scales() for v in scale.flatten())
        assert method.largest_curvature().item() == pytest.approx(max(found), rel=1e-12)
    assert found == pytest.approx(sorted(torch.linalg.matrix_norm(kron(b), 2).item() for b in blocks), rel=1e-9)
    assert Preconditioner.scales is not KFAC.scales


def test_deep_and_narrow() -> None:
    """A deep tanh autoencoder, whose layers' curvatures are orders of magnitude apart: under one damping and one trust
    region most of it does not move."""

    def loss_after(**given: Any) -> float:
        torch.manual_seed(0)
        sizes = (40, 60, 30, 8, 3, 8, 30, 60, 40)
        model = mlp(*sizes, dtype=torch.float32)
        x = torch.randn(256, 3) @ torch.randn(3, 40)
        y = (x > 0).float()
        with GRNG(model, "kfac", **given) as opt:
            for _ in range(60):
                opt.zero_grad()
                loss = nn.functional.binary_cross_entropy_with_logits(model(y), y)
                loss.backward()
                opt.step()
        return loss.item()

    assert loss_after() < 0.7 * loss_after(lr=0.1, curvature=Curvature(relative_to="model", kl_clip=1e-3))


Settings = dict[str, Any]
# variant, what is given, and what follows: kl_clip, step_clip, relative_to
RESOLVED: list[tuple[str, Settings, Settings, tuple[float | None, float | None, str]]] = [
    *((name, {}, {}, (None, 0.2, "layer")) for name in ("ring", "reng", "kfac", "ekfac")),
    ("kalman", {}, {}, (None, None, "model")),
    ("kfac", {"kl_clip": 1e-3}, {}, (1e-3, None, "layer")),
    ("kfac", {"kl_clip": None}, {}, (None, None, "layer")),
    ("kfac", {"step_clip": 0.1}, {}, (None, 0.1, "layer")),
    ("kfac", {"step_clip": None}, {}, (None, None, "layer")),
    ("kfac", {"step_clip": 0.1, "kl_clip": 0.2}, {}, (0.2, 0.1, "layer")),
    ("kalman", {"step_clip": 0.1}, {}, (None, 0.1, "model")),
    # A damping of the whole model is one where it is a number.
    ("ekfac", {"damping": 0.1}, {}, (None, 0.2, "model")),
    ("ekfac", {"damping": 0.1, "relative_to": "layer"}, {}, (None, 0.2, "layer")),
    ("ring", {}, {"rho": 0.1}, (None, 0.2, "model")),
    ("ring", {}, {"rho": 0.0}, (None, 0.2, "layer")),
    ("reng", {}, {"rho": 0.1, "mode": "ggn"}, (None, 0.2, "layer")),  # it does not damp
    ("ring", {"relative_to": "model"}, {}, (None, 0.2, "model")),
    ("ring", {}, {"preconditioner": "identity"}, (None, 0.2, "model")),
    ("ring", {}, {"preconditioner": Root()}, (None, 0.2, "model")),
    ("ring", {}, {"preconditioner": "diagonal"}, (None, 0.2, "layer")),
]


@pytest.mark.parametrize(("variant", "curvature", "given", "expected"), RESOLVED)
def test_what_auto_means(variant: str, curvature: Settings, given: Settings, expected: tuple[Any, Any, str]) -> None:
    with GRNG(mlp(4, 3), variant, curvature=Curvature(**curvature), **given) as optimizer:
        assert (optimizer._region.kl_clip, optimizer._region.step_clip, optimizer._curvature.relative_to) == expected
