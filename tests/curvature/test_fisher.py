"""The Fisher: exact, sampled and empirical factors against dense blocks by automatic differentiation.

Lambda (x) Gamma is exact for a layer where inputs and output gradients factor: the Jacobian from the layer to the
outputs is the same for all rows (a linear network), and so is the curvature S at the outputs. S of a squared error is
constant; that of cross-entropy depends on the prediction, so that it takes one row, or rows with equal predictions.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from grng import GRNG, Curvature

from .harness import ENGINES, Measured, measure
from .reference import ggn_block, jacobian, kronecker, relative, sample_gradients

BATCHES = pytest.mark.parametrize("B", [1, 3, 8])
ENGINE = pytest.mark.parametrize("engine", ENGINES)
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
Loss = Callable[[Tensor], Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]  # Lambda and Gamma by layer


class Mean(nn.Module):
    """Mean over the middle dimensions: (B, ..., n) -> (B, n)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(1, -2).mean(1)


class ChannelsLast(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.movedim(1, -1)


def loss_for(likelihood: str, f: Tensor, reduction: str = "mean") -> Loss:
    """A loss with labels that do not depend on the batch before them; classes last, any dimensions before."""
    if likelihood == "gaussian":
        y = torch.randn(f.shape)
        return lambda f: mse_loss(f, y, reduction=reduction)
    if likelihood == "bernoulli":
        y = torch.randint(2, f.shape).to(f)
        return lambda f: binary_cross_entropy_with_logits(f, y, reduction=reduction)
    y = torch.randint(f.shape[-1], f.shape[:-1]).flatten()
    return lambda f: cross_entropy(f.flatten(0, -2), y, reduction=reduction)


def with_parameters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_children() if list(module.parameters())]


def factors(model: nn.Module, x: Any, loss: Callable[[Any], Tensor], **settings: Any) -> Factors:
    """(Lambda, Gamma) per layer after one step of the optimizer itself."""
    with GRNG(model, variant="kfac", lr=0.0, curvature=Curvature(**settings)) as optimizer:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
        kfac = optimizer._preconditioner
        return {layer.name: (kfac.Lambda.of(layer), kfac.Gamma.of(layer)) for layer in optimizer._layers}


def all_close(a: Factors, b: Factors, limit: float = 1e-12) -> bool:
    assert a.keys() == b.keys()
    return all(relative(p, q) < limit for name in a for p, q in zip(a[name], b[name], strict=True))


# Deep linear networks with one position a sample: model, input without its batch.
LINEAR = {
    "one layer": (lambda: nn.Sequential(nn.Linear(6, 3)), (6,)),
    "three layers": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), (6,)),
    "without bias": (lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=False)), (6,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 2)), nn.Flatten(), nn.Linear(4, 3)), (2, 3, 2)),
    "conv, stride": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 4, stride=3, dilation=2), nn.Flatten(), nn.Linear(2, 3)),
        (2, 8),
    ),
}


