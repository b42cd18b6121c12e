"""nn.MultiheadAttention: its projections are no modules' calls, so they are found in the graph that a call leaves.

A projection is the matrix product that takes a weight, perhaps cast, split and transposed, as its right factor: the
product's place in the graph receives e, and its left factor is the row x.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from grng.curvature.geometry import LINEAR, PACKED
from grng.curvature.layers import Layer, make_layer

Node = Any  # of the autograd graph

# Where a product's right factor comes in, and where it keeps the left one.
PRODUCTS = {"AddmmBackward0": (2, "_saved_mat1"), "MmBackward0": (1, "_saved_self")}
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Projection(NamedTuple):
    """One product with a weight: the layer, the product's node, and which part of a split weight it took."""

    layer: Layer
    node: Node
    part: int


def attention_layers(name: str, module: nn.MultiheadAttention, trainable: set[nn.Parameter]) -> list[Layer]:
    """The projections of attention: in_proj as three matrices (q, k, v), or its three weights, and out_proj."""
    layers = []
    weight: nn.Parameter | None = module.in_proj_weight
    bias: nn.Parameter | None = module.in_proj_bias
    if weight is not None and weight in trainable:
        bias = bias if bias in trainable else None
        k, n_out, columns = PACKED.shape(module)
        layers.append(Layer(f"{name}.in_proj", module, weight, bias, PACKED, k, n_out, columns + (bias is not None)))
    for part in SEPARATE:
        own = getattr(module, part)
        if own is not None and own in trainable:
            layers.append(Layer(f"{name}.{part}", module, own, None, LINEAR, 1, *own.shape))
    out = make_layer(f"{name}.out_proj", module.out_proj, trainable)
    if out is not None and out.weight is not None:
        layers.append(out)
    for layer in layers:
        layer.host = module
    return layers


def projections(layers: list[Layer], inputs: list[Tensor], output: Tensor) -> Iterator[Projection]:
    """The products with the layers' weights between a call's inputs and its output."""
    wanted = {id(layer.weight): layer for layer in layers}
    seen: set[Node] = {t.grad_fn for t in inputs}  # what lies before the inputs is not the call's
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [child for child, _ in node.next_functions]
        if node.name() in PRODUCTS:
            weight, part = _source(*node.next_functions[PRODUCTS[node.name()][0]])
            if id(weight) in wanted:
                yield Projection(wanted[id(weight)], node, part)


def _source(node: Node, number: int) -> tuple[Tensor | None, int]:
    """The parameter at the end of a chain of nodes with one input, and which part of it was taken on the way."""
    part = 0
    while node is not None and not hasattr(node, "variable"):
        if len(node.next_functions) != 1:
            return None, 0
        part += number  # only a split has several outputs
        node, number = node.next_functions[0]
    return (None if node is None else node.variable), part


def left_factor(node: Node) -> Tensor:
    """The x of a product, which autograd has kept for the weight's gradient."""
    return getattr(node, PRODUCTS[node.name()][1]).detach()


class Arrangement(NamedTuple):
    """How the flat rows of a product become (samples, positions, n): attention works on (positions, samples, n),
    whatever the layout of its arguments.

    Attributes:
        samples: how many.
        part: which part of a split weight the product took.
        width: of all parts together.
    """

    samples: int
    part: int
    width: int

    def input(self, node: Node) -> Tensor:
        """The left factor of the product, which autograd has kept for the weight's gradient."""
        return self._by_sample(getattr(node, PRODUCTS[node.name()][1]).detach())

    def gradient(self, e: Tensor) -> Tensor:
        """With zeros for the parts of the weight that the product did not take."""
        e = self._by_sample(e)
        start = self.part * self.width // 3
        return F.pad(e, (start, self.width - start - e.shape[-1]))

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, self.samples, rows.shape[-1]).transpose(0, 1)


def arrangement(found: Projection, query: Tensor) -> Arrangement:
    """That of a product in a call with that query."""
    layer = found.layer
    assert isinstance(layer.host, nn.MultiheadAttention)
    samples = 1 if query.ndim == 2 else query.shape[0 if layer.host.batch_first else 1]
    return Arrangement(samples, found.part, layer.blocks * layer.n_out)
