"""K-FAC: D = -(Lambda (x) Gamma + lam I)^{-1} g per layer."""

from typing import Literal

import torch
from torch import Tensor

from grng.curvature import Batch, Curvature, Layer, Statistics
from grng.errors import unknown
from grng.kernels import (
    damped_inverse,
    eigh,
    factored_precondition,
    kron_product,
    kron_spectrum,
    leading,
    newton_inverse,
    pi_split,
    rotate,
    rotate_back,
    sandwich_costs,
)
from grng.preconditioners.base import Preconditioner, Stacked
from grng.preconditioners.registry import register_preconditioner

SOLVERS = ("eigen", "factored", "newton")
# Of a factor of size n: COSTS n^2 (n + SMALL_SIZES), the latter for what small ones take longer (measured on a CPU).
COSTS, SMALL_SIZES = {"eigen": 25.0, "factored": 3.0, "newton": 3.0}, 250
# Curvature below that part of the damping is left out of large matrices, which lengthens no coordinate of a step by
# more: in float32 far less than what sampled labels are off by, in float64 less than rounding.
NEGLIGIBLE = {torch.float32: 1e-2, torch.float64: 2e-14}
SMALL = 128  # matrices of which no side is larger are not worth the trouble


@register_preconditioner("kfac")
class KFAC(Preconditioner):
    """Kronecker-factored Fisher (Martens & Grosse 2015; convolutions: Grosse & Martens 2016).

        Lambda = EMA of the mean of x x^T over rows,    Gamma = EMA of (1/N) sum over rows of e e^T

    Args:
        solver: how the damped block is inverted.
            `"eigen"`: exactly, in the factors' eigenbasis, D = -U_g [U_g^T G U_l / (gamma_i l_j + lam)] U_l^T; the
            damping may change at every step at no cost. Of matrices with a side above 128, coordinates in which F is
            below a hundredth of the damping (in float64: below rounding) count as F = 0 where that saves work.
            `"factored"`: (Gamma + sqrt(lam)/pi I)^{-1} G (Lambda + pi sqrt(lam) I)^{-1} by Cholesky; cheaper, and it
            over-damps.
            `"newton"`: the same inverses by Newton's iteration, warm-started; products only. Both factored forms take
            the damping of the last refresh.
    """

    def __init__(self, solver: Literal["eigen", "factored", "newton"] = "eigen") -> None:
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
        self.solver = solver

    def obstacle(self, layer: Layer, config: Curvature) -> str:
        return config.beyond(*layer.sides)

    def allocate(self) -> None:
        self.Lambda = self.moment("Lambda", lambda g: (g.n_in,) if g.indexed else (g.n_in, g.n_in))
        self.Gamma = self.moment("Gamma", lambda g: (g.n_out, g.n_out))
        if self.solver == "eigen":
            # An embedding's input factor is diagonal: its eigenvalues are its entries, its basis the identity.
            self.l = self.buffer("l", lambda g: (g.n_in,))
            self.U_l = self.buffer("U_l", lambda g: (0, g.n_in) if g.indexed else (g.n_in, g.n_in))
            self.gamma = self.buffer("gamma", lambda g: (g.n_out,))
            self.U_g = self.buffer("U_g", lambda g: (g.n_out, g.n_out))
            for basis in (self.U_l, self.U_g):
                for stack in basis.stacks:
                    stack.copy_(torch.eye(*stack.shape[1:]))
        else:
            self.X_l = self.buffer("X_l", lambda g: (g.n_in,) if g.indexed else (g.n_in, g.n_in))
            self.X_g = self.buffer("X_g", lambda g: (g.n_out, g.n_out))
        self._stale = False
        self._valid = torch.ones((), dtype=torch.bool)
        self._kept: list[tuple[int, int] | None] | None = None
        self._seen: list[Tensor] | None = None
        self._scales: list[Tensor] | None = None

    def observe(self, layer: Layer, statistics: Statistics) -> None:
        self.Lambda.add(layer, statistics.input_sum(), statistics.rows)
        self.Gamma.add(layer, statistics.output_sum())

    def refresh(self, batch: Batch, decompose: bool) -> None:
        self.Lambda.update(batch, by_rows=True)
        self.Gamma.update(batch)
        self._valid = batch.valid  # decompositions of a step that is skipped change nothing
        self._kept = self._scales = None
        if decompose:
            self._seen = None
            if self.solver == "eigen":
                self._eigen(self.Lambda, self.l, self.U_l)
                self._eigen(self.Gamma, self.gamma, self.U_g)
            else:
                self._stale = True  # the inverses need the damping: `precondition` brings it

    def _eigen(self, factor: Stacked, values: Stacked, basis: Stacked) -> None:
        for stack, w, U in zip(factor.stacks, values.stacks, basis.stacks, strict=True):
            if stack.ndim == 2:
                w.copy_(torch.where(self._valid, stack, w))
                continue
            new_w, new_U, failed = eigh(stack)
            # Where every attempt failed, the previous basis stays; before the first one it is the axes.
            keep = (failed & (w.sum(1) != 0) | ~self._valid).view(-1, 1, 1)
            w.copy_(torch.where(keep.squeeze(2), w, new_w))
            U.copy_(torch.where(keep, U, new_U))
            self.failures = self.failures.to(failed.device) + failed.sum()

    def spectrum(self) -> list[Tensor]:
        """Eigenvalues of F per group, (k, n_out, n_in)."""
        return [kron_spectrum(gamma, l) for gamma, l in zip(self.gamma.values, self.l.values, strict=True)]

    def bases(self) -> list[tuple[Tensor, Tensor | None]]:
        """U_g and U_l per group; None is the identity."""
        pairs = zip(self.U_g.values, self.U_l.values, self.groups, strict=True)
        return [(U_g, None if group.indexed else U_l) for U_g, U_l, group in pairs]

    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        return self._solved(gradients, damping) if self.solver == "eigen" else self._factored(gradients, damping)

    def precondition_penalised(self, gradients: list[Tensor], damping: list[Tensor], rho: Tensor) -> list[Tensor]:
        # F has the eigenbasis that the system is solved in: the product costs nothing there.
        own = type(self)
        derived = (own.precondition, own.curvature_product) != (KFAC.precondition, KFAC.curvature_product)
        if self.solver == "eigen" and not derived:
            return self._solved(gradients, damping, rho)
        return super().precondition_penalised(gradients, damping, rho)

    def _solved(self, gradients: list[Tensor], damping: list[Tensor], rho: Tensor | None = None) -> list[Tensor]:
        """-(F + lam I)^{-1} (G + rho F G) in the eigenbasis: coordinates times -(1 + rho s)/(s + lam)."""
        directions = []
        if self._kept is None:
            self._kept = self._worth_keeping(rho)
        parts = zip(gradients, self.spectrum(), damping, self.bases(), self._kept, strict=True)
        for G, s, lam, (U_g, U_l), kept in parts:
            if kept is None:
                solved = rotate(G, U_g, U_l) / -(s + lam)
                if rho is not None:
                    solved *= 1 + rho.to(s.dtype) * s
                directions.append(rotate_back(solved, U_g, U_l))
            else:  # that is -1/lam + (1 - rho lam) s/(lam (s + lam)), and s next to nothing beside lam but in a corner
                a, b = kept
                s, U_g, U_l = s[:, -a:, -b:], U_g[:, :, -a:], None if U_l is None else U_l[:, :, -b:]
                part = s if rho is None else s * (1 - rho.to(s.dtype) * lam)
                corner = rotate(G, U_g, U_l) / (s + lam)
                directions.append(rotate_back(corner * part, U_g, U_l).sub_(G).div_(lam))
        return directions

    def _worth_keeping(self, rho: Tensor | None) -> list[tuple[int, int] | None]:
        """Per group how many of the last rows and columns of its spectrum are more than negligible beside the least
        damping, and beside 1/rho; None: all, or so many that nothing is gained. One look at values, once after each
        refresh."""
        kept: list[tuple[int, int] | None] = [None] * len(self.groups)
        floors = self.floors if rho is None else [floor / (1 + rho * floor) for floor in self.floors]
        parts = zip(self.spectrum(), self.groups, floors, strict=True)
        found = {
            i: leading(s, NEGLIGIBLE[s.dtype] * floor)
            for i, (s, group, floor) in enumerate(parts)
            if not group.indexed and max(group.n_out, group.n_in) > SMALL
        }
        for i, (a, b) in zip(found, torch.stack(list(found.values())).tolist() if found else (), strict=True):
            m, n = self.groups[i].n_out, self.groups[i].n_in
            if min(sandwich_costs(m, m, n, n)) > 1.5 * min(sandwich_costs(a, m, n, b)):
                kept[i] = a, b
        return kept

    def _factored(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        if self._stale:
            self._invert(damping)
            self._stale = False
        factors = zip(gradients, self.X_g.values, self.X_l.values, strict=True)
        return [-factored_precondition(G, X_g, X_l) for G, X_g, X_l in factors]

    def _invert(self, damping: list[Tensor]) -> None:
        shift_in, shift_out = [], []
        for Lambda, Gamma, lam in zip(self.Lambda.values, self.Gamma.values, damping, strict=True):
            pi, root = pi_split(Lambda, Gamma), lam.view(-1).sqrt()
            shift_in.append(pi * root)
            shift_out.append(root / pi)
        for factor, inverse, shifts in ((self.Lambda, self.X_l, shift_in), (self.Gamma, self.X_g, shift_out)):
            for stack, X, shift in zip(factor.stacks, inverse.stacks, factor.spread(shifts), strict=True):
                if stack.ndim == 2:
                    new = torch.where(stack.sum(1, keepdim=True) > 0, 1 / (stack + shift.unsqueeze(1)), X)
                else:
                    new = self._inverse(stack, X, shift)
                X.copy_(torch.where(self._valid, new, X))

    def _inverse(self, stack: Tensor, previous: Tensor, shift: Tensor) -> Tensor:
        if self.solver != "newton":
            return self._cholesky(stack, previous, shift)
        damped = stack + shift.view(-1, 1, 1) * torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        X, _, residual = newton_inverse(damped, previous)
        open_ = ~(residual < 1e-2)  # ill-conditioned beyond 25 rounds: Cholesky takes over
        if bool(open_.any()):
            X[open_] = self._cholesky(stack[open_], previous[open_], shift[open_])
        return X

    def _cholesky(self, stack: Tensor, previous: Tensor, shift: Tensor) -> Tensor:
        """Inverses; where that fails the previous ones, and before the first ones that of the diagonal."""
        X, failed = damped_inverse(stack, shift)
        self.failures = self.failures.to(failed.device) + failed.sum()
        keep = failed & (previous.flatten(1) != 0).any(1)
        return torch.where(keep.view(-1, 1, 1), previous, X)

    def decomposition_cost(self) -> float:
        sizes = (n for g in self.groups for n in (*([] if g.indexed else [g.n_in]), g.n_out) for _ in range(g.size))
        return COSTS[self.solver] * sum(n**2 * (n + SMALL_SIZES) for n in sizes)

    def curvature_product(self, gradients: list[Tensor]) -> list[Tensor]:
        if self.solver == "eigen":  # the F that is inverted: with a younger one F^{-1} F g could be anything
            parts = zip(gradients, self.spectrum(), self.bases(), strict=True)
            return [rotate_back(s * rotate(G, *both), *both) for G, s, both in parts]
        factors = zip(gradients, self.Gamma.values, self.Lambda.values, strict=True)
        return [kron_product(G, Gamma, Lambda) for G, Gamma, Lambda in factors]

    def load_state(self, layer: Layer, state: dict[str, Tensor]) -> None:
        super().load_state(layer, state)
        self._kept = self._seen = self._scales = None
        self._stale = False

    def measured(self) -> list[Tensor]:
        # By what the last decomposition saw: a factor may have been measured only since.
        if self._seen is None:
            seen = self.l.values if self.solver == "eigen" else [X.flatten(1) for X in self.X_l.values]
            self._seen = [(values.sum(1) != 0).view(-1, 1, 1) for values in seen]
        return self._seen

    def scales(self) -> list[Tensor]:
        """The largest eigenvalue of F in every matrix; under the factored forms the product of the factors' traces."""
        if self._scales is None:
            if self.solver == "eigen":
                self._scales = [s.amax((1, 2), keepdim=True) for s in self.spectrum()]
            else:
                self._scales = [
                    (
                        Gamma.diagonal(dim1=1, dim2=2).sum(1)
                        * (L.amax(1) if L.ndim == 2 else L.diagonal(dim1=1, dim2=2).sum(1))
                    ).view(-1, 1, 1)
                    for Gamma, L in zip(self.Gamma.values, self.Lambda.values, strict=True)
                ]
        return self._scales
