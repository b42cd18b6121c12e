"""Brute force: Jacobians, per-sample gradients and curvature blocks by automatic differentiation, nothing of GRNG's.

A layer's parameters are seen as k matrices (n_out, n_in), the bias as a last column; an embedding is transposed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

Loss = Callable[[Tensor], Tensor]  # outputs -> a number


def matrices(module: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """(..., k, n_out, n_in) from tensors that end in the shapes of the module's own parameters of those names."""
    k = getattr(module, "groups", 1)
    parts = []
    if "weight" in values:
        W = values["weight"]
        lead = W.shape[: W.ndim - module.weight.ndim]
        W = W.mT if isinstance(module, nn.Embedding) else W
        n_out = module.embedding_dim if isinstance(module, nn.Embedding) else module.weight.shape[0] // k
        parts.append(W.reshape(*lead, k, n_out, -1))
    if "bias" in values:
        b = values["bias"]
        parts.append(b.reshape(*b.shape[:-1], k, -1, 1))
    return torch.cat(parts, -1)


def own_parameters(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The trainable parameters of one submodule, by their name in the model."""
    prefix = f"{name}." if name else ""
    module = model.get_submodule(name)
    return {prefix + n: p.detach() for n, p in module.named_parameters(recurse=False) if p.requires_grad}


def function_of(model: nn.Module, name: str) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(own parameters, input) -> output, the model's other parameters held."""
    rest = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    return lambda own, x: functional_call(model, {**rest, **own}, (x,))


def jacobian(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """d output / d matrices of one layer: (*output shape, k, n_out, n_in)."""
    own, f = own_parameters(model, name), function_of(model, name)
    J = jacrev(f)(own, x)
    return matrices(model.get_submodule(name), {n.split(".")[-1]: t for n, t in J.items()})


def ggn_block(model: nn.Module, name: str, x: Tensor, loss: Loss) -> Tensor:
    """J^T H J for one layer, (k, n_out, n_in, k, n_out, n_in), H the Hessian of the loss by the outputs."""
    f = model(x).detach()
    J = jacobian(model, name, x).flatten(0, f.ndim - 1)
    H = hessian(loss)(f).reshape(f.numel(), f.numel())
    return torch.einsum("akoi,ab,blpj->koilpj", J, H, J)


def sample_gradients(model: nn.Module, name: str, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """Gradient of loss(output_b, y_b) for every sample b, taken alone: (B, k, n_out, n_in)."""
    own, f = own_parameters(model, name), function_of(model, name)
    alone = vmap(grad(lambda o, xb, yb: loss(f(o, xb[None])[0], yb)), (None, 0, 0))
    found = alone(own, x, y)
    return matrices(model.get_submodule(name), {n.split(".")[-1]: t for n, t in found.items()})


def kronecker(Lambda: Tensor, Gamma: Tensor) -> Tensor:
    """(Lambda (x) Gamma) of k blocks as (k, n_out, n_in, k, n_out, n_in); a diagonal Lambda is (k, n_in)."""
    Lambda = Lambda.diag_embed() if Lambda.ndim == 2 else Lambda
    k, n_in, n_out = len(Lambda), Lambda.shape[-1], Gamma.shape[-1]
    F = Lambda.new_zeros(k, n_out, n_in, k, n_out, n_in)
    for block in range(k):
        F[block, :, :, block] = torch.einsum("ij,op->oipj", Lambda[block], Gamma[block])
    return F


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()
