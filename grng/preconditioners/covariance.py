"""What the Kalman filter believes about one group of matrices: three forms of covariance, with one interface."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grng.kernels import (
    DenseColumns,
    Part,
    eigh,
    pieces,
    propagate_fd,
    propagate_kron_,
    propagate_vd,
    semidefinite_root,
)

EVERYTHING: Part = (slice(None), slice(None))
Parts = Sequence[tuple[slice, Any]]  # which matrices of the group, and what a batch says about them


class Covariance(Protocol):
    """P of k matrices (n_out, n_in), as the filter needs it. `parts` hold the columns of V; the matrices that no part
    names have none.

        predict      P_pred from P
        measure      V^T q V and V^T q g, q the regularised P_pred
        direction    q (V z - N g), for the z of the gain
        commit       P <- the projection of (P_pred^{-1} + V V^T)^{-1}
    """

    def begin(self, first: Tensor, p0: Tensor) -> None:
        """P = p0 I for the matrices (k,) that start now."""

    def sound(self) -> Tensor:
        """Which matrices (k,) have a P that is finite, and not negative on its diagonal."""

    def predict(self, growth: float, noise: float, cap: Tensor) -> None:
        """P_pred = growth P + noise I, at most cap (k,)."""

    def measure(self, parts: Parts, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """(m, m) and (m,) for a gradient g and lam (k, 1, 1); None where there are no columns."""

    def direction(self, parts: Parts, z: Tensor, g: Tensor, N: Tensor) -> Tensor:
        """After `measure`."""

    def prior_gram(self, parts: Parts) -> Tensor | None:
        """V^T P_pred V where `commit` needs its root."""

    def commit(self, parts: Parts, root: Tensor | None, valid: Tensor) -> None:
        """Propagate, if valid; root is the lower Cholesky factor of I + V^T P_pred V over all groups."""

    def variance(self) -> Tensor:
        """The diagonal of P, (k, n_out, n_in)."""

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """A draw from N(0, P)."""

    def spread(self, slots: slice, columns: Any) -> Tensor:
        """v^T P v for every column v of the matrices in these slots, (m,)."""


def _residual(parts: Parts, z: Tensor, g: Tensor, N: Tensor) -> Tensor:
    """V z - N g."""
    N = -N.to(g.dtype)
    if len(parts) == 1 and parts[0][1].e.shape[0] == len(g):
        return parts[0][1].combine(z).addcmul_(g, N)
    out = N * g
    for slots, columns in parts:
        out[slots].add_(columns.combine(z))
    return out


def added(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Sums of V^T q V and of V^T q g; None of nothing."""
    return (torch.stack([a for a, _ in pairs]).sum(0), torch.stack([b for _, b in pairs]).sum(0)) if pairs else None


class Predicted:
    """p_pred = min(growth p + noise, cap), part by part: it is never held."""

    def __init__(self, p: Tensor, growth: float, noise: float, cap: Tensor) -> None:
        self.p, self.growth, self.noise, self.cap = p, growth, noise, cap

    def __getitem__(self, part: Part) -> Tensor:
        found = self.p[part] * self.growth
        if self.noise:
            found += self.noise
        return torch.minimum(found, self.cap[part[0]], out=found)

    def of(self, slots: slice) -> "Predicted":
        """Of these matrices."""
        return Predicted(self.p[slots], self.growth, self.noise, self.cap[slots])


