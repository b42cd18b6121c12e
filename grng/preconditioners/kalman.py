"""Regularized Kalman: the parameters are the state of an extended Kalman filter; no d x d matrix is inverted."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grng.curvature import Batch, Curvature, Layer, Statistics
from grng.distributed import Processes
from grng.errors import finite, invalid, unknown
from grng.kernels import Columns, DenseColumns, IndexColumns, eigh, gain, identity_plus, root_or_nan
from grng.preconditioners.base import Group, Preconditioner
from grng.preconditioners.covariance import Covariance, Diagonal, Kronecker, Parts, Separate, added
from grng.preconditioners.registry import register_preconditioner

COVARIANCES = ("diag", "kron")
PROJECTIONS = ("vd", "fd")
COLUMNS = ("auto", "grouped", "sample")
GAINS = ("trace", "exact")
PENALTIES = ("ring", "fading")
START = 3.0  # of the prior's variance, times the largest information of the first batch
FEW = 16  # columns among which the information is taken to be spread at most

Key = tuple[
    int, int, int, int
]  # whose columns (group and slot, or anybody's), which gradient at the output, which part


@register_preconditioner("kalman")
class Kalman(Preconditioner):
    """Extended Kalman filter with a structured covariance and fading memory (derived here; the published R-Kalman is
    Bayesian and inverts no Fisher matrix, its equations could not be read).

        P_pred = min(P / (1 - gamma) + process_noise I, p_max)     prediction
        q      = (P_pred^{-1} + lam_K I)^{-1}                      regularised prior, in the gain only
        D      = -[ q g - q V (I_m + V^T q V)^{-1} V^T q g ]       g: gradient of the summed loss
        P      = projection of (P_pred^{-1} + V V^T)^{-1}          never through q

    V has m columns with E[V V^T] = sum_i F_i. lam_K = B lam / gamma, lam being RING's rho ||g||^2, so that equal rho
    and lr = gamma mean the same.

    Args:
        p0: variance of every parameter at the start; None: settled by the first batch, p0 s = 3 with s the largest
            eigenvalue of V^T V, but at least a 16th (of fewer samples: their share) of its trace, so that the first
            step is bold and stable whatever the scale of the loss, the batch, the model or the kind of V.
        gamma: forgetting in [0, 1): the share of the information lost a step. At once the learning rate and the decay
            of the running Fisher; 0 accumulates for ever, which stationary data want and deep networks do not.
        covariance: `"diag"`, a variance for every parameter; `"kron"`, P_out (x) P_in layer by layer (embeddings and
            parameters outside of layers: diagonal).
        columns: `"grouped"`, m = groups sums of gradients with drawn labels over parts of the batch; `"sample"`, one
            column for every sample and drawn label; `"auto"`: grouped for `"diag"`, sample for `"kron"` and where the
            labels are not drawn. With Curvature(fisher="exact") V is exact, one column for every sample and output.
        groups: m.
        projection: of the diagonal: `"vd"`, p = 1/(1/p + rowsum V^2), the square of a grouped column taken sample by
            sample where a layer is used at one position (the same in expectation), or `"fd"`, the diagonal of the exact
            posterior covariance. The Kronecker product is projected by one round of its KL divergence.
        gain: for `"kron"`, how lam_K enters the prior: `"trace"`, q = P / (1 + lam_K tr(P)/d), or `"exact"`, which
            takes two eigendecompositions a step.
        penalty: `"ring"`: lam_K as above; `"fading"`: the filter's own sum of what each step adds, B lam, forgotten as
            the information is; it tends to the former where lam is constant.
        process_noise: variance that every parameter gains a step (under `"kron"` in the mean).
        p_max: cap on the variance under forgetting, in units of p0 (under `"kron"` of its mean over a layer).
    """

    _batch: Batch | None
    _parts: list[Parts]
    every_step = True
    weighs_sums = True
    takes_others = True

    def __init__(
        self,
        p0: float | None = None,
        gamma: float = 0.03,
        covariance: Literal["diag", "kron"] = "diag",
        columns: Literal["auto", "grouped", "sample"] = "auto",
        groups: int = 16,
        projection: Literal["vd", "fd"] = "vd",
        gain: Literal["trace", "exact"] = "trace",
        penalty: Literal["ring", "fading"] = "ring",
        process_noise: float = 0.0,
        p_max: float = 30.0,
    ) -> None:
        if p0 is not None and not (finite(p0) and p0 > 0):
            raise invalid("p0", p0, "a finite number > 0, or None")
        if not (finite(gamma) and 0 <= gamma < 1):
            raise invalid("gamma", gamma, "in [0, 1)")
        if not isinstance(groups, int) or groups < 1:
            raise invalid("groups", groups, "a whole number, at least 1")
        for name, value, choices in (
            ("covariance", covariance, COVARIANCES),
            ("columns", columns, COLUMNS),
            ("projection", projection, PROJECTIONS),
            ("gain", gain, GAINS),
            ("penalty", penalty, PENALTIES),
        ):
            if value not in choices:
                raise unknown(name, value, choices)
        if covariance == "kron" and projection == "fd":
            raise invalid("projection", projection, '"vd" with covariance="kron"', "Both are projections in KL.")
        if not (finite(process_noise) and process_noise >= 0):
            raise invalid("process_noise", process_noise, "a finite number >= 0")
        if not (finite(p_max) and p_max >= 1):
            raise invalid("p_max", p_max, "a finite number >= 1")
        self.p0, self.gamma, self.covariance, self.columns, self.groups_of_samples = (
            p0,
            gamma,
            covariance,
            columns,
            groups,
        )
        self.projection, self.gain, self.penalty = projection, gain, penalty
        self.process_noise, self.p_max = process_noise, p_max

    def setup(self, groups: Sequence[Group], config: Curvature) -> None:
        if config.fisher == "exact" and self.columns == "grouped":
            remedy = "Exact columns have no random sign: their sums would not average out."
            raise invalid("columns", "grouped", '"auto" or "sample" with fisher="exact"', remedy)
        super().setup(groups, config)

    def remark(self, layer: Layer) -> str:
        reason = "" if layer.indexed or self.covariance == "diag" else self.config.beyond(layer.n_out, layer.n_in)
        return reason and f", diagonal: {reason}"

    def allocate(self) -> None:
        start = self.p0 or 0.0  # zero: not settled yet

        def structured(group: Group) -> bool:
            wide = bool(self.config.beyond(group.n_out, group.n_in))
            return self.covariance == "kron" and not (group.indexed or group.plain or wide)

        self.p = self.buffer("p", lambda g: (0, 0) if structured(g) else (g.n_out, g.n_in), start)
        self._covariances: list[Covariance] = []
        if any(map(structured, self.groups)):
            self.P_out = self.buffer("P_out", lambda g: (g.n_out, g.n_out) if structured(g) else (0, 0))
            self.P_in = self.buffer("P_in", lambda g: (g.n_in, g.n_in) if structured(g) else (0, 0))
        for i, group in enumerate(self.groups):
            if structured(group):
                self._covariances.append(Kronecker(self.P_out.values[i], self.P_in.values[i], self.gain))
            else:
                kind = Separate if group.plain else Diagonal
                self._covariances.append(kind(self.p.values[i], self.projection))
        self.start = self.buffer("p0", lambda group: (), start)
        self.seen = self.buffer("seen", lambda group: ())
        if self.penalty == "fading":
            self.fading = self.buffer("lam", lambda group: (1, 1))
        if self.p0 is not None:
            for covariance, size in zip(self._covariances, self.start.values, strict=True):
                covariance.begin(torch.ones_like(size, dtype=torch.bool), size.view(-1, 1, 1))
        self._settled = self.p0 is not None
        self.discard()

    # What a batch says.

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        if layer.plain:
            sums = self._sums.setdefault(layer, {})
            gradient = statistics.gradient()
            sums[statistics.draw] = sums[statistics.draw] + gradient if statistics.draw in sums else gradient
            return
        grouped = self.columns == "grouped" or (
            self.columns == "auto" and self.covariance == "diag" and self.config.fisher == "mc" and statistics.drawn
        )
        whose, groups = (-1, -1), self.groups_of_samples if grouped else None
        if not statistics.aligned:
            # Its gradient does not tell the samples apart: columns of its own, coupled to no other layer. With labels
            # drawn one is enough, the sum over the batch.
            whose, drawn = (layer.group, layer.slots.start), statistics.drawn and self.config.fisher == "mc"
            groups, grouped = 1 if drawn else None, drawn
        columns = statistics.columns(groups)
        columns.apart = columns.apart and self.projection == "vd"  # fd's two terms are of one V
        key = *whose, statistics.draw, -1 if grouped else statistics.offset
        self._keep(layer, key, columns)

    def share(self, processes: Processes) -> None:
        """Take in everybody's columns: groups of samples go on from process to process, samples stand side by side."""
        layers = [layer for group in self.groups for layer in group.layers]
        own: dict[Any, Tensor] = {}
        for i, layer in enumerate(layers):
            own |= {("sum", i, draw): gradient for draw, gradient in self._sums.get(layer, {}).items()}
            for key, parts in self._seen.get(layer, {}).items():
                for j, columns in enumerate(parts):
                    name = i, key, j, columns.apart
                    own["inputs", name], own["e", name] = columns.parts
        self._forget()
        for rank, found in enumerate(processes.gather(own, self.groups[0].device)):
            for (kind, *name), tensor in found.items():
                if kind == "sum":
                    i, draw = name
                    sums = self._sums.setdefault(layers[i], {})
                    sums[draw] = sums[draw] + tensor if draw in sums else tensor
                elif kind == "inputs":
                    i, (*whose, offset), _, apart = name[0]
                    layer, e = layers[i], found["e", name[0]]
                    columns = IndexColumns(tensor, e, layer.n_in) if layer.indexed else DenseColumns(tensor, e)
                    columns.apart = apart
                    self._keep(layer, (*whose, offset if offset < 0 else offset * processes.size + rank), columns)

    def _keep(self, layer: Layer, key: Key, columns: Columns) -> None:
        self._widths[key] = columns.count
        self._seen.setdefault(layer, {}).setdefault(key, []).append(columns)

    def _gather(self) -> list[Parts]:
        """The columns of every group, all of one width; layers of one shape and length side by side."""
        keys = sorted(self._widths)
        found: list[list[tuple[slice, Any]]] = [[] for _ in self.groups]
        for layer, parts in self._seen.items():
            first = next(iter(parts.values()))[0]
            wide = [type(first).joined(parts[k], 2) if k in parts else first.zeros(self._widths[k]) for k in keys]
            found[layer.group].append((layer.slots, type(first).joined(wide, 1)))
        for layer, sums in self._sums.items():
            squares = torch.stack([gradient.square() for gradient in sums.values()]).sum(0)
            found[layer.group].append((layer.slots, squares))
        self._forget()
        return [_stacked(parts, group) for parts, group in zip(found, self.groups, strict=True)]

    def refresh(self, batch: Batch, decompose: bool) -> None:
        """Predict. The covariance goes through the batch once the step is made, in the same passes over V; an invalid
        batch leaves it as it was."""
        self._commit()  # a step that asked for no direction
        self._batch, self._parts = batch, self._gather()
        measured = [part for parts in self._parts for _, part in parts]
        batch.valid = torch.stack([batch.valid, *map(_finite, measured)]).all()
        if not self._settled:
            self._settle(batch.valid)
        for covariance, start in zip(self._covariances, self.start.values, strict=True):
            covariance.begin(~covariance.sound(), start.view(-1, 1, 1))  # what is no covariance starts anew
            covariance.predict(1 / (1 - self.gamma), self.process_noise, self.p_max * start)
        self._open = True

    def _commit(self) -> None:
        """Propagate the covariance through the batch."""
        if not self._open:
            return
        assert self._batch is not None
        valid, pairs = self._batch.valid, list(zip(self._covariances, self._parts, strict=True))
        grams = [gram for covariance, parts in pairs if (gram := covariance.prior_gram(parts)) is not None]
        root = root_or_nan(identity_plus(torch.stack(grams).sum(0))) if grams else None
        if root is not None:
            valid = valid & root[0, 0].isfinite()
        for covariance, parts in pairs:
            covariance.commit(parts, root, valid)
        for seen in self.seen.stacks:
            seen.copy_(torch.where(valid, (1 - self.gamma) * seen + self._batch.samples, seen))
        self._parts, self._open = [], False

    def _settle(self, valid: Tensor) -> None:
        """p0 from the first valid batch; it looks at values until there was one."""
        flat = [part for parts in self._parts for _, part in parts]
        grams = [columns.gram() for columns in flat if isinstance(columns, Columns)]
        sizes = [part.amax() for part in flat if isinstance(part, Tensor)]
        if grams:
            gram = torch.where(valid, torch.stack(grams).sum(0), 0)
            # Few samples give exact columns no large eigenvalue, drawn labels one that is all of the trace.
            assert self._batch is not None
            share = gram.trace() / min(self._batch.samples, FEW)
            sizes.append(torch.maximum(eigh(gram.unsqueeze(0))[0].amax(), share))
        largest = torch.stack(sizes).amax()
        p0 = START / largest.clamp(min=torch.finfo(largest.dtype).tiny)
        for start, covariance in zip(self.start.values, self._covariances, strict=True):
            first = (start == 0) & valid
            start.copy_(torch.where(first, p0, start))
            covariance.begin(first, p0)
        self._settled = bool(valid)

    # The step.

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        assert self._batch is not None
        N = self._batch.normaliser
        terms = list(zip(self._covariances, self._parts, self._penalties(damping), gradients, strict=True))
        found = added([pair for P, parts, lam, g in terms if (pair := P.measure(parts, lam, g)) is not None])
        z = N.new_zeros(0)
        if found is not None:
            gram, projected = found
            z, _ = gain(gram, N.to(projected.dtype) * projected)
        directions = [P.direction(parts, z, g, N) for P, parts, _, g in terms]
        self._commit()
        return directions

    def _penalties(self, damping: list[Tensor]) -> list[Tensor]:
        """lam_K, one (k, 1, 1) a group."""
        assert self._batch is not None
        if self.penalty == "ring":
            return [self._information(self.gamma or 1.0).to(lam.dtype) * lam for lam in damping]
        for total, lam in zip(self.fading.values, damping, strict=True):
            new = (1 - self.gamma) * total + self._information(1.0).to(lam.dtype) * lam
            total.copy_(torch.where(self._batch.valid & new.isfinite(), new, total))
        return [total.clone() for total in self.fading.values]

    def _information(self, gamma: float) -> Tensor:
        """What one unit of lam weighs: RING's lam is rho ||g||^2 with the gradient of the mean loss, the filter weighs
        the summed information, and the user's loss is B/N times the mean."""
        assert self._batch is not None
        B, N = self._batch.predictions, self._batch.normaliser
        return B * (N / B).square() / gamma

    def largest_curvature(self) -> Tensor:
        """The lam at which the gain's prior is halved."""
        return 1 / (self._information(self.gamma or 1.0) * self.start.values[0][0])

    def _forget(self) -> None:
        self._seen: dict[Layer, dict[Key, list[Any]]] = {}
        self._sums: dict[Layer, dict[int, Tensor]] = {}
        self._widths: dict[Key, int] = {}

    def discard(self) -> None:
        self._forget()
        self._parts = []
        self._open = False
        self._batch = None

    def load_state(self, layer: Layer, state: dict[str, Tensor]) -> None:
        super().load_state(layer, state)
        self._settled = self.p0 is not None or bool((state["p0"] > 0).all())

    # The posterior.

    def variance(self) -> list[Tensor]:
        """The diagonal of the covariance, one stack (k, n_out, n_in) a group."""
        return [covariance.variance() for covariance in self._covariances]

    def draw(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """A draw from N(0, P), one stack (k, n_out, n_in) a group."""
        return [covariance.draw(generator) for covariance in self._covariances]

    def spread(self, layer: Layer, columns: Any) -> Tensor:
        """v^T P v for every column v of one layer, (m,)."""
        return self._covariances[layer.group].spread(layer.slots, columns)


def _finite(part: Any) -> Tensor:
    """Whether what a batch says about some matrices is finite: columns, or squares of a gradient."""
    tensors = [part] if isinstance(part, Tensor) else [t for t in vars(part).values() if isinstance(t, Tensor)]
    return torch.stack([t.sum() for t in tensors]).isfinite().all()


def _stacked(parts: list[tuple[slice, Any]], group: Group) -> Parts:
    """As one part, where every matrix of the group has columns of one length."""
    parts = sorted(parts, key=lambda part: part[0].start)
    if len(parts) < 2 or group.indexed or group.plain or sum(s.stop - s.start for s, _ in parts) < group.size:
        return parts
    columns = [c for _, c in parts]
    if len({c.e.shape[2] for c in columns}) > 1:
        return parts
    return [(slice(0, group.size), type(columns[0]).joined(columns, 0))]
