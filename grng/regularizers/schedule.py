"""When a regularizer acts, and how strongly: warm-up of the strength, and hybrid steps that act now and then."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from grng.errors import invalid, unknown

WARMUPS = ("none", "r", "lambda", "zero")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    r"""Warm-up s(t) = min(1, t / T_w) and hybrid steps, both functions of the step t = 0, 1, ... alone.

    ========== ===================================================== =============================
    warmup     rule                                                  source
    ========== ===================================================== =============================
    "none"     r and alpha constant                                  arXiv 2202.03599
    "r"        r_t = r s(t), alpha constant                          arXiv 2406.09723
    "lambda"   alpha_t = alpha s(t) (any strength), r constant       arXiv 2406.09723
    "zero"     plain steps while t < T_w, then everything at once    arXiv 2406.09723
    ========== ===================================================== =============================

    Args:
        warmup: one of the above.
        warmup_steps: T_w in steps; or
        warmup_epochs, steps_per_epoch: T_w = warmup_epochs * steps_per_epoch.
        probability: of acting, drawn anew each step; a number, or a function of t that returns one.
        interval: act at every so-many-th step only, t = 0, interval, 2 interval, ...
        seed: of the draws. They are a function of (seed, t): a resumed run and every process of a distributed one
            draw alike.

    >>> schedule = Schedule(warmup="r", warmup_epochs=2, steps_per_epoch=50)
    >>> [schedule.ramp(t) for t in (0, 50, 100, 150)]
    [0.0, 0.5, 1.0, 1.0]
    >>> [Schedule(interval=2).acts(t) for t in range(4)]
    [True, False, True, False]
    """

    warmup: str = "none"
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    steps_per_epoch: int | None = None
    probability: float | Callable[[int], float] = 1.0
    interval: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup not in WARMUPS:
            raise unknown("warmup", self.warmup, WARMUPS)
        for name in ("warmup_steps", "warmup_epochs", "steps_per_epoch"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise invalid(name, value, "a number > 0, or None")
        lengths = (self.warmup_steps, self.warmup_epochs)
        if self.warmup == "none":
            if lengths != (None, None):
                raise invalid("warmup", self.warmup, '"r", "lambda" or "zero" where a length is given')
        elif None not in lengths or lengths == (None, None):
            raise invalid("warmup_steps and warmup_epochs", lengths, f"one number, for warmup={self.warmup!r}")
        if self.warmup_epochs is not None and self.steps_per_epoch is None:
            raise invalid("steps_per_epoch", None, "the number of steps in an epoch, where warmup_epochs is given")
        if not callable(self.probability) and not (_is_number(self.probability) and 0 <= self.probability <= 1):
            raise invalid("probability", self.probability, "in [0, 1], or a function of the step")
        if type(self.interval) is not int or self.interval < 1:
            raise invalid("interval", self.interval, "a whole number >= 1")
        if self.interval > 1 and self.probability != 1.0:
            raise invalid("interval", self.interval, "1 where a probability is given")

    @property
    def warmup_length(self) -> float:
        """T_w in steps; 0 without warm-up."""
        if self.warmup_epochs is not None and self.steps_per_epoch is not None:
            return self.warmup_epochs * self.steps_per_epoch
        return self.warmup_steps or 0

    def ramp(self, t: int) -> float:
        """s(t)."""
        return min(1.0, t / self.warmup_length) if self.warmup_length else 1.0

    def acts(self, t: int) -> bool:
        """Whether step t is regularised at all."""
        if self.warmup == "zero" and t < self.warmup_length:
            return False
        if self.interval > 1:
            return t % self.interval == 0
        p = self.probability(t) if callable(self.probability) else self.probability
        if not 0 <= p <= 1:
            raise invalid("probability", p, f"in [0, 1] at every step, not only before step {t}")
        return p == 1 or random.Random(f"{self.seed}/{t}").random() < p

    def strength_ramp(self, t: int) -> float:
        """What the strength is multiplied by."""
        return self.ramp(t) if self.warmup == "lambda" else 1.0

    def radius_ramp(self, t: int) -> float:
        """What the distance r is multiplied by."""
        return self.ramp(t) if self.warmup == "r" else 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: object, low: float = 0.0, high: float = math.inf, strict: bool = False) -> None:
    """Refuse what is not a finite number in [low, high], or in (low, high] where `strict`."""
    if not _is_number(value) or not (low < value if strict else low <= value) or not value <= high:  # type: ignore[operator]
        bounds = f"{'>' if strict else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise invalid(name, value, f"a finite number {bounds}")