class Diagonal:
    """P = diag(p), p (k, n_out, n_in).

    vd: p = 1/(1/p + rowsum V^2). fd: the diagonal of the exact posterior covariance. q = p / (1 + lam p), exactly.
    """

    def __init__(self, p: Tensor, projection: str) -> None:
        self.p, self.projection = p, projection
        self.predict(1.0, 0.0, p.new_full(p.shape[:1], torch.inf))

    def begin(self, first: Tensor, p0: Tensor) -> None:
        self.p.copy_(torch.where(first.view(-1, 1, 1), p0, self.p))

    def sound(self) -> Tensor:
        low, high = self.p.flatten(1).aminmax(dim=1)
        return (low >= 0) & (high < torch.inf)

    def predict(self, growth: float, noise: float, cap: Tensor) -> None:
        self._prior = Predicted(self.p, growth, noise, cap.view(-1, 1, 1))
        self._squares: Tensor | None = None

    def _pieces(self) -> Iterator[Part]:
        k, n_out, n_in = self.p.shape
        return pieces(k, n_out, 2 * n_in, self.p.device)

    def measure(self, parts: Parts, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        self._lam, self._squares = lam, torch.zeros_like(self.p)
        squares = self._squares
        return added([c.measure(self._prior.of(s), lam[s], g[s], squares[s]) for s, c in parts])

    def direction(self, parts: Parts, z: Tensor, g: Tensor, N: Tensor) -> Tensor:
        out = _residual(parts, z, g, N)
        for part in self._pieces():
            prior = self._prior[part]
            out[part].mul_(prior).div_((self._lam[part[0]] * prior).add_(1))
        return out

    def prior_gram(self, parts: Parts) -> Tensor | None:
        if self.projection == "vd":
            return None
        grams = [columns.gram(self._prior.of(slots)) for slots, columns in parts]
        return torch.stack(grams).sum(0) if grams else None

    def commit(self, parts: Parts, root: Tensor | None, valid: Tensor) -> None:
        squares, whitened = self._squares, None
        if squares is None:  # no gradient asked for a direction
            squares = torch.zeros_like(self.p)
            for slots, columns in parts:
                squares[slots] = columns.squares(squares[slots])
        if root is not None:
            whitened = torch.zeros_like(self.p)
            for slots, columns in parts:
                whitened[slots] = columns.whitened_squares(root, whitened[slots])
        for part in self._pieces():
            prior = self._prior[part]
            if whitened is None:
                new = propagate_vd(prior, squares[part])
            else:
                new = propagate_fd(prior, whitened[part], squares[part])
            p = self.p[part]
            torch.where(valid, new, p, out=p)

    def variance(self) -> Tensor:
        return self.p

    def spread(self, slots: slice, columns: Any) -> Tensor:
        return columns.lengths(self.p[slots])

    def draw(self, generator: torch.Generator | None) -> Tensor:
        return self.p.sqrt() * _normal(self.p, generator)


class Separate(Diagonal):
    """P = diag(p) of parameters that are known by the square of one summed gradient: coupled to nothing, not even to
    each other. parts hold these squares."""

    def measure(self, parts: Parts, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        self._lam = lam
        return None

    def direction(self, parts: Parts, z: Tensor, g: Tensor, N: Tensor) -> Tensor:
        prior = self._prior[EVERYTHING]
        q = propagate_vd(prior / (1 + self._lam * prior), self._information(parts))
        return -q * N.to(g.dtype) * g

    def prior_gram(self, parts: Parts) -> Tensor | None:
        return None

    def commit(self, parts: Parts, root: Tensor | None, valid: Tensor) -> None:
        new = propagate_vd(self._prior[EVERYTHING], self._information(parts))
        torch.where(valid, new, self.p, out=self.p)

    def _information(self, parts: Parts) -> Tensor:
        total = torch.zeros_like(self.p)
        for slots, squares in parts:
            total[slots] = squares
        return total


class Kronecker:
    """P = P_out (x) P_in matrix by matrix, P_out (k, n_out, n_out) with unit mean diagonal, P_in (k, n_in, n_in).

    q = (P^{-1} + lam I)^{-1} is no Kronecker product. gain "trace": q = P / (1 + lam tr(P)/d), which is exact where P
    is a multiple of the identity; gain "exact": in the eigenbasis of P, two eigendecompositions a step.
    """

    def __init__(self, P_out: Tensor, P_in: Tensor, gain: str) -> None:
        self.P_out, self.P_in, self.gain = P_out, P_in, gain
        self._growth = self._shrink = P_out.new_ones(len(P_out), 1, 1)  # P_pred = growth P, q = shrink P_pred
        self._moved: list[DenseColumns] = []  # columns P_out V P_in
        self._rotated: tuple[Diagonal, Parts, Tensor, Tensor] | None = None

    def begin(self, first: Tensor, p0: Tensor) -> None:
        for P, size in ((self.P_out, 1.0), (self.P_in, p0)):
            eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
            P.copy_(torch.where(first.view(-1, 1, 1), size * eye, P))

    def sound(self) -> Tensor:
        both = (self.P_out, self.P_in)
        positive = [(P.diagonal(dim1=1, dim2=2) >= 0).all(1) & P.sum((1, 2)).isfinite() for P in both]
        return positive[0] & positive[1]

    def _mean(self) -> Tensor:
        """tr(P)/d, (k, 1, 1)."""
        means = [P.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) for P in (self.P_out, self.P_in)]
        return means[0] * means[1]

    def predict(self, growth: float, noise: float, cap: Tensor) -> None:
        mean = self._mean()
        self._growth = torch.minimum(growth + noise / mean, cap.view(-1, 1, 1) / mean)
        self._moved = []

    def _move(self, parts: Parts) -> list[DenseColumns]:
        if not self._moved:
            self._moved = [columns.transformed(self.P_out[slots], self.P_in[slots]) for slots, columns in parts]
        return self._moved

    def measure(self, parts: Parts, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.gain == "exact":
            return self._measure_rotated(parts, lam, g)
        self._shrink = self._growth / (1 + lam * self._growth * self._mean())
        pairs = []
        for (slots, columns), moved in zip(parts, self._move(parts), strict=True):
            scaled = moved.scaled(self._shrink[slots])
            pairs.append((scaled.cross(columns), scaled.inner(g[slots])))
        return added(pairs)

    def _measure_rotated(self, parts: Parts, lam: Tensor, g: Tensor) -> tuple[Tensor, Tensor] | None:
        (w_out, U_out, _), (w_in, U_in, _) = eigh(self.P_out), eigh(self.P_in)
        rotated = Diagonal(w_out.unsqueeze(2) * w_in.unsqueeze(1) * self._growth, "vd")
        turned = [(slots, columns.transformed(U_out[slots], U_in[slots])) for slots, columns in parts]
        self._rotated = rotated, turned, U_out, U_in
        return rotated.measure(turned, lam, U_out.mT @ g @ U_in)

    def direction(self, parts: Parts, z: Tensor, g: Tensor, N: Tensor) -> Tensor:
        if self._rotated is not None:
            (rotated, turned, U_out, U_in), self._rotated = self._rotated, None
            return U_out @ rotated.direction(turned, z, U_out.mT @ g @ U_in, N) @ U_in.mT
        return torch.bmm(self._shrink * self.P_out, torch.bmm(_residual(parts, z, g, N), self.P_in))

    def prior_gram(self, parts: Parts) -> Tensor | None:
        return None

    def commit(self, parts: Parts, root: Tensor | None, valid: Tensor) -> None:
        self.P_in.mul_(torch.where(valid, self._growth, 1.0))
        for (slots, columns), moved in zip(parts, self._move(parts), strict=True):
            PV = DenseColumns(moved.x * self._growth[slots].unsqueeze(1), moved.e)
            propagate_kron_(self.P_out[slots], self.P_in[slots], columns, PV, valid)
        self._moved = []

    def variance(self) -> Tensor:
        return self.P_out.diagonal(dim1=1, dim2=2).unsqueeze(2) * self.P_in.diagonal(dim1=1, dim2=2).unsqueeze(1)

    def spread(self, slots: slice, columns: Any) -> Tensor:
        return columns.transformed(self.P_out[slots], self.P_in[slots]).dot(columns)

    def draw(self, generator: torch.Generator | None) -> Tensor:
        root_out, root_in = semidefinite_root(self.P_out), semidefinite_root(self.P_in)
        return root_out @ _normal(self.variance(), generator) @ root_in.mT


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
