"""R, the noise of a Gaussian likelihood: given, or estimated from the innovations as training goes on."""

from typing import Literal

import torch
from torch import Tensor

from grng.distributed import Processes
from grng.errors import finite, invalid
from grng.kernels import eigh

KINDS = ("scalar", "diagonal", "full")
UNIT = 0.5  # the R at which sum of squares is the negative log likelihood
FLOOR = 1e-6  # of the first estimate: smallest eigenvalue of a later one
MEMORY = 200.0  # predictions that an average holds at least


def check_noise(noise: float | str) -> None:
    """A variance, or how it is estimated."""
    if isinstance(noise, str) and noise in ("auto", *KINDS):
        return
    if not (finite(noise) and noise > 0):  # type: ignore[operator]
        raise invalid("noise", noise, 'a finite number > 0, "auto", "scalar", "diagonal" or "full"')


class Noise:
    """Running average of the innovations' outer products, eigenvalues bounded below.

        c <- d c + n,   R <- (d c R + sum_i e_i e_i^T) / c,    d = max(b, 1 - n/200)

    over the n predictions of a step, e = y - f as it was before the step; the first step's own R serves it. A scalar R
    enters as the scale of the loss; a diagonal or full one weights the gradient at the output, R^{-1} in place of 2 I,
    so that `p.grad` is that of the weighted loss.

    Args:
        noise: a variance, or "scalar", "diagonal", "full"; "auto" is the variance 1/2, whose negative log likelihood
            is the sum of squares.
        decay: b.
    """

    def __init__(self, noise: float | Literal["auto", "scalar", "diagonal", "full"], decay: float) -> None:
        self.kind = noise if isinstance(noise, str) and noise != "auto" else "fixed"
        self.decay = decay
        self.value: Tensor | None = None  # () or (C, C)
        self._fixed = UNIT if noise == "auto" else noise
        self._count: Tensor | None = None
        self._floor: Tensor | None = None
        self._sum: Tensor | None = None
        self._fresh: Tensor | None = None

    @property
    def estimated(self) -> bool:
        return self.kind != "fixed"

    @property
    def weights(self) -> bool:
        """Whether the gradient at the output is changed."""
        return self.kind in ("diagonal", "full")

    def begin(self, like: Tensor) -> None:
        """Put a fixed R where the outputs are."""
        if self.value is None and not self.estimated:
            self.value = like.new_tensor(self._fixed)

    def observe(self, residuals: Tensor, valid: Tensor, processes: Processes | None = None) -> None:
        """Take the residuals (n, C) of one backward pass, where R is estimated; valid (n, 1)."""
        if self.kind == "scalar":
            total = residuals.square().mean(-1).sum()
        else:
            total = residuals.mT @ residuals
            if self.kind == "diagonal":
                total = total.diagonal().diag()
        count = valid.sum().to(residuals.dtype)
        if self.value is not None and self._count is not None and self._floor is not None:
            self.value, self._count, self._floor = (t.to(total) for t in (self.value, self._count, self._floor))
        self._sum = total if self._sum is None else self._sum + total
        self._fresh = count if self._fresh is None else self._fresh + count
        if self.value is None:
            if processes is not None:  # it serves this very pass
                total, count = total.clone(), count.clone()
                processes.sum_([total, count])
            self._count = torch.zeros_like(count)
            first = torch.nan_to_num(total / count.clamp(min=1), nan=UNIT, posinf=UNIT)
            mean = first if first.ndim == 0 else first.diagonal().mean()
            self._floor = (FLOOR * mean).clamp(min=1e-30)
            self.value = self._bounded(first)

    def fold(self, valid: Tensor) -> None:
        """After a step: average what it has seen, if it was valid."""
        if self._sum is None or self._fresh is None or self._count is None or self.value is None:
            return
        keep = (1 - self._fresh / MEMORY).clamp(min=self.decay)
        kept = keep * self._count
        count = kept + self._fresh
        new = self._bounded((kept * self.value + self._sum) / count.clamp(min=1))
        ok = valid & (self._fresh > 0) & torch.isfinite(self._sum).all()
        self.value = torch.where(ok, new, self.value)
        self._count = torch.where(ok, count, self._count)
        self.forget()

    def pending(self) -> list[Tensor]:
        """What the step has seen, as sums."""
        if not self.estimated or self.value is None or self._count is None:
            return []
        if self._sum is None or self._fresh is None:
            self._sum, self._fresh = torch.zeros_like(self.value), torch.zeros_like(self._count)
        return [self._sum, self._fresh]

    def forget(self) -> None:
        """Drop what the step has seen."""
        self._sum = self._fresh = None

    def _bounded(self, R: Tensor) -> Tensor:
        assert self._floor is not None
        if R.ndim == 0:
            return R.clamp(min=self._floor)
        w, U, _ = eigh(torch.nan_to_num(R).unsqueeze(0))
        return (U[0] * w[0].clamp(min=self._floor)) @ U[0].mT

    # How it enters.

    def information(self) -> Tensor:
        """What a scalar R multiplies the loss by, 1/(2 R)."""
        assert self.value is not None
        return UNIT / self.value if self.value.ndim == 0 else torch.ones_like(self.value[0, 0])

    def weighted(self, gradient: Tensor) -> Tensor:
        """Rows (..., C) of 2 (f - y) / N as rows of R^{-1} (f - y) / N."""
        return gradient @ self._weight(1.0)

    def scores(self, unit: Tensor) -> Tensor:
        """Rows whose second moment is 2 I as rows whose second moment is R^{-1}."""
        assert self.value is not None
        if self.value.ndim == 0:
            return unit * (UNIT / self.value).sqrt()
        return unit @ self._weight(0.5)

    def _weight(self, power: float) -> Tensor:
        """A power of (2 R)^{-1}, (C, C)."""
        assert self.value is not None
        w, U, _ = eigh(self.value.unsqueeze(0))
        return (U[0] * (UNIT / w[0]) ** power) @ U[0].mT

    def state(self) -> dict[str, Tensor]:
        names = ("noise", "noise_count", "noise_floor")
        if not self.estimated or (self.value is None and self.weights):
            return {}
        if self.value is None or self._count is None or self._floor is None:
            return {name: torch.zeros((), dtype=torch.float64) for name in names}  # not known yet: no noise is zero
        return dict(zip(names, (self.value, self._count, self._floor), strict=True))

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.estimated:
            known = "noise" in state and bool(state["noise"].any())
            self.value, self._count, self._floor = (
                state[name].clone() if known else None for name in ("noise", "noise_count", "noise_floor")
            )
        self.forget()
