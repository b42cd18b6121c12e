"""Dense counterparts, by automatic differentiation and single unbatched solves; no kernel is used here.

A network is a list of matrices W (out, in + 1) with the bias as last column and tanh in between; theta is their
concatenation, row by row. A loss maps the outputs (B, C) to the sum over the samples.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor], Tensor]


def weights_of(*sizes: int) -> list[Tensor]:
    return [torch.randn(n_out, n_in + 1) / n_in**0.5 for n_in, n_out in pairwise(sizes)]


def flat(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([W.flatten() for W in weights])


def unflat(theta: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = theta.split([W.numel() for W in like])
    return [part.view_as(W) for part, W in zip(parts, like, strict=True)]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def forward(weights: Sequence[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs, and per layer the inputs (with their 1) and the outputs before tanh."""
    inputs, outputs = [], []
    for W in weights:
        inputs.append(with_one(x))
        outputs.append(inputs[-1] @ W.T)
        x = outputs[-1].tanh()
    return outputs[-1], inputs, outputs


def model(weights: Sequence[Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """theta -> outputs (B, C) on the batch x."""
    return lambda theta: forward(unflat(theta, weights), x)[0]


def labelled(y: Tensor) -> Loss:
    return lambda out: cross_entropy(out, y, reduction="sum")


def squared(y: Tensor, variance: float = 1.0) -> Loss:
    return lambda out: (out - y).square().sum() / (2 * variance)


def parts(f: Callable[[Tensor], Tensor], theta: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """J (B, C, d), S (B, C, C) and e (B, C): derivatives of the outputs by theta, of the loss by the outputs."""
    out = f(theta)
    return jacrev(f)(theta), torch.einsum("bcbk->bck", hessian(loss)(out)), -grad(loss)(out)


def summed(f: Callable[[Tensor], Tensor], theta: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The summed gradient -J^T e and the summed Fisher J^T S J of a batch."""
    J, S, _ = parts(f, theta, loss)
    return grad(lambda t: loss(f(t)))(theta), torch.einsum("bci,bck,bkj->ij", J, S, J)


def damped_step(F: Tensor, lam: float | Tensor, g: Tensor) -> Tensor:
    """-(F + lam I)^{-1} g."""
    return -torch.linalg.solve(F + lam * torch.eye(len(g)), g)


def layer_moments(weights: Sequence[Tensor], x: Tensor, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """Per layer the inputs (B, n_in + 1) and the gradients e (B, n_out) of the per-sample loss."""
    leaves = [W.detach().requires_grad_() for W in weights]
    out, inputs, outputs = forward(leaves, x)
    return [(h.detach(), e) for h, e in zip(inputs, torch.autograd.grad(loss(out), outputs), strict=True)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
