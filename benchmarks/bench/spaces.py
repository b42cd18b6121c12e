"""What is searched, and for whom: the roster of the comparison with its published search spaces.

Every space has four dimensions: the peak learning rate, the horizon (the part of the budget over which that rate decays
to zero and training ends, so that a faster method can be given a shorter run), and two more: as a rule the weight decay
and the method's own number. The spaces are the same for every workload. What is not searched is the optimizer's
default. All search the same points of the unit cube, so that a variant and its twin without regularization differ in
that alone. Twins of `ring` and `reng` are K-FAC and EKFAC, which they are with rho = 0; the strength takes the place of
their floor, and is 0 in a quarter of its range, so that a variant's space holds its own case without regularization.
Beside the roster the rivals run that set the targets, OPTIMIZER/target, with the settings that they set them with:
found by more trials, so that they are in no score.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..names import put


@dataclass(frozen=True)
class Dimension:
    """One number that is searched, on a logarithmic scale.

    Attributes:
        name: of the setting, KEY or REGULARIZER.KEY; "1-KEY" for its distance from one; "1-beta1" for the first of
            `betas`; "horizon" for the run's length.
        low, high: bounds.
        zero: the part of the range, at its lower end, where the value is 0.
    """

    name: str
    low: float
    high: float
    zero: float = 0.0

    def at(self, u: float) -> float:
        """The value at u in [0, 1].

        >>> Dimension("lr", 0.01, 1.0).at(0.5)
        0.1
        >>> [Dimension("strength", 0.01, 1.0, zero=0.2).at(u) for u in (0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.01, 0.1, 1.0]
        """
        if u < self.zero:
            return 0.0
        u = (u - self.zero) / (1 - self.zero)
        return float(f"{math.exp(math.log(self.low) * (1 - u) + math.log(self.high) * u):.4g}")


BETAS = {"adan": (0.98, 0.92, 0.99), "sophia-g": (0.965, 0.99), "soap": (0.95, 0.95)}  # the rest: (0.9, 0.999)


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison: an optimizer, what is fixed, what is searched.

    Attributes:
        name: as in `grng compare`, OPTIMIZER[+REGULARIZER...][/LABEL].
        space: its dimensions.
        fixed: settings that stay.
        code: of an optimizer of the user's own, a hash of the file that it stands in.
    """

    name: str
    space: tuple[Dimension, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    def settings(self, point: Mapping[str, float]) -> tuple[dict[str, Any], float]:
        """Settings and horizon at a point, given by the names of the dimensions.

        >>> find_contestant("adamw").settings({"lr": 0.01, "horizon": 0.5, "weight_decay": 0.1, "1-beta1": 0.1})
        ({'lr': 0.01, 'weight_decay': 0.1, 'betas': (0.9, 0.999)}, 0.5)
        """
        settings: dict[str, Any] = {}
        horizon = 1.0
        for name, value in point.items():
            if name == "horizon":
                horizon = value
            elif name == "1-beta1":
                betas = BETAS.get(self.name.partition("/")[0].partition("+")[0], (0.9, 0.999))
                settings["betas"] = (round(1 - value, 6), *betas[1:])
            elif name.startswith("1-"):
                put(settings, name[2:], round(1 - value, 6))
            else:
                put(settings, name, value)
        for name, value in self.fixed.items():
            put(settings, name, value)
        return settings, horizon


HORIZON = Dimension("horizon", 0.15, 1.0)
DECAY = Dimension("weight_decay", 1e-5, 0.3)
BETA1 = Dimension("1-beta1", 0.02, 0.3)
ADAM_LR = Dimension("lr", 3e-4, 0.1)


def rate(low: float, high: float) -> Dimension:
    return Dimension("lr", low, high)


MOMENTUM = Dimension("1-momentum", 0.02, 0.3)
NATURAL = (rate(0.1, 1.0), HORIZON, Dimension("weight_decay", 1e-5, 0.03))  # of a layer a step, times a rate near 1
FLOOR = Dimension("floor", 1e-3, 0.3)  # times the largest curvature seen, as is the next
STRENGTH = Dimension("strength", 1e-3, 0.3, zero=0.25)
PUBLISHED = (rate(0.01, 1.0), HORIZON, DECAY, Dimension("floor", 1e-3, 1.0))  # K-FAC of one damping and a KL clip
KALMAN = (rate(0.2, 1.0), HORIZON, Dimension("gamma", 1e-2, 0.3), Dimension("strength", 1e-3, 1.0, zero=0.25))

PLAIN = (ADAM_LR, HORIZON, DECAY)  # of an optimizer that brings no space
SPACES = {  # of those that are known, and not in the roster
    "sgd": (rate(3e-3, 1.0), HORIZON, DECAY),
    "sophia-h": (rate(1e-4, 3e-2), HORIZON, DECAY, Dimension("rho", 0.001, 0.1)),
}

ROSTER = (
    Contestant("ring", (*NATURAL, STRENGTH)),
    Contestant("ring/ekfac", (*NATURAL, STRENGTH), {"preconditioner": "ekfac"}),
    Contestant("reng", (*NATURAL, STRENGTH)),
    Contestant("reng/ggn", (*NATURAL, STRENGTH), {"mode": "ggn"}),
    Contestant("kalman", KALMAN),
    Contestant("kalman/rho=0", KALMAN[:-1], {"strength": 0.0}),
    Contestant("kfac", (*NATURAL, FLOOR)),
    Contestant("ekfac", (*NATURAL, FLOOR)),
    Contestant("kfac/kl", PUBLISHED, {"relative_to": "model", "kl_clip": 1e-3}),
    Contestant("sgd-momentum", (rate(3e-3, 1.0), HORIZON, DECAY, MOMENTUM), {"nesterov": True}),
    Contestant("adamw", (ADAM_LR, HORIZON, DECAY, BETA1)),
    Contestant("nadamw", (ADAM_LR, HORIZON, DECAY, BETA1)),
    Contestant("sophia-g", (rate(1e-4, 3e-2), HORIZON, DECAY, Dimension("rho", 0.01, 0.3))),
    Contestant("soap", (ADAM_LR, HORIZON, DECAY, BETA1)),
    Contestant("muon", (ADAM_LR, HORIZON, DECAY, MOMENTUM)),
    Contestant("adan", (rate(1e-3, 0.3), HORIZON, DECAY, BETA1)),
    Contestant("adamw+sam", (ADAM_LR, HORIZON, DECAY, Dimension("sam.r", 3e-3, 0.3))),
    Contestant("adamw+gnp", (ADAM_LR, HORIZON, DECAY, Dimension("gnp.r", 3e-3, 0.3))),
)
OURS = ("ring", "ring/ekfac", "reng", "reng/ggn", "kalman")
TWINS = {"ring": "kfac", "ring/ekfac": "ekfac", "reng": "kfac", "reng/ggn": "kfac", "kalman": "kalman/rho=0"}
TARGETS_BY = ("sgd-momentum", "adamw", "nadamw")  # who sets the targets, before anybody else has run
SETTERS = {f"{name}/target": name for name in TARGETS_BY}  # each runs where its own setting set the target


def find_contestant(name: str) -> Contestant:
    """The row of that name; raise InputError, listing them, for another."""
    for contestant in ROSTER:
        if contestant.name == name:
            return contestant
    raise InputError(
        f"{name!r} is not in the roster: choose among {', '.join(c.name for c in ROSTER)}, or give a file or "
        "MODULE:CLASS that makes an optimizer"
    )