def alike(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs with the predictions of the first: they differ in the null space of the (linear) model."""
    J = jacrev(lambda v: model(v[None])[0])(x[0]).flatten(1)
    null = torch.linalg.svd(J)[2][J.shape[0] :]
    return (x[0] + (torch.randn(len(x), len(null)) @ null).view_as(x)).detach()


@BATCHES
@ENGINE
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", LINEAR)
def test_kfac_is_the_ggn_block_of_a_linear_net(net: str, likelihood: str, engine: str, B: int) -> None:
    build, shape = LINEAR[net]
    model = build()
    x = torch.randn(B, *shape)
    if likelihood != "gaussian":
        x = alike(model, x)
    loss = loss_for(likelihood, model(x))
    blocks = {name: ggn_block(model, name, x, loss) for name in with_parameters(model)}
    found = factors(model, x, loss, fisher="exact", capture=engine)
    assert found.keys() == blocks.keys()
    for name, block in blocks.items():
        assert relative(kronecker(*found[name]), block) < 1e-12


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("B", [3, 8])
def test_kfac_is_not_exact_where_predictions_differ(likelihood: str, B: int) -> None:
    """The control of the test above, and why it makes the predictions equal."""
    build, shape = LINEAR["three layers"]
    model, x = build(), torch.randn(B, *shape)
    loss = loss_for(likelihood, model(x))
    block = ggn_block(model, "0", x, loss)
    assert relative(kronecker(*factors(model, x, loss, fisher="exact")["0"]), block) > 1e-4


# Normalisations of four channels in nonlinear networks, first and within: model, input without its batch.
NORMS = {
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
    "layer norm on positions": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), Mean(), nn.Linear(4, 3)), (3, 4)),
    "layer norm, a prediction a position": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)), (3, 4)),
    "RMS norm": (lambda: nn.Sequential(nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)),
        (2, 3, 2),
    ),
    "batch norm, settled": (lambda: nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Linear(4, 3)), (4,)),
}


@BATCHES
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", NORMS)
def test_scale_and_shift_have_the_exact_block(net: str, likelihood: str, B: int) -> None:
    """Channel by channel the Gauss-Newton matrix of (scale, shift), whatever the predictions and the network."""
    build, shape = NORMS[net]
    model, x = build(), torch.randn(B, *shape)
    loss = loss_for(likelihood, model(x))
    found = factors(model, x, loss, fisher="exact", capture="hooks")
    name = next(n for n, m in model.named_modules() if "Norm" in type(m).__name__)
    block = ggn_block(model, name, x, loss)[:, 0, :, :, 0, :]
    own = torch.stack([block[c, :, c] for c in range(4)])
    Lambda, Gamma = found[name]
    assert relative(Lambda * Gamma, own) < 1e-12


# Linear networks with shared weights: model, input without its batch, how sharing is treated where it is exact.
SHARED = {
    "a prediction a position": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (4, 6), "expand"),
    "positions on a grid": (lambda: nn.Sequential(nn.Linear(6, 3)), (2, 3, 6), "expand"),
    "1x1 convolutions": (
        lambda: nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 3, 1), ChannelsLast()),
        (6, 2, 3),
        "expand",
    ),
    "mean over positions": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), Mean(), nn.Linear(4, 3)),
        (4, 6),
        "reduce",
    ),
    "mean of a convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), ChannelsLast(), Mean(), nn.Linear(4, 3)),
        (2, 4, 3),
        "reduce",
    ),
}


@BATCHES
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", SHARED)
def test_shared_weights_are_exact_in_their_setting(net: str, likelihood: str, B: int) -> None:
    build, shape, sharing = SHARED[net]
    model, x = build(), torch.randn(B, *shape)
    if likelihood != "gaussian":  # equal predictions: the same vectors at every position of every sample
        axis = 1 if "conv" in net else -1
        x = x.select(0, 0).unsqueeze(0).expand_as(x) if sharing == "reduce" else x.movedim(axis, -1)
        if sharing == "expand":
            x = x.flatten(0, -2)[0].expand_as(x).movedim(-1, axis)
        x = x.clone()
    loss = loss_for(likelihood, model(x))
    names = with_parameters(model)
    blocks = {name: ggn_block(model, name, x, loss) for name in names}
    found = factors(model, x, loss, fisher="exact", sharing=sharing)
    for name in names:
        assert relative(kronecker(*found[name]), blocks[name]) < 1e-12
    if likelihood == "gaussian" and sharing == "reduce":  # the control
        other = factors(model, x, loss, fisher="exact", sharing="expand")
        assert relative(kronecker(*other[names[0]]), blocks[names[0]]) > 1e-3


# Networks of any kind: model, input of a batch.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 3)),
        lambda B: torch.randn(B, 4),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.AvgPool2d(2),
            nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3),
        ),
        lambda B: torch.randn(B, 2, 4, 6),
    ),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda B: torch.randn(B, 3, 4)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        lambda B: torch.randint(7, (B, 3)),
    ),
}  # fmt: skip


@BATCHES
@ENGINE
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", NETS)
def test_squared_gradients_are_the_ggn_diagonal(net: str, likelihood: str, engine: str, B: int) -> None:
    """Per-sample quantities are exact for every network: sum over outputs and positions of squared scores."""
    model, x = NETS[net][0](), NETS[net][1](B)
    loss = loss_for(likelihood, model(x))
    seen = measure(model, x, loss, engine, fisher="exact")
    f = model(x).detach()
    H = hessian(loss)(f).reshape(f.numel(), f.numel())
    for name in seen.layers:
        J = jacobian(model, name, x).flatten(0, f.ndim - 1)
        diagonal = torch.einsum("akoi,ab,bkoi->koi", J, H, J)
        assert relative(seen.total(name, "squared_gradients") / seen.batch.predictions, diagonal) < 1e-11


@BATCHES
@ENGINE
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("net", NETS)
def test_empirical_is_made_of_the_true_gradients(
    net: str, likelihood: str, reduction: str, engine: str, B: int
) -> None:
    model, x = NETS[net][0](), NETS[net][1](B)
    f = model(x).detach()
    y = torch.randint(2, f.shape).to(f) if likelihood == "bernoulli" else torch.randint(3, f.shape[:-1])

    def per_sample(f: Tensor, y: Tensor) -> Tensor:
        if likelihood == "bernoulli":
            return binary_cross_entropy_with_logits(f, y, reduction="sum")
        return -f.log_softmax(-1).gather(-1, y[..., None]).sum()

    scale = 1.0 if reduction == "sum" else 1 / (y.numel())
    seen = measure(model, x, lambda f: scale * per_sample(f, y), engine, fisher="empirical")
    assert seen.batch.predictions == y.numel()
    assert {name for name, _ in seen.uses} == seen.layers.keys()
    for name in seen.layers:
        scores = sample_gradients(model, name, x, y, per_sample)
        assert relative(seen.total(name, "squared_gradients"), scores.square().sum(0)) < 1e-11
        assert relative(seen.total(name, "columns", B), scores) < 1e-11


@ENGINE
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", NETS)
def test_sampled_converges_to_exact(net: str, likelihood: str, engine: str) -> None:
    """Factors of many draws agree with the expectation within five standard errors, everywhere."""
    model, x = NETS[net][0](), NETS[net][1](3)
    loss = loss_for(likelihood, model(x))
    exact = measure(model, x, loss, fisher="exact")
    draws = [
        measure(model, x, loss, engine, fisher="mc", seed=seed) for seed in range(100 if engine == "hooks" else 30)
    ]
    for name in exact.layers:
        for what in ("output_sum", "squared_gradients"):
            found = torch.stack([d.total(name, what) for d in draws])
            error = found.std(0) / len(draws) ** 0.5
            deviation = (found.mean(0) - exact.total(name, what)).abs()
            assert (deviation <= 5 * error + 1e-12).all()
            assert error.max() > 1e-6  # there is something to draw
        torch.testing.assert_close(mean_input(draws[0], name), mean_input(exact, name))


def mean_input(seen: Measured, name: str) -> Tensor:
    total = seen.total(name, "input_sum")
    return total / seen.total(name, "rows").view(-1, *[1] * (total.ndim - 1))


@BATCHES
@ENGINE
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("classes_second", [False, True], ids=["(B, T, C)", "(B, C, T)"])
def test_padding_does_not_count(classes_second: bool, fisher: str, engine: str, B: int) -> None:
    """Tokens with the label -100: statistics equal those of the other tokens alone."""
    model, x = NETS["positions"][0](), torch.randn(B, 5, 4)
    if classes_second:
        model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Tanh(), nn.Conv1d(5, 3, 1))
        x = x.mT
    y = torch.randint(3, (B, 5))
    y[torch.rand(B, 5) < 0.4] = -100
    y[0, 0] = 1

    def loss(f: Tensor) -> Tensor:
        return cross_entropy(f if classes_second else f.mT, y, ignore_index=-100)

    seen = measure(model, x, loss, engine, fisher=fisher)
    kept = y != -100
    tokens = x.movedim(1, -1)[kept] if classes_second else x[kept]
    tokens = tokens[..., None] if classes_second else tokens
    alone = measure(model, tokens, lambda f: cross_entropy(f.squeeze(-1), y[kept]), fisher=fisher)
    assert seen.batch.predictions == alone.batch.predictions == kept.sum()
    for name in seen.layers:
        torch.testing.assert_close(mean_input(seen, name), mean_input(alone, name))
        torch.testing.assert_close(seen.total(name, "output_sum"), alone.total(name, "output_sum"))
        assert torch.equal(seen.total(name, "rows"), alone.total(name, "rows"))


@ENGINE
def test_sampled_labels_leave_padding_out(engine: str) -> None:
    model, x, y = NETS["positions"][0](), torch.randn(8, 5, 4), torch.randint(3, (8, 5))
    y[torch.rand(8, 5) < 0.4] = -100
    seen = measure(model, x, lambda f: cross_entropy(f.mT, y), engine, fisher="mc")
    for _, statistics in seen.uses:
        assert torch.equal((statistics.e[0] != 0).any(-1), y != -100)
        assert statistics.rows.item() == (y != -100).sum()


class Out(nn.Module):
    """A network that hands its output over in some form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form, self.first, self.last = form, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.form(self.last(self.first(x).tanh()))


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda f: f, lambda out: out),
    "tuple": (lambda f: (f, f.detach()), lambda out: out[0]),
    "list after what has no graph": (lambda f: [f.detach(), None, f], lambda out: out[2]),
    "nested": (lambda f: ({"aside": 1}, (f,)), lambda out: out[1][0]),
    "dict": (lambda f: {"step": 3, "scores": f}, lambda out: out["scores"]),
    "dict with logits": (lambda f: {"hidden": f * 2, "logits": f}, lambda out: out["logits"]),
    "object": (lambda f: SimpleNamespace(loss=None, logits=f), lambda out: out.logits),
    "classes second": (lambda f: f.movedim(-1, 1), lambda out: out.movedim(1, -1)),
    "a view": (lambda f: f.unsqueeze(0).squeeze(0), lambda out: out),
    "log-probabilities": (lambda f: f.log_softmax(-1), lambda out: out),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
