"""Brute force: Jacobians, per-sample gradients and curvature blocks by automatic differentiation, nothing of GRNG's.

A layer's parameters are seen as k matrices (n_out, n_in), the bias as a last column; an embedding is transposed.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

Loss = Callable[[Tensor], Tensor]  # outputs -> a number


WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def matrices(module: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """(..., k, n_out, n_in) from tensors that end in the shapes of the module's own parameters of those names."""
    parts = []
    for name in WEIGHTS:
        if name in values:
            lead = values[name].shape[: values[name].ndim - getattr(module, name).ndim]
            parts.append(
                weight_matrices(module, values[name].flatten(0, len(lead) - 1) if lead else values[name][None])
            )
            parts[0] = parts[0].view(*lead, *parts[0].shape[1:])
    for name in ("bias", "in_proj_bias"):
        if name in values:
            b, k = values[name], blocks(module)
            parts.append(b.reshape(*b.shape[: b.ndim - getattr(module, name).ndim], k, -1, 1))
    return torch.cat(parts, -1)


def blocks(module: nn.Module) -> int:
    """How many matrices a module is seen as."""
    if isinstance(module, nn.MultiheadAttention):
        return 3 if module.in_proj_weight is not None else 1
    if is_norm(module):  # one a channel
        return next(p.numel() for p in module.parameters())
    return getattr(module, "groups", 1)


def is_norm(module: nn.Module) -> bool:
    return hasattr(module, "eps") or hasattr(module, "variance_epsilon")


def weight_matrices(module: nn.Module, W: Tensor) -> Tensor:
    """(L, *weight shape) -> (L, k, n_out, columns)."""
    k = blocks(module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or type(module).__name__ == "Conv1D":
        return W.mT.unsqueeze(1)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return W.unflatten(1, (k, -1)).transpose(2, 3).flatten(3)
    return W.reshape(len(W), k, 1 if is_norm(module) else W.shape[1] // k, -1)


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The submodule that holds a layer's parameters: attention's projections are no modules of their own."""
    return model.get_submodule(re.sub(r"\.(in_proj|[qkv]_proj_weight)$", "", name))


def own_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of one layer, by their name in its module."""
    found = re.search(r"\.(in_proj|[qkv]_proj_weight)$", name)
    named = module_of(model, name).named_parameters(recurse=False)
    return {n: p for n, p in named if p.requires_grad and (found is None or n.startswith(found[1]))}


def in_model(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The same by their name in the model."""
    own = {id(p) for p in own_parameters(model, name).values()}
    return {n: p.detach() for n, p in model.named_parameters() if id(p) in own}


def function_of(model: nn.Module, name: str) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """(own parameters, input) -> output, the model's other parameters held."""
    rest = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    return lambda own, x: functional_call(model, {**rest, **own}, (x,))


def jacobian(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """d output / d matrices of one layer: (*output shape, k, n_out, n_in)."""
    own, f = in_model(model, name), function_of(model, name)
    J = jacrev(f)(own, x)
    return matrices(module_of(model, name), {n.split(".")[-1]: t for n, t in J.items()})


def ggn_block(model: nn.Module, name: str, x: Tensor, loss: Loss) -> Tensor:
    """J^T H J for one layer, (k, n_out, n_in, k, n_out, n_in), H the Hessian of the loss by the outputs."""
    f = model(x).detach()
    J = jacobian(model, name, x).flatten(0, f.ndim - 1)
    H = hessian(loss)(f).reshape(f.numel(), f.numel())
    return torch.einsum("akoi,ab,blpj->koilpj", J, H, J)


def sample_gradients(model: nn.Module, name: str, x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """Gradient of loss(output_b, y_b) for every sample b, taken alone: (B, k, n_out, n_in)."""
    own, f = in_model(model, name), function_of(model, name)
    alone = vmap(grad(lambda o, xb, yb: loss(f(o, xb[None])[0], yb)), (None, 0, 0))
    found = alone(own, x, y)
    return matrices(module_of(model, name), {n.split(".")[-1]: t for n, t in found.items()})


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
