"""How much is added to the curvature, lam = rho ||g||^2 + lam0, and the trust region."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grng.variants import Variant

if TYPE_CHECKING:
    from grng.preconditioners import Preconditioner

ABSOLUTE_FLOOR = 1e-8


class Damping:
    """lam(||g||^2) = rho ||g||^2 + lam0, both on the device.

    What is not set is settled by the first finite batch, relative to its largest curvature s (derived here):

        lam0 = floor * s (at least 1e-8),   rho = strength * s / ||g_0||^2 under damping,   strength / s under a penalty

    so that neither depends on the scale of the loss or of the parameters. A penalty's rho follows s, because
    lr (1 + rho s) < 2 bounds its stability. A floor is mandatory: with a stale or low-rank F the step is 1/(rho ||g||)
    without it.

    Args:
        variant: its regularization and its default strengths.
        rho: a number or "auto".
        lam0: a number or None.
        device: of the scalars.
    """

    def __init__(self, variant: Variant, rho: Any, lam0: float | None, device: torch.device) -> None:
        self.variant, self.auto_rho, self.auto_floor = variant, rho == "auto", lam0 is None
        # float64, so that a setting reaches float64 factors unrounded.
        self.rho = torch.full((), torch.nan if self.auto_rho else rho, dtype=torch.float64, device=device)
        self.floor = torch.full((), torch.nan if lam0 is None else lam0, dtype=torch.float64, device=device)
        self.settled = not (self.auto_rho or self.auto_floor)

    def strength(self) -> Tensor:
        """rho; zero while it is not settled."""
        return torch.nan_to_num(self.rho)

    def __call__(self, square_norm: Tensor) -> Tensor:
        rho = self.strength() if self.variant.regularization == "damping" else 0.0
        lam = rho * square_norm + torch.nan_to_num(self.floor)
        return torch.nan_to_num(lam, nan=1.0, posinf=1.0)  # not finite only in a step that is skipped

    def settle(self, preconditioner: "Preconditioner", square_norm: Tensor, ok: Tensor) -> None:
        """After a refresh: fix what is relative to the curvature, where it is not fixed yet."""
        penalty = self.variant.regularization == "penalty"
        if self.settled and not (self.auto_rho and penalty):
            return
        largest = preconditioner.largest_curvature().to(self.rho.dtype)
        ok = ok & largest.isfinite()
        if self.auto_floor:
            # The filter needs none: its prior is the floor.
            floor = (self.variant.floor * largest).clamp(min=ABSOLUTE_FLOOR if self.variant.floor else 0.0)
            self.floor = torch.where(torch.isnan(self.floor) & ok, floor, self.floor)
        if self.auto_rho and penalty:
            self.rho = torch.where(ok, self.variant.strength / largest.clamp(min=ABSOLUTE_FLOOR), self.rho)
        elif self.auto_rho:
            rho = torch.where(square_norm > 0, self.variant.strength * largest / square_norm.clamp(min=1e-30), 0.0)
            self.rho = torch.where(torch.isnan(self.rho) & ok, rho, self.rho)
        self.settled = self.settled or self._known()

    def _known(self) -> bool:
        """A look at values, until they are settled."""
        return not bool(torch.isnan(self.rho) | torch.isnan(self.floor))

    def state(self) -> dict[str, Tensor]:
        return {"grng_rho": self.rho, "grng_floor": self.floor}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """What was settled comes back; what the constructor sets stays as it was set."""
        if self.auto_rho:
            self.rho = state["grng_rho"].clone()
        if self.auto_floor:
            self.floor = state["grng_floor"].clone()
        self.settled = self._known()


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """||g||^2 over all tensors, in at least float32.

    >>> squared_norm([torch.ones(2), torch.tensor([2.0])]).item()
    6.0
    """
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()


def kl_scale(limit: float, quadratic: Tensor) -> Tensor:
    """nu = min(1, sqrt(kappa / (lr^2 sum_layers <D, F D>))) given that quadratic form.

    >>> kl_scale(1.0, torch.tensor(4.0)).item()
    0.5
    """
    return (limit / quadratic.clamp(min=torch.finfo(quadratic.dtype).tiny)).sqrt().clamp(max=1)