def test_every_form_of_output_gives_the_same_factors(positions: tuple[int, ...], fisher: str, form: str) -> None:
    make, read = FORMS[form]
    plain, model = Out(lambda f: f), Out(make)
    model.load_state_dict(plain.state_dict())
    x, y = torch.randn(6, *positions, 4), torch.randint(3, (6, *positions)).flatten()
    loss = lambda f: cross_entropy(f.flatten(0, -2), y)  # noqa: E731
    expected = factors(plain, x, loss, fisher=fisher, capture="hooks")
    assert all_close(factors(model, x, lambda out: loss(read(out)), fisher=fisher), expected)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "summed": lambda each: each.sum(),
    "times 1024": lambda each: 1024 * each.mean(),
    "divided by something": lambda each: each.sum() / 17,
}


@ENGINE
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("net", ["mlp", "positions"])
def test_the_scale_of_the_loss_does_not_enter(net: str, scale: str, likelihood: str, fisher: str, engine: str) -> None:
    """The same factors to 1e-12 whatever the reduction; a squared error has to be told its scale."""
    model, x = NETS[net][0](), NETS[net][1](6)
    f = model(x)
    each = loss_for(likelihood, f, "none")
    settings: dict[str, Any] = {"fisher": fisher, "capture": engine}
    expected = factors(model, x, lambda f: each(f).mean(), **settings)
    if likelihood == "gaussian":
        settings |= {"likelihood": "gaussian"}
        settings["loss_scale"] = {"summed": "sum", "times 1024": 1024.0, "divided by something": f.numel() / 17}[scale]
    assert all_close(factors(model, x, lambda f: SCALES[scale](each(f)), **settings), expected)
