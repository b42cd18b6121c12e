"""One spelling for every optimizer: GRNG's variants and the doors to torch.optim's own.

The defaults of the doors are what a practitioner would try first on a network of some ten thousand parameters that is
trained for some hundred steps. They are the same for every model and data set, and no search stands behind them, but
one look: AdamW's 3e-3 did better than the 1e-3 of long runs for all three benchmark models on the digits. GRNG's
variants come with the defaults of their own constructor. Whatever is given replaces a default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from torch import nn, optim


@dataclass(frozen=True)
class Entry:
    """One row of the table: how the optimizer is built from a model, what it is, and its default settings."""

    build: Callable[..., optim.Optimizer]
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _torch(cls: type[optim.Optimizer], model: nn.Module, **settings: Any) -> optim.Optimizer:
    return cls([p for p in model.parameters() if p.requires_grad], **settings)


def _grng(variant: str, model: nn.Module, **settings: Any) -> optim.Optimizer:
    """Build GRNG; the settings of its `Curvature` may stand among the others, as in damping=1e-2."""
    from grng import GRNG, Curvature

    own = {f.name: settings.pop(f.name) for f in fields(Curvature) if f.name in settings}
    if own:
        settings["curvature"] = replace(settings.get("curvature") or Curvature(), **own)
    return GRNG(model, variant=variant, **settings)


OPTIMIZERS: Mapping[str, Entry] = {
    "ring": Entry(partial(_grng, "ring"), "GRNG: implicitly regularised natural gradient"),
    "reng": Entry(partial(_grng, "reng"), "GRNG: explicitly regularised natural gradient"),
    "kalman": Entry(partial(_grng, "kalman"), "GRNG: Bayesian, a Kalman filter without an inverse"),
    "kfac": Entry(partial(_grng, "kfac"), "GRNG: K-FAC, unregularised"),
    "ekfac": Entry(partial(_grng, "ekfac"), "GRNG: K-FAC in its eigenbasis, unregularised"),
    "sgd": Entry(partial(_torch, optim.SGD), "torch.optim.SGD", {"lr": 0.1}),
    "sgd-momentum": Entry(partial(_torch, optim.SGD), "torch.optim.SGD, momentum 0.9", {"lr": 0.05, "momentum": 0.9}),
    "adamw": Entry(partial(_torch, optim.AdamW), "torch.optim.AdamW", {"lr": 3e-3, "weight_decay": 0.01}),
    "nadamw": Entry(
        partial(_torch, optim.NAdam),
        "torch.optim.NAdam with decoupled weight decay",
        {"lr": 3e-3, "weight_decay": 0.01, "decoupled_weight_decay": True},
    ),
    "rmsprop": Entry(partial(_torch, optim.RMSprop), "torch.optim.RMSprop", {"lr": 1e-3, "alpha": 0.99}),
}


def make_optimizer(name: str, model: nn.Module, **settings: Any) -> optim.Optimizer:
    """Build the optimizer `name` over the trainable parameters of `model`.

    >>> make_optimizer("sgd-momentum", nn.Linear(2, 1), nesterov=True).defaults["momentum"]
    0.9
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(OPTIMIZERS)}")
    entry = OPTIMIZERS[name]
    return entry.build(model, **{**entry.defaults, **settings})
