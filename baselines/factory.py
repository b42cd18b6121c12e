"""One spelling for every optimizer: GRNG's variants, the baselines and torch.optim's own, with any regularizers.

    make_optimizer("adamw+clip+agr", model, lr=1e-3, clip={"max_norm": 0.5})

The defaults of the doors are what a practitioner would try first on a network of some ten thousand parameters that is
trained for some hundred steps. They are the same for every model and data set, and no search stands behind them, but
a look or two: AdamW's 3e-3 did better than the 1e-3 of long runs for all three benchmark models on the digits; Adan's
0.02, amid the five to ten times as much that its authors recommend, did better than 0.01 and less for two of them.
GRNG's variants and the regularizers come with the defaults of their own constructors. Whatever is given replaces a
default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from inspect import signature
from typing import Any

from torch import nn, optim

from grng.preconditioners import Kalman
from grng.regularizers import REGULARIZERS, Regularized, make_regularizers
from grng.variants import VARIANTS

from .adan import Adan
from .muon import Muon
from .rivals import rival_of
from .soap import SOAP
from .sophia import SophiaG, SophiaH


@dataclass(frozen=True)
class Entry:
    """One row of the table: how the optimizer is built from a model, what it is, its default settings."""

    build: Callable[..., optim.Optimizer]
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    own: bool = True  # not one that was registered


def _torch(cls: Callable[..., optim.Optimizer], model: nn.Module, **settings: Any) -> optim.Optimizer:
    return cls([p for p in model.parameters() if p.requires_grad], **settings)


def _grng(variant: str, model: nn.Module, **settings: Any) -> optim.Optimizer:
    """Build GRNG; settings of `Curvature` and of `Kalman` may stand among the others, as in damping=1e-2, gamma=0.1."""
    from grng import GRNG, Curvature

    own = {f.name: settings.pop(f.name) for f in fields(Curvature) if f.name in settings}
    if own:
        settings["curvature"] = replace(settings.get("curvature") or Curvature(), **own)
    inner = {key: settings.pop(key) for key in signature(Kalman).parameters if variant == "kalman" and key in settings}
    if inner:
        settings["preconditioner"] = Kalman(**inner)
    return GRNG(model, variant=variant, **settings)


OPTIMIZERS: dict[str, Entry] = {
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
    "adan": Entry(partial(_torch, Adan), "Adan", {"lr": 0.02, "weight_decay": 0.02}),
    "sophia-g": Entry(SophiaG, "Sophia-G: labels drawn from the model", {"lr": 1e-3, "weight_decay": 0.1}),
    "sophia-h": Entry(partial(_torch, SophiaH), "Sophia-H: Hutchinson's estimate", {"lr": 1e-3, "weight_decay": 0.1}),
    "soap": Entry(partial(_torch, SOAP), "SOAP", {"lr": 3e-3, "weight_decay": 0.01}),
    "muon": Entry(Muon, "torch.optim.Muon with AdamW", {"lr": 3e-3, "weight_decay": 0.01}),
}


def register_optimizer(name: str, build: Callable[..., optim.Optimizer], about: str = "", **defaults: Any) -> None:
    """Let `make_optimizer` know an optimizer of one's own, and with it every comparison and benchmark.

    Args:
        name: without "+" and "/".
        build: called with the trainable parameters, or with the model where its first argument is named `model`, or
            annotated as a module.
        about: a line on it.
        defaults: of its settings.

    >>> register_optimizer("radam", optim.RAdam, lr=1e-2)
    >>> make_optimizer("radam", nn.Linear(2, 1)).defaults["lr"]
    0.01
    >>> del OPTIMIZERS["radam"]

    Raises:
        ValueError: the name is that of an optimizer of ours, or holds "+" or "/".
    """
    if not name or set(name) & set("+/"):
        raise ValueError(f"the name {name!r} of an optimizer is empty or holds + or /: choose another")
    if name in OPTIMIZERS and OPTIMIZERS[name].own:
        raise ValueError(f"an optimizer {name!r} is there already: choose another name")
    OPTIMIZERS[name] = Entry(build if _takes_model(build) else partial(_torch, build), about, defaults, own=False)


def _takes_model(build: Callable[..., Any]) -> bool:
    """Whether the first argument is a model."""
    first = next(iter(signature(build).parameters.values()), None)
    if first is None or first.kind is first.VAR_POSITIONAL:
        return False
    annotated = isinstance(first.annotation, type) and issubclass(first.annotation, nn.Module)
    return first.name in ("model", "module", "net") or annotated or str(first.annotation).endswith("Module")


def parts_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The optimizer and the regularizers, in the order in which they act, that BASE[+REGULARIZER...] names.

    A rival (`grng.baselines.rivals`) enters the table when it is first named.

    >>> parts_of("adan+clip+agr")
    ('adan', ('clip', 'agr'))

    Raises:
        ValueError: a part is unknown, or a regularizer stands there twice.
    """
    base, *chain = name.split("+")
    if base.startswith("rival-") and base not in OPTIMIZERS:
        rival = rival_of(base)
        register_optimizer(base, rival.build, rival.about)
    for kind, part, known in (("optimizer", base, OPTIMIZERS), *(("regularizer", r, REGULARIZERS) for r in chain)):
        if part not in known:
            where = "" if part == name else f" in {name!r}"
            raise ValueError(
                f"unknown {kind} {part!r}{where}: choose one of {', '.join(OPTIMIZERS)}, alone or followed by any of "
                f"+{', +'.join(REGULARIZERS)}"
            )
        if chain.count(part) > 1:
            raise ValueError(f"regularizer {part!r} stands twice in {name!r}: name each one once")
    return base, tuple(chain)


def make_optimizer(name: str, model: nn.Module, **settings: Any) -> optim.Optimizer:
    """Build the optimizer `name`, BASE[+REGULARIZER...], over the trainable parameters of `model`.

    The setting of a regularizer's name is the mapping of its own settings.

    >>> make_optimizer("sgd-momentum", nn.Linear(2, 1), nesterov=True).defaults["momentum"]
    0.9
    >>> make_optimizer("adamw+gnp", nn.Linear(2, 1), lr=1e-3, gnp={"r": 0.05}).param_groups[0]["lr"]
    0.001

    Raises:
        ValueError: a part of the name is unknown, or settings are given for a regularizer that the name lacks.
    """
    base, chain = parts_of(name)
    for key in settings.keys() & REGULARIZERS.keys():
        if key not in chain:
            raise ValueError(f"settings for the regularizer {key!r}, which {name!r} lacks: name it {name}+{key}")
        if not isinstance(settings[key], Mapping):
            raise ValueError(f"the settings of {key!r} are {settings[key]!r}: give a mapping, as in {key}={{...}}")
    regularizers = [part for key in chain for part in make_regularizers(key, **settings.pop(key, {}))]
    entry = OPTIMIZERS[base]
    settings = {**entry.defaults, **settings}
    if base in VARIANTS:  # these take regularizers themselves
        return entry.build(model, **settings, **({"regularizer": regularizers} if regularizers else {}))
    optimizer = entry.build(model, **settings)
    return Regularized(optimizer, regularizers, model=model) if regularizers else optimizer
