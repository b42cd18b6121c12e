"""How much is added to the curvature: lam = rho ||g||^2 + lam0."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grng.kernels import norms
from grng.variants import Variant

if TYPE_CHECKING:
    from grng.preconditioners import Preconditioner

STATE, FACTOR = "grng_damping", "grng_damping_factor"  # their names in a checkpoint
ABSOLUTE_FLOOR = 1e-8
MEMORY = 0.9  # of the mean of ||g||^2
OUTLIER = 100.0  # times that mean is the most that one gradient counts
ADAPT_EVERY = 5  # steps between comparisons of the loss with its quadratic model
ADAPT_RATE = 19 / 20  # of the damping, a step
ADAPT_MOST = 1e6  # times more or less than without
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
        adapts: whether lam0 is multiplied by a factor that follows the reduction of the loss.
    """

    def __init__(
        self, variant: Variant, rho: Any, lam0: float | None, device: torch.device, adapts: bool = False
    ) -> None:
        self.variant, self.given_rho, self.given_floor = variant, None if rho == "auto" else rho, lam0
        self.adapts, self.every = adapts, ADAPT_EVERY
        self.place(device)

    def place(self, device: torch.device) -> None:
        """Begin anew on a device."""
        # In float64, so that a setting reaches float64 factors unrounded.
        self.latest = self.largest = self.norm = torch.zeros((), dtype=torch.float64, device=device)  # s, S, N
        self.mean = self.weight = self.latest  # of ||g||^2 over MEMORY, and how much of that memory is filled
        self.one = self.outputs = self.factor = torch.ones_like(self.latest)
        self.settled = False
        self._derive()

    @property
    def _told(self) -> bool:
        """Whether there is nothing to follow."""
        return None not in (self.given_rho, self.given_floor)

    @property
    def _fades(self) -> bool:
        return self.given_rho is None and self.variant.regularization == "damping" and self.variant.strength > 0

    def _derive(self) -> None:
        """rho and lam0 from s, S and N."""
        v = self.variant
        if self.given_rho is not None:
            self.rho = self.one * self.given_rho
        elif v.regularization == "penalty":
            self.rho = torch.where(self.latest > 0, v.strength / self.latest.clamp(min=ABSOLUTE_FLOOR), 0.0)
        else:
            self.rho = v.strength * self.largest / self.norm.clamp(min=1e-30)
        if self.given_floor is not None:
            self.floor = self.one * self.given_floor
        else:  # the filter needs no floor: its prior is one
            self.floor = (self.factor * v.floor * self.largest).clamp(min=ABSOLUTE_FLOOR if v.floor else 0.0)

    def __call__(self, square_norm: Tensor) -> Tensor:
        rho = self.rho if self.variant.regularization == "damping" else 0.0
        lam = rho * square_norm + self.floor
        return torch.nan_to_num(lam, nan=1.0, posinf=1.0)  # not finite only in a step that is skipped

    def note(self, preconditioner: "Preconditioner", square_norm: Tensor, ok: Tensor, refreshed: bool) -> None:
        """Bring what is relative up to date, in every step: N by its gradient, s and S where F was `refreshed`."""
        if self.settled:
            return
        if self._fades:
            most = torch.where(self.mean > 0, OUTLIER * self.mean, torch.inf)
            sample = torch.minimum(square_norm.to(self.one), most)
            weight = MEMORY * self.weight + (1 - MEMORY)
            mean = self.mean.lerp(sample, (1 - MEMORY) / weight)
            self.weight, self.mean = torch.where(ok, weight, self.weight), torch.where(ok, mean, self.mean)
            self.norm = torch.maximum(self.norm, self.mean)
        refreshed &= not self._told
        if refreshed:
            s = preconditioner.largest_curvature().to(self.one)
            sound = ok & s.isfinite()
            self.latest = torch.where(sound, s, self.latest)
            self.largest = torch.where(sound, torch.maximum(s, FADE * self.largest), self.largest)
        if refreshed or self._fades:
            self._derive()
        if not self.variant.follows:
            self.settled = self._told or bool(self.largest > 0)  # a look at the value, until it is settled

    def adapt(self, actual: Tensor, predicted: Tensor) -> None:
        """Make the factor follow how the loss changed beside how its quadratic model said it would."""
        self.factor = adapted(self.factor, actual.to(self.one), predicted.to(self.one), self.every)
        self._derive()

    def state(self) -> dict[str, Tensor]:
        factor = {FACTOR: self.factor} if self.adapts else {}
        return factor | {
            STATE: torch.stack([self.latest, self.largest, self.norm, self.mean, self.weight, self.outputs])
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What was seen comes back; what the constructor sets stays as it was set."""
        self.latest, self.largest, self.norm, self.mean, self.weight, self.outputs = state[STATE].clone()
        if self.adapts:
            self.factor = state[FACTOR].clone()
        self.settled = not self.variant.follows and (self._told or bool(self.largest > 0))
        self._derive()


def adapted(factor: Tensor, actual: Tensor, predicted: Tensor, every: int = ADAPT_EVERY) -> Tensor:
    r"""The rule of Levenberg and Marquardt, as Martens & Grosse (2015, section 6.5) have it, every T steps.

        r = (L(theta + delta) - L(theta)) / (g^T delta + 1/2 delta^T F delta)
        factor <- factor w^T where r > 3/4,   factor w^{-T} where r < 1/4,   w = 19/20

    delta is what the step did, with momentum and decay in it. Derived here: a loss that is not finite counts as
    r < 1/4; where the model itself foretells no descent, a loss that rises does; the factor stays within 10^6 either
    way.

    Args:
        factor: that multiplies the damping.
        actual: how the loss changed.
        predicted: how its quadratic model said that it would.
        every: T.

    >>> factor = torch.tensor(1.0, dtype=torch.float64)
    >>> [round(adapted(factor, torch.tensor(a), torch.tensor(-1.0)).item(), 3) for a in (-0.9, -0.5, 0.1)]
    [0.774, 1.0, 1.292]
    """
    descent = predicted < 0
    ratio = actual / torch.where(descent, predicted, -1.0)
    worse = ~(ratio >= torch.where(descent, 0.25, 0.0)) | ratio.isinf()
    better = descent & (ratio > 0.75)
    rate = ADAPT_RATE**every
    changed = torch.where(worse, factor / rate, torch.where(better, factor * rate, factor))
    return changed.clamp(1 / ADAPT_MOST, ADAPT_MOST)


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """||g||^2 over all tensors, in at least float32.

    >>> squared_norm([torch.ones(2), torch.tensor([2.0])]).item()
    6.0
    """
    return norms(tensors).square().sum()
