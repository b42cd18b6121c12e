"""Brute force: rows, factors and the Fisher's diagonal by automatic differentiation, one row or one sample at a time.

Of GRNG it uses which parameters belong to a layer, and where each entry of a parameter stands in the layer's matrices;
no rows of its making.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from grng.curvature import Layer
from grng.curvature.passes import find_output

from .base import Architecture, Batch


class Call(NamedTuple):
    """One use of a layer's weights: the module with its arguments, or a single matrix of it with its input."""

    layer: Layer
    block: int | None
    arguments: tuple[Any, Any]
    output: Tensor


class Rows(NamedTuple):
    """Rows x (P, n_in) and e (P, n_out) of one matrix, sample by sample."""

    x: Tensor
    e: Tensor


Factors = tuple[Tensor, Tensor]  # Lambda (k, n_in, n_in), Gamma (k, n_out, n_out)


def factors(
    row: Architecture, model: nn.Module, batch: Batch, layers: Sequence[Layer], expected: bool = False
) -> dict[str, Factors]:
    """Lambda, the mean of x x^T over the rows that receive a gradient, and Gamma, 1/N times the sum of e e^T, of the
    true labels or `expected` over the model's own. Of a normalisation, 1/N times the sum of u u^T over samples, u their
    own gradient, and 1."""
    y = batch[1]
    found = rows(row, model, batch, layers, expected)
    return {layer.name: _factors(layer, blocks, y.numel(), len(y)) for layer, blocks in found.items()}


def rows(
    row: Architecture, model: nn.Module, batch: Batch, layers: Sequence[Layer], expected: bool = False
) -> dict[Layer, list[list[Rows]]]:
    """Rows of every layer that is used, by matrix and use, for the summed loss."""
    x, y = batch
    with recorded(model, layers) as calls:
        f = find_output(row.forward(model, x))
        seen = list(calls)  # not those of a forward pass that is done again
    assert f is not None
    if not seen:
        return {}
    found: dict[Layer, list[list[Rows]]] = defaultdict(list)
    for place in scores(f) if expected else [torch.autograd.grad(y.numel() * row.loss(f, y), f, retain_graph=True)[0]]:
        gradients = torch.autograd.grad(f, [c.output for c in seen], place, allow_unused=True, retain_graph=True)
        for call, e in zip(seen, gradients, strict=True):
            if e is not None:
                blocks = found[call.layer] = found[call.layer] or [[] for _ in range(call.layer.blocks)]
                for block, own in rows_of(call, e):
                    blocks[block].append(own)
    return found


def scores(f: Tensor) -> Iterator[Tensor]:
    """For every label of logits (B, C) the gradient of its negative logarithm, times the root of its probability."""
    p = f.detach().softmax(-1)
    for c in range(f.shape[-1]):
        yield p[:, c : c + 1].sqrt() * (p - torch.eye(f.shape[-1], dtype=f.dtype)[c])


def _factors(layer: Layer, blocks: list[list[Rows]], N: int, B: int) -> Factors:
    Lambda, Gamma = [], []
    for uses in blocks:
        if is_norm(layer.module):
            u = torch.stack([(x * e).view(B, -1, layer.n_in).sum(1) for x, e in uses]).sum(0)
            Lambda.append(u.T @ u / N)
            Gamma.append(torch.ones(1, 1, dtype=u.dtype))
            continue
        x, e = (torch.cat(parts) for parts in zip(*uses, strict=True))
        keep = (e != 0).any(1)
        if layer.indexed:  # a padding index has no row
            keep &= (x != 0).any(1)
        x, e = x[keep], e[keep]
        Lambda.append(x.T @ x / max(len(x), 1))
        Gamma.append(e.T @ e / N)
    return torch.stack(Lambda), torch.stack(Gamma)


