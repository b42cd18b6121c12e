"""The variants: each one sentence made of parts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from grng.curvature import Curvature
from grng.curvature.config import LEVENBERG_MARQUARDT
from grng.errors import invalid, unknown
from grng.preconditioners import Preconditioner


@dataclass(frozen=True)
class Variant:
    """A preconditioner, how the gradient norm enters, and defaults that train untuned.

    Attributes:
        preconditioner: name in the registry.
        regularization: `"damping"`, lam = rho ||g||^2 + lam0 (implicit); `"penalty"`, the gradient of
            L + rho/2 ||g||^2 (explicit); None.
        lr, momentum: defaults.
        strength: of rho="auto", in units of the largest curvature seen; 0: rho is 0.
        floor: of lam0, in the same units.
        follows: whether these units go on being measured; else the first batch settles them.
        step_clip: default trust region of every layer's own.
        layerwise: whether damping is relative to each layer's own curvature where nothing else is said.
        settings: of the preconditioner.
    """

    preconditioner: str
    regularization: Literal["damping", "penalty"] | None
    lr: float
    momentum: float
    strength: float = 0.0
    floor: float = 0.0
    follows: bool = True
    step_clip: float | None = None
    layerwise: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def rho(self) -> float | Literal["auto"]:
        return "auto" if self.strength else 0.0


NATURAL: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "step_clip": 0.2, "layerwise": True}
VARIANTS: dict[str, Variant] = {
    "ring": Variant("kfac", "damping", strength=0.02, floor=1e-3, **NATURAL),
    "reng": Variant("kfac", "penalty", strength=0.01, floor=0.01, **NATURAL),
    "kalman": Variant("kalman", "damping", lr=1.0, momentum=0.0, strength=0.05, follows=False),
    "kfac": Variant("kfac", None, floor=0.01, **NATURAL),
    "ekfac": Variant("ekfac", None, floor=0.01, **NATURAL),
}


def find_variant(name: str) -> Variant:
    """The variant of that name.

    >>> find_variant("ring").preconditioner
    'kfac'
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise unknown("variant", name, VARIANTS)
    return VARIANTS[name]


def resolved_noise(noise: float | str, method: Preconditioner, twice: bool) -> Any:
    """What "auto" means for a method; the noise matters only where the summed loss is weighed."""
    if noise == "auto":
        return "scalar" if method.weighs_sums else noise
    if not method.weighs_sums:
        raise invalid("noise", noise, f'"auto" with preconditioner {method.name!r}', "Only kalman weighs the loss.")
    if noise in ("diagonal", "full") and twice:
        remedy = "Further passes would not be weighted by it."
        raise invalid("noise", noise, 'a number, "auto" or "scalar" where step() takes further passes', remedy)
    return noise


def resolved_scale(curvature: Curvature, parts: Variant, method: Preconditioner, rho: Any) -> Any:
    """What "auto" means for the damping's scale: a layer's own, unless a damping of all layers is given as a number."""
    known = type(method).scales is not Preconditioner.scales
    if curvature.relative_to == "auto":
        given = curvature.lam0 is not None or (parts.regularization == "damping" and rho not in ("auto", 0))
        return "layer" if parts.layerwise and known and not given else "model"
    if curvature.relative_to == "layer" and not known:
        remedy = "It knows no curvature of a layer."
        raise invalid("relative_to", "layer", f"'model' with preconditioner {method.name!r}", remedy)
    return curvature.relative_to


def check_adaptive(parts: Variant, method: Preconditioner) -> None:
    """Refuse damping by the reduction of the loss where there is no damping, or no quadratic model."""
    remedy = "It compares the loss with the model that F makes of it."
    if parts.floor == 0:
        raise invalid("damping", LEVENBERG_MARQUARDT, "a number or None for a variant without a floor", remedy)
    if type(method).curvature_product is Preconditioner.curvature_product:
        raise invalid("damping", LEVENBERG_MARQUARDT, f"a number or None with preconditioner {method.name!r}", remedy)
