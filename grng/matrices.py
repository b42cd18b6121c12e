"""One number a matrix, those of all groups in one vector (K,): norms, sums by layer, and trust regions of layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grng.curvature import Layer
from grng.kernels import norms
from grng.preconditioners import Group

SMALLEST_SHARE = 1e-12  # of the largest curvature, that a layer's own counts as
SMALL_WEIGHTS = 0.1  # times sqrt(n_out): the least that the norm of a matrix of weights counts as in a trust region


class Matrices:
    """Where the matrices of layers lie in the groups' stacks (k, n_out, n_in).

    Args:
        layers: with their groups and slots.
        groups: as `make_groups` made them.
    """

    def __init__(self, layers: Sequence[Layer], groups: Sequence[Group]) -> None:
        device = groups[0].device if groups else None
        self.counts = [group.size for group in groups]
        of_matrix = [
            index for group in groups for layer in group.layers for index in [layers.index(layer)] * layer.blocks
        ]
        self._layer = torch.tensor(of_matrix, dtype=torch.long, device=device)
        self._parameters: list[Tensor] = [p for layer in layers for p in layer.parameters]
        of_parameter = [index for index, layer in enumerate(layers) for _ in layer.parameters]
        self._layer_of_parameter = torch.tensor(of_parameter, dtype=torch.long, device=device)
        outputs = torch.tensor([layer.n_out for layer in layers], dtype=torch.float64, device=device)
        self.least = SMALL_WEIGHTS * outputs.sqrt()

    def split(self, values: Tensor) -> list[Tensor]:
        """The numbers of every group's matrices, (k, 1, 1)."""
        return list(values.expand(sum(self.counts)).view(-1, 1, 1).split(self.counts))

    def of_layers(self, values: Tensor) -> Tensor:
        """Sums over the matrices of a layer, for each of them."""
        return self._sums(values, self._layer)[self._layer]

    def sizes(self) -> Tensor:
        """||W_l|| of every layer, 0.1 sqrt(n_out) at least: the norm of small random weights, so that zeros move."""
        squares = norms(self._parameters).to(self.least).square()
        return torch.maximum(self._sums(squares, self._layer_of_parameter).sqrt(), self.least)

    def reach(self, limits: Tensor, squares: Tensor) -> Tensor:
        """nu_l = min(1, limit_l / ||D_l||) of all matrices, from a limit of each layer and ||D||^2 of each matrix."""
        lengths = self._sums(squares.to(self.least), self._layer).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return (limits / lengths).clamp(max=1)[self._layer]

    def _sums(self, values: Tensor, layers: Tensor) -> Tensor:
        return values.new_zeros(len(self.least)).index_add_(0, layers, values)


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """<A, B> of every matrix of stacks (k, n_out, n_in), in one vector.

    >>> inner([torch.ones(2, 1, 3)], [2 * torch.ones(2, 1, 3)])
    tensor([6., 6.])
    """
    return torch.cat([torch.linalg.vecdot(A.flatten(1), B.flatten(1)) for A, B in zip(first, second, strict=True)])


def largest_shares(scales: Sequence[Tensor]) -> Tensor:
    """Every matrix's largest curvature as part of the largest of all.

    >>> largest_shares([torch.tensor([4.0, 1.0]).view(2, 1, 1), torch.tensor([2.0]).view(1, 1, 1)])
    tensor([1.0000, 0.2500, 0.5000], dtype=torch.float64)
    """
    values = torch.cat([scale.flatten() for scale in scales]).double()
    return torch.nan_to_num(values / values.amax(), nan=1.0).clamp(min=SMALLEST_SHARE)
