"""Regularized Kalman: the parameters are the state of an extended Kalman filter; no d x d matrix is inverted."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from grng.curvature import Batch, Curvature, Layer, Statistics
from grng.errors import invalid, unknown
from grng.kernels import propagate_fd, propagate_vd, woodbury_direction
from grng.preconditioners.base import Group, Preconditioner
from grng.preconditioners.registry import register_preconditioner

PROJECTIONS = ("vd", "fd")
START = 3.0  # of the prior's variance, times the largest information of the first batch


@register_preconditioner("kalman")
class Kalman(Preconditioner):
    """Extended Kalman filter with a diagonal covariance p and fading memory (derived here; the published R-Kalman is
    Bayesian and inverts no Fisher matrix, its equations could not be read).

        p_pred = min(p / (1 - gamma), p_max)                       prediction
        q      = p_pred / (1 + lam_K p_pred)                       regularised prior, in the gain only
        D      = -[ q g - q V (I_m + V^T q V)^{-1} V^T q g ]       g: gradient of the summed loss
        p      = vd or fd propagation of p_pred through V          never through q

    V has m columns with E[V V^T] = sum_i F_i: sums of gradients with labels drawn from the model over m parts of the
    batch (with fisher="empirical" it needs groups as many as samples: true labels' gradients are not of mean zero).
    lam_K = B lam / gamma, lam being RING's rho ||g||^2, so that equal rho and lr = gamma mean the same.

    Args:
        p0: variance of every parameter at the start; None: settled by the first batch, p0 lambda_max(V^T V) = 3, so
            that the first step is bold and stable whatever the scale of the loss, the batch or the model.
        gamma: forgetting in [0, 1): the share of the information lost a step. At once the learning rate and the decay
            of the running Fisher; 0 accumulates for ever, which stationary data want and deep networks do not.
        groups: m, the columns of V.
        projection: `"vd"`, p = 1/(1/p + rowsum V^2), or `"fd"`, the diagonal of the exact posterior covariance.
        p_max: cap on p under forgetting, in units of p0.
    """

    every_step = True
    weighs_sums = True

    def __init__(
        self,
        p0: float | None = None,
        gamma: float = 0.03,
        groups: int = 16,
        projection: Literal["vd", "fd"] = "vd",
        p_max: float = 30.0,
    ) -> None:
        if p0 is not None and not (math.isfinite(p0) and p0 > 0):
            raise invalid("p0", p0, "a finite number > 0, or None")
        if not 0 <= gamma < 1:
            raise invalid("gamma", gamma, "in [0, 1)")
        if not isinstance(groups, int) or groups < 1:
            raise invalid("groups", groups, "a whole number, at least 1")
        if projection not in PROJECTIONS:
            raise unknown("projection", projection, PROJECTIONS)
        if not (math.isfinite(p_max) and p_max >= 1):
            raise invalid("p_max", p_max, "a finite number >= 1")
        self.p0, self.gamma, self.columns, self.projection, self.p_max = p0, gamma, groups, projection, p_max

    def setup(self, groups: Sequence[Group], config: Curvature) -> None:
        if config.fisher == "exact":
            raise invalid("fisher", "exact", '"mc" or "empirical" for kalman', "Its V holds one gradient a sample.")
        super().setup(groups, config)

    def allocate(self) -> None:
        start = self.p0 or 0.0  # zero: not settled yet
        self.p = self.buffer("p", lambda group: (group.n_out, group.n_in), start)
        self.start = self.buffer("p0", lambda group: (), start)
        self._settled = self.p0 is not None
        self._V: list[Tensor | None] = [None] * len(self.groups)
        self._prior: list[Tensor] = []
        self._batch: Batch | None = None

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        columns, p = statistics.group_gradients(self.columns), self.p.values[layer.group]
        V = self._V[layer.group]
        if V is None and layer.blocks == len(p):
            self._V[layer.group] = columns
            return
        if V is None:
            V = self._V[layer.group] = p.new_zeros(self.columns, *p.shape)
        V[:, layer.slots] += columns

    def refresh(self, batch: Batch, decompose: bool) -> None:
        """Predict, and propagate the covariance through the batch; an invalid batch leaves it as it was."""
        self._batch = batch
        self._V = [
            p.new_zeros(self.columns, *p.shape) if V is None else V for p, V in zip(self.p.values, self._V, strict=True)
        ]
        if not self._settled:
            self._settle(batch.valid)
        caps = [self.p_max * start.view(-1, 1, 1) for start in self.start.values]
        self._prior = [torch.minimum(p / (1 - self.gamma), cap) for p, cap in zip(self.p.values, caps, strict=True)]
        flat = [(p.flatten(), V.flatten(1)) for p, V in zip(self._prior, self._flat_V(), strict=True)]
        if self.projection == "vd":
            new = [propagate_vd(p, V) for p, V in flat]
        else:
            rows = [V for _, V in flat]
            _, root = woodbury_direction([p for p, _ in flat], rows, [V * p for p, V in flat])
            new = [propagate_fd(p, V, root) for p, V in flat]
        for p, posterior in zip(self.p.values, new, strict=True):
            p.copy_(torch.where(batch.valid, posterior.view_as(p), p))

    def _settle(self, valid: Tensor) -> None:
        """p0 from the first valid batch; it looks at values until there was one."""
        gram = torch.stack([V.flatten(1) @ V.flatten(1).mT for V in self._flat_V()]).sum(0)
        largest = torch.linalg.eigvalsh(torch.where(valid, gram, 0))[-1]
        p0 = START / largest.clamp(min=torch.finfo(largest.dtype).tiny)
        for start, p in zip(self.start.values, self.p.values, strict=True):
            first = (start == 0) & valid
            start.copy_(torch.where(first, p0, start))
            p.copy_(torch.where(first.view(-1, 1, 1), p0, p))
        self._settled = bool(valid)

    def _flat_V(self) -> list[Tensor]:
        return [V for V in self._V if V is not None]

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        assert self._batch is not None
        N, scale = self._batch.normaliser, self._information()
        q, qg, V, qV = [], [], [], []
        for p, G, lam, columns in zip(self._prior, gradients, damping, self._flat_V(), strict=True):
            q.append((p / (1 + scale * lam * p)).flatten())
            qg.append(q[-1] * (N * G).flatten())
            V.append(columns.flatten(1))
            qV.append(V[-1] * q[-1])
        directions, _ = woodbury_direction(qg, V, qV)
        self._V = [None] * len(self.groups)
        return [D.view_as(G) for D, G in zip(directions, gradients, strict=True)]

    def _information(self) -> Tensor:
        """What one unit of lam weighs: RING's lam is rho ||g||^2 with the gradient of the mean loss, the filter weighs
        the summed information, and the user's loss is B/N times the mean."""
        assert self._batch is not None
        B, N = self._batch.predictions, self._batch.normaliser
        return B * (N / B).square() / (self.gamma or 1.0)

    def largest_curvature(self) -> Tensor:
        """The lam at which the gain's prior is halved."""
        return 1 / (self._information() * self.start.values[0][0])

    def discard(self) -> None:
        self._V = [None] * len(self.groups)
        self._batch = None

    def load_state(self, layer: Layer, state: dict[str, Tensor]) -> None:
        super().load_state(layer, state)
        self._settled = self.p0 is not None or bool((state["p0"] > 0).all())
