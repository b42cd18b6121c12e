"""The sampled Fisher: its expectation is taken exactly, over every combination of labels that the model could draw."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from grng.kernels import DenseColumns, by_group, gain, squared_gradients
from torch import Tensor
from torch.func import grad, jacrev

from .reference import damped_step, flat, forward, labelled, layer_moments, model, relative, summed, weights_of

# samples, classes, hidden layers
CASES = pytest.mark.parametrize(("B", "C", "hidden"), [(1, 5, ()), (3, 3, (4,)), (4, 2, (3, 3))])


def columns(weights: list[Tensor], x: Tensor, y: Tensor, groups: int, offset: int = 0) -> list[Tensor]:
    """V^T (m rows), one block a layer."""
    moments = layer_moments(weights, x, labelled(y))
    return [grouped(h[None, :, None], e[None, :, None], groups, offset) for h, e in moments]


def grouped(x: Tensor, e: Tensor, groups: int, offset: int = 0) -> Tensor:
    """V^T (groups rows) of one layer."""
    return DenseColumns(by_group(x, groups, offset), by_group(e, groups, offset)).dense().flatten(1)


def draws(weights: list[Tensor], x: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Every combination of labels with its probability under the model."""
    p = forward(weights, x)[0].softmax(1)
    for labels in product(range(p.shape[1]), repeat=len(x)):
        y = torch.tensor(labels)
        yield p.gather(1, y[:, None]).prod().item(), y


def fisher(weights: list[Tensor], x: Tensor) -> Tensor:
    """J^T S J, which no label enters."""
    return summed(model(weights, x), flat(weights), labelled(torch.zeros(len(x), dtype=torch.long)))[1]


@CASES
def test_T22_expected_score_is_zero(B: int, C: int, hidden: tuple[int, ...]) -> None:
    """T22: under the model E g = 0 and E ||g||^2 = tr F/B whatever the labels, so lam needs the data's gradient."""
    weights, x = weights_of(4, *hidden, C), torch.randn(B, 4)
    score, square = torch.zeros_like(flat(weights)), torch.zeros(())
    for probability, y in draws(weights, x):
        g = torch.cat(columns(weights, x, y, groups=1), 1)[0] / B
        score += probability * g
        square += probability * g.square().sum()
    trace = fisher(weights, x).trace() / B
    assert score.abs().max() < 1e-10
    assert square.item() == pytest.approx(trace.item() / B, rel=1e-10)


@CASES
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_T18_sampled_columns_are_unbiased(B: int, C: int, hidden: tuple[int, ...], groups: int) -> None:
    """T18: E V V^T == sum_i J_i^T S_i J_i for V of one column a sample (m >= B) and for sums over groups of samples."""
    weights, x = weights_of(4, *hidden, C), torch.randn(B, 4)
    mean = torch.zeros(flat(weights).numel(), flat(weights).numel())
    for probability, y in draws(weights, x):
        V = torch.cat(columns(weights, x, y, groups), 1)
        mean += probability * V.T @ V
    assert relative(mean, fisher(weights, x)) < 1e-10


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("positions", [1, 3])
def test_T18_shared_weights(positions: int, groups: int) -> None:
    """T18: the same where a sample sums over positions, f = sum_t tanh(W x_t); so do the squared scores."""
    B, C, n = 3, 2, 4
    x, W = torch.randn(B, positions, n), torch.randn(C, n)

    def f(theta: Tensor) -> Tensor:
        return (x @ theta.view(C, n).T).tanh().sum(1)

    theta = W.flatten()
    J = jacrev(f)(theta)
    mean = torch.zeros(C * n, C * n)
    for labels in product(range(C), repeat=B):
        y = torch.tensor(labels)
        z = (x @ W.T).requires_grad_()
        (e,) = torch.autograd.grad(labelled(y)(z.tanh().sum(1)), z)
        V = grouped(x[None], e[None], groups)
        mean += f(theta).softmax(1).gather(1, y[:, None]).prod() * V.T @ V
        scores = torch.einsum("bci,bc->bi", J, grad(labelled(y))(f(theta)))
        assert relative(squared_gradients(x[None], e[None]).flatten(), scores.square().sum(0)) < 1e-10
    assert relative(mean, summed(f, theta, labelled(torch.zeros(B, dtype=torch.long)))[1]) < 1e-10


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize(("B", "C"), [(3, 2), (8, 5)])
def test_T18_woodbury_sampled(B: int, C: int, groups: int, offset: int) -> None:
    """T18: one m x m system over all layers == -(q^{-1} + V V^T)^{-1} gs for a sampled V."""
    weights, x, y = weights_of(4, 5, C), torch.randn(B, 4), torch.randint(C, (B,))
    drawn = torch.multinomial(forward(weights, x)[0].softmax(1), 1).squeeze(1)
    V = columns(weights, x, drawn, groups, offset)
    gs = summed(model(weights, x), flat(weights), labelled(y))[0]
    q = [0.1 + torch.rand(W.numel()) for W in weights]
    g = gs.split([W.numel() for W in weights])
    grams, projected = zip(*[((v * a) @ v.T, v @ (a * b)) for v, a, b in zip(V, q, g, strict=True)], strict=True)
    z, _ = gain(sum(grams), sum(projected))  # type: ignore[arg-type]
    D = [a * (z @ v - b) for v, a, b in zip(V, q, g, strict=True)]

    scores = torch.stack([summed(model(weights, x[[i]]), flat(weights), labelled(drawn[[i]]))[0] for i in range(B)])
    dense = torch.zeros(groups, scores.shape[1])
    dense.index_add_(0, (offset + torch.arange(B)) % groups, scores)
    assert relative(torch.cat(V, 1), dense) < 1e-10
    assert relative(torch.cat(D), damped_step(torch.diag(1 / torch.cat(q)) + dense.T @ dense, 0, gs)) < 1e-10
