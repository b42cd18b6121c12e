"""How much is added to the curvature, lam = rho ||g||^2 + lam0, and the trust region."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grng.variants import Variant

if TYPE_CHECKING:
    from grng.preconditioners import Preconditioner

ABSOLUTE_FLOOR = 1e-8
MEMORY = 0.9  # of the mean of ||g||^2
OUTLIER = 100.0  # times that mean is the most that one gradient counts
FADE = 0.98  # of the largest curvature, a refresh: after a batch out of all proportion it comes back


class Damping:
    """lam(||g||^2) = rho ||g||^2 + lam0, both on the device.

    What is not set follows what was seen so far: S, the largest eigenvalue that F has had, s, the one it has now, and
    N, the largest running mean of ||g||^2 (derived here; S fades by a fiftieth a refresh, and a gradient counts for at
    most 100 times the mean, so that one batch out of all proportion does not set them for good):

        lam0 = floor * S (at least 1e-8),   rho = strength * S / N under damping,   strength / s under a penalty

    so that neither depends on the scale of the loss or of the parameters, and lam is about (strength + floor) S where
    the gradient is at its largest, and fades with it. After a small initialisation both grow by orders of magnitude
    within ten steps: damping that suits the first batch then holds nothing, or freezes everything. A penalty's rho goes
    by s, because lr (1 + rho s) < 2 bounds its stability. The filter's s is one of its prior, and settled with N by
    the first batch. A floor is mandatory: with a stale or low-rank F the step is 1/(rho ||g||) without it.

    Args:
        variant: its regularization and its default strengths.
        rho: a number or "auto".
        lam0: a number or None.
        device: of the scalars.
    """

    def __init__(self, variant: Variant, rho: Any, lam0: float | None, device: torch.device) -> None:
        self.variant, self.given_rho, self.given_floor = variant, None if rho == "auto" else rho, lam0
        # In float64, so that a setting reaches float64 factors unrounded.
        self.latest = self.largest = self.norm = torch.zeros((), dtype=torch.float64, device=device)  # s, S, N
        self.running = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # the mean of ||g||^2 times its weight, and that
        self.one = torch.ones((), dtype=torch.float64, device=device)
        self.settled = False
        self._derive()

    @property
    def _fades(self) -> bool:
        return self.given_rho is None and self.variant.regularization == "damping" and self.variant.strength > 0

    def _derive(self) -> None:
        """lam0, and what rho is but for N."""
        v = self.variant
        # The filter needs no floor: its prior is one.
        floor = (v.floor * self.largest).clamp(min=ABSOLUTE_FLOOR) if v.floor else torch.zeros_like(self.one)
        self.floor = floor if self.given_floor is None else self.one * self.given_floor
        if self.given_rho is not None:
            self.rho = self.one * self.given_rho
        elif v.regularization == "penalty":
            self.rho = torch.where(self.latest > 0, v.strength / self.latest.clamp(min=ABSOLUTE_FLOOR), 0.0)
        else:
            self.scale = v.strength * self.largest
            self._fade()

    def _fade(self) -> None:
        self.rho = self.scale / self.norm.clamp(min=1e-30)

    def strength(self) -> Tensor:
        """rho; zero before anything was measured."""
        return self.rho

    def __call__(self, square_norm: Tensor) -> Tensor:
        rho = self.rho if self.variant.regularization == "damping" else 0.0
        lam = rho * square_norm + self.floor
        return torch.nan_to_num(lam, nan=1.0, posinf=1.0)  # not finite only in a step that is skipped

    def note(self, preconditioner: "Preconditioner", square_norm: Tensor, ok: Tensor, refreshed: bool) -> None:
        """Bring what is relative up to date, in every step: N by its gradient, s and S where F was `refreshed`."""
        if self.settled:
            return
        if self._fades:
            mean = self.running[0] / self.running[1]
            most = torch.where(mean > 0, OUTLIER * mean, torch.inf)
            sample = torch.stack([torch.minimum(square_norm.to(self.one), most), self.one])
            running = self.running.lerp(sample, 1 - MEMORY)
            self.running = torch.where(ok, running, self.running)
            self.norm = torch.where(ok, torch.maximum(self.norm, running[0] / running[1]), self.norm)
        if refreshed and None in (self.given_rho, self.given_floor):
            s = preconditioner.largest_curvature().to(self.one)
            sound = ok & s.isfinite()
            self.latest = torch.where(sound, s, self.latest)
            self.largest = torch.where(sound, torch.maximum(s, FADE * self.largest), self.largest)
            self._derive()
        elif self._fades:
            self._fade()
        if not self.variant.follows:
            self.settled = bool(self.largest > 0)  # a look at the value, until it is settled

    def state(self) -> dict[str, Tensor]:
        return {"grng_damping": torch.stack([self.latest, self.largest, self.norm, *self.running])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What was seen comes back; what the constructor sets stays as it was set."""
        self.latest, self.largest, self.norm, *running = state["grng_damping"].clone()
        self.running = torch.stack(running)
        self.settled = not self.variant.follows and bool(self.largest > 0)
        self._derive()


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """||g||^2 over all tensors, in at least float32.

    >>> squared_norm([torch.ones(2), torch.tensor([2.0])]).item()
    6.0
    """
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()


def kl_scale(limit: float, quadratic: Tensor) -> Tensor:
    """nu = min(1, sqrt(kappa / (lr^2 sum_layers <D, (F + lam I) D>))) given that quadratic form.

    With lam in it, because a step into directions in which F holds next to nothing, and the damping all, would else
    have no bound: F there is known least, and grows fastest after a small initialisation.

    >>> kl_scale(1.0, torch.tensor(4.0)).item()
    0.5
    """
    return (limit / quadratic.clamp(min=torch.finfo(quadratic.dtype).tiny)).sqrt().clamp(max=1)
