"""What is measured, how, and how often."""

from dataclasses import dataclass
from typing import Literal

import torch

from grng.curvature.noise import check_noise
from grng.errors import finite, invalid, unknown

FISHERS = ("mc", "empirical", "exact")
LIKELIHOODS = ("auto", "categorical", "bernoulli", "gaussian")
ENGINES = ("auto", "backpack", "hooks")
SHARINGS = ("expand", "reduce")
SCALES = ("auto", "model", "layer")
LEVENBERG_MARQUARDT = "levenberg-marquardt"
# Settings that are a positive number, None, or a word.
WORDS = {"damping": LEVENBERG_MARQUARDT, "kl_clip": "auto", "step_clip": "auto", "loss_scale": "sum"}


@dataclass(frozen=True)
class Curvature:
    """Settings of the curvature estimate; every field has a default that trains.

    Args:
        fisher: whose labels enter the Fisher. `"mc"`: labels drawn from the model (one extra pass over the layers, no
            extra forward). `"empirical"`: the true labels (no extra pass; not the Fisher, but what many call so).
            `"exact"`: the expectation over labels, one pass per output and position.
        draws: with "mc", how many labels are drawn for every prediction, each at the price of one pass.
        likelihood: `"auto"` reads it off the gradient that arrives at the model's output. `"categorical"`
            (cross-entropy on logits or on log-probabilities), `"bernoulli"` (binary cross-entropy with logits, one
            prediction an element), `"gaussian"` (squared error, one prediction an element).
        loss_scale: the loss is `loss_scale` times torch's `reduction="mean"`; `"sum"` for a summed loss. None: read
            off the gradient where the likelihood allows (categorical, Bernoulli), 1 for the Gaussian.
        noise: R of the Gaussian likelihood, for methods that weigh the summed loss (kalman): a variance, or how it is
            estimated from the innovations: `"scalar"`, `"diagonal"`, `"full"` over the outputs. "auto": scalar for
            these methods; for the others the scale of the loss does not matter.
        capture: the engine that delivers inputs and output gradients of the layers: `"hooks"` (plain tensor hooks),
            `"backpack"`, or `"auto"` (BackPACK where the module tree shows that it is safe, hooks elsewhere).
        ema: b, the decay of the running averages; 1 is the plain mean.
        stats_every: steps between statistics.
        inverse_every: steps between decompositions or inverses; None: between one and ten times `stats_every`, so that
            by counts of operations they take about a quarter as long as the gradients meanwhile.
        burn_in: statistics and decompositions at every one of the first steps.
        damping: the floor lam0; None: relative to the largest eigenvalue that F has had. `"levenberg-marquardt"`: that
            times a factor which follows how well the quadratic model foretold what steps did to the loss (Martens &
            Grosse 2015); it needs `step(closure)`, and every fifth step calls the closure a second time.
        floor: lam0 in those units, where damping is no number; None: the variant's own.
        kl_clip: kappa of the trust region nu = min(1, sqrt(kappa / (n lr^2 D^T (F + lam I) D))), in nats a sample; n is
            the number of elements of a sample's output under a Bernoulli or Gaussian likelihood, 1 under a categorical
            one (nats a class). None or "auto": no such region.
        step_clip: eta of a trust region of every layer's own: nu_l = min(1, eta (1 - mu) ||W_l|| / ||D_l||) with mu the
            momentum, so that directions that agree move a layer by lr eta of its norm a step at most; ||W_l|| counts as
            0.1 sqrt(n_out) at least, the norm of small random weights, so that what starts at zero moves, and as three
            times that of the weights that the first step found at most, because steps made of noise would else lengthen
            weights exponentially. None: no such region. "auto": the variant's own. Where `kl_clip` or `step_clip` is
            given, the other one is None unless it is given too.
        relative_to: `"model"`: one damping for all layers. `"layer"`: lam_l = lam S_l / S, S_l being a layer's largest
            eigenvalue of F and S the largest of all, so that the same part of every layer's spectrum is damped.
            "auto": the variant's own, but "model" where `damping` or a `rho` that damps is a number, or the
            preconditioner knows no curvature of a layer.
        max_dim: the largest side of a factor, which takes memory with its square and time with its cube: a layer with a
            larger one (a vocabulary of outputs, the first layer behind a wide feature map) has no factors and follows
            the fallback, under a Kronecker covariance a diagonal. None: no limit. Sides that take a diagonal anyway
            (the inputs of embeddings) and methods without factors know none.
        sharing: how a layer used at several positions is treated: `"expand"` (positions count as rows) or `"reduce"`
            (inputs averaged, gradients summed over the positions of a sample).
        dtype: of factors; None: float64 for float64 parameters, float32 for all others.
        seed: of the labels that are drawn; training's own random numbers are left alone.
    """

    fisher: Literal["mc", "empirical", "exact"] = "mc"
    draws: int = 1
    likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"] = "auto"
    loss_scale: float | Literal["sum"] | None = None
    noise: float | Literal["auto", "scalar", "diagonal", "full"] = "auto"
    capture: Literal["auto", "backpack", "hooks"] = "auto"
    ema: float = 0.9
    stats_every: int = 10
    inverse_every: int | None = None
    burn_in: int = 10
    damping: float | Literal["levenberg-marquardt"] | None = None
    floor: float | None = None
    kl_clip: float | Literal["auto"] | None = "auto"
    step_clip: float | Literal["auto"] | None = "auto"
    relative_to: Literal["auto", "model", "layer"] = "auto"
    max_dim: int | None = 8192
    sharing: Literal["expand", "reduce"] = "expand"
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("fisher", FISHERS),
            ("likelihood", LIKELIHOODS),
            ("capture", ENGINES),
            ("sharing", SHARINGS),
            ("relative_to", SCALES),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        if type(self.draws) is not int or self.draws < 1:
            raise invalid("draws", self.draws, "a whole number, at least 1")
        if not (finite(self.ema) and 0 <= self.ema <= 1):
            raise invalid("ema", self.ema, "in [0, 1]")
        for name in ("stats_every", "inverse_every"):
            value = getattr(self, name)
            if (name, value) != ("inverse_every", None) and (not isinstance(value, int) or value < 1):
                raise invalid(name, value, "a whole number of steps, at least 1")
        if self.max_dim is not None and (type(self.max_dim) is not int or self.max_dim < 1):
            raise invalid("max_dim", self.max_dim, "a whole number, at least 1, or None")
        if not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise invalid("burn_in", self.burn_in, "a whole number of steps, at least 0")
        for name, word in WORDS.items():
            value = getattr(self, name)
            if value is None or value == word:
                continue
            if not (finite(value) and value > 0):
                raise invalid(name, value, f'a finite number > 0, or None, or "{word}"')
        if self.floor is not None:
            if self.lam0 is not None:
                raise invalid("floor", self.floor, f"None with damping={self.damping!r}", "Both set lam0.")
            if not (finite(self.floor) and self.floor >= 0):
                raise invalid("floor", self.floor, "a finite number >= 0, or None")
        check_noise(self.noise)
        if self.dtype not in (None, torch.float32, torch.float64):
            raise invalid("dtype", self.dtype, "torch.float32, torch.float64 or None", "Half precision loses factors.")

    @property
    def lam0(self) -> float | None:
        """The damping, where it is a number."""
        return None if isinstance(self.damping, str) else self.damping

    @property
    def adapts(self) -> bool:
        """Whether the damping follows the reduction of the loss."""
        return self.damping == LEVENBERG_MARQUARDT

    def beyond(self, n_out: int, n_in: int) -> str:
        """Why matrices of this shape have no factors; "" where they have."""
        side = max(n_out, n_in)
        if self.max_dim is None or side <= self.max_dim:
            return ""
        return f"a factor of {side} x {side} is beyond max_dim={self.max_dim}"

    def factor_dtype(self, parameter: torch.Tensor) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return torch.float64 if parameter.dtype == torch.float64 else torch.float32
