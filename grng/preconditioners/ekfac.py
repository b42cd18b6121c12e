"""EKFAC: K-FAC's eigenbasis with the second moments that the gradients really have in it."""

import torch
from torch import Tensor

from grng.curvature import Batch, DenseStatistics, IndexStatistics, Layer, Statistics
from grng.distributed import Processes
from grng.kernels import rotated_diagonal
from grng.preconditioners.kfac import KFAC
from grng.preconditioners.registry import register_preconditioner


@register_preconditioner("ekfac")
class EKFAC(KFAC):
    """Eigenvalue-corrected K-FAC (George et al. 2018).

        s = EMA of (1/N) sum_i (U_g^T (grad l_i) U_l)^2,    D = -U_g [U_g^T G U_l / (s + lam)] U_l^T

    When the basis is renewed, s is carried over as the diagonal, in the new basis, of the matrix that is diag(s) in
    the old one (derived here): its trace is kept.
    """

    def __init__(self) -> None:
        super().__init__("eigen")

    def allocate(self) -> None:
        super().allocate()
        self.second = self.moment("second", lambda g: (g.n_out, g.n_in))
        self._held: list[tuple[Layer, Statistics]] = []
        self._based: set[Layer] = set()

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        super().observe(layer, statistics)
        if layer in self._based:
            self._project(layer, statistics)
        else:  # the first time there is no basis yet: the rows wait for it
            self._held.append((layer, statistics))

    def share(self, processes: Processes) -> None:
        """Rows that wait for their basis: everybody's, in all processes."""
        layers = [layer for group in self.groups for layer in group.layers]
        if self._based.issuperset(layers):
            return
        held = enumerate(self._held)
        own = {(j, layers.index(layer), k): rows for j, (layer, s) in held for k, rows in enumerate(s.parts)}
        self._held.clear()
        for found in processes.gather(own, self.groups[0].device):
            for (j, i, k), rows in found.items():
                if k == 0:
                    layer, e = layers[i], found[j, i, 1]
                    statistics = IndexStatistics(rows, e, layer.n_in) if layer.indexed else DenseStatistics(rows, e)
                    self._held.append((layer, statistics))

    def _project(self, layer: Layer, statistics: Statistics) -> None:
        U_l = None if layer.indexed else self.U_l.of(layer)
        self.second.add(layer, statistics.squared_gradients(self.U_g.of(layer), U_l))

    def refresh(self, batch: Batch, decompose: bool) -> None:
        self.second.update(batch)
        old = [(U_g.clone(), None if U_l is None else U_l.clone()) for U_g, U_l in self.bases()] if decompose else []
        super().refresh(batch, decompose)
        for s, (U_g, U_l), (old_g, old_l) in zip(self.second.values, self.bases(), old, strict=False):
            R_in = None if U_l is None or old_l is None else U_l.mT @ old_l
            s.copy_(torch.where(batch.valid, rotated_diagonal(s, U_g.mT @ old_g, R_in), s))
        for layer, statistics in self._held:
            self._project(layer, statistics)
            self._based.add(layer)
        if self._held:
            self.second.update(batch)
            self._held.clear()

    def spectrum(self) -> list[Tensor]:
        return self.second.values

    def discard(self) -> None:
        super().discard()
        self._held.clear()

    def load_state(self, layer: Layer, state: dict[str, Tensor]) -> None:
        super().load_state(layer, state)
        based = bool((state["second.count"] > 0).all())
        (self._based.add if based else self._based.discard)(layer)