def rows_of(call: Call, e: Tensor) -> Iterator[tuple[int, Rows]]:
    """The rows of a call, matrix by matrix. x is the derivative of one output of the position by its own weights."""
    layer = call.layer
    if call.block is not None:
        x = call.arguments[0][0].detach()
        x = x.reshape(-1, x.shape[-1])
        if layer.bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        yield call.block, Rows(x, e.reshape(-1, e.shape[-1]))
        return
    module, (args, kwargs) = deepcopy(layer.module), call.arguments
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    z = module.forward(*args, **kwargs)  # without anybody's hooks
    last = not isinstance(module, FIRST)
    places = torch.arange(z.numel()).view(z.shape)
    places = (places if last else places.movedim(1, -1)).reshape(-1, z.shape[-1] if last else z.shape[1])
    theirs = {n: getattr(layer.module, n) for n in own}
    for block in range(layer.blocks):
        channels = places[:, block * layer.n_out : (block + 1) * layer.n_out]
        # One output of each position: the first of its matrix.
        pick = torch.nn.functional.one_hot(channels[:, 0], z.numel()).to(z.dtype).view(-1, *z.shape)
        J = torch.autograd.grad(z, list(own.values()), pick, is_grads_batched=True, retain_graph=True)
        x = []
        for p in range(len(pick)):
            stack = torch.zeros(layer.blocks, layer.n_out, layer.n_in, dtype=z.dtype)
            values = {theirs[n]: j[p] for n, j in zip(own, J, strict=True)}
            layer.put(stack, values.get)
            x.append(stack[block, 0].clone())
        yield block, Rows(torch.stack(x), e.reshape(-1)[channels])


FIRST = (  # where the channels come first
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


def is_norm(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, kinds) or type(module).__name__.endswith("RMSNorm")


@contextmanager
def recorded(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[Call]]:
    """Every call of the layers in forward passes inside. The output that is handed on is a copy, so that what is
    noted stays as it was."""
    calls: list[Call] = []
    attentions = {found for layer in layers if (found := _attention(layer)) is not None}
    handles = []

    def note(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            detached = (tuple(a.detach() if isinstance(a, Tensor) else a for a in args), kwargs)
            detached[1].update({k: v.detach() for k, v in kwargs.items() if isinstance(v, Tensor)})
            calls.append(Call(layer, None, detached, output))
            return output.clone()

        return hook

    for layer in layers:
        if _attention(layer) is None:
            handles.append(layer.module.register_forward_hook(note(layer), prepend=True, with_kwargs=True))
    for attention in attentions:
        attention.forward = by_hand(attention, layers, calls)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del attention.forward


def _attention(layer: Layer) -> nn.MultiheadAttention | None:
    host = layer.host or layer.module
    return host if isinstance(host, nn.MultiheadAttention) else None


def by_hand(m: nn.MultiheadAttention, layers: Sequence[Layer], calls: list[Call]) -> Any:
    """Multi-head attention without masks and dropout, one linear map after the other."""
    packed = next((l for l in layers if l.module is m), None)
    out = next((l for l in layers if l.module is m.out_proj), None)

    def linear_of(x: Tensor, W: Tensor, b: Tensor | None, layer: Layer | None, block: int) -> Tensor:
        z = linear(x, W, b)
        if layer is not None:
            calls.append(Call(layer, block, ((x,), {}), z))
        return z

    def forward(query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **rest: Any) -> Any:
        assert m.batch_first
        assert not any(isinstance(option, Tensor) for option in rest.values())
        biases = [None] * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        maps = zip((query, key, value), m.in_proj_weight.chunk(3), biases, range(3), strict=True)
        q, k, v = (
            linear_of(x, W, b, packed, i).unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for x, W, b, i in maps
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear_of(mixed, m.out_proj.weight, m.out_proj.bias, out, 0), None

    return forward


def diagonal(
    row: Architecture, model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """Diagonal of the Fisher of the summed cross-entropy: for every sample, in a pass of its own, the squares of the
    output's derivatives in the directions of a root of diag(p) - p p^T."""
    x, y = batch
    found = {p: torch.zeros_like(p) for p in parameters}
    start = deepcopy(model.state_dict())
    for b in range(len(y) if parameters else 0):
        model.load_state_dict(start)  # buffers may change with every pass
        alone = {k: v[b : b + 1] for k, v in x.items()} if isinstance(x, dict) else x[b : b + 1]
        f = find_output(row.forward(model, alone))
        assert f is not None
        logits = f.flatten(0, -2)
        for place, prediction in enumerate(logits.detach().softmax(-1)):
            w, U = torch.linalg.eigh(prediction.diag() - torch.outer(prediction, prediction))
            for column in (U * w.clamp(min=0).sqrt()).T:
                cotangent = torch.zeros_like(logits)
                cotangent[place] = column
                gradients = torch.autograd.grad(logits, parameters, cotangent, retain_graph=True, allow_unused=True)
                for p, g in zip(parameters, gradients, strict=True):
                    if g is not None:
                        found[p] += g.square()
    return found
