"""Every public optimizer as torch's own machinery for testing optimizers describes it: one row each.

What takes a model is called as what takes parameters is: it gets the model that the parameters belong to.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from grng.baselines import SOAP, Adan, Muon, SophiaG, SophiaH
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer, RMSprop, lr_scheduler
from torch.utils.weak import WeakTensorKeyDictionary

from grng import Curvature
from grng.regularizers import AGR, ASAM, GNP, SAM, ClipNorm, Explicit, Regularized, gnp_repository

from ..optimizer.cases import METHODS, Batch, mixed, stream, tensors_of, train

pytest.importorskip("expecttest")

from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

torch.backends.__allow_nonbracketed_mutation_flag = True  # the machinery forbids all later tests to set flags

__all__ = ["ALL", "Contract", "Run", "TestCase", "contracts", "instantiate_device_type_tests", "optims", "parametrize"]

Build = Callable[..., Optimizer]
NAN = float("nan")
OWNERS = WeakTensorKeyDictionary()


def network(dtype: torch.dtype = torch.float64, seed: int = 1, build: Callable[..., Any] = mixed) -> Any:
    model = build(dtype=dtype, seed=seed)
    for p in model.parameters():
        OWNERS[p] = weakref.ref(model)
    return model


def owner(params: Any) -> nn.Module:
    """The model that they belong to; for a few alone, one made of them."""
    given = [params] if isinstance(params, Tensor) else list(params)
    tensors = [p[1] if isinstance(p, tuple) else p for p in flat(given)]
    known = OWNERS.get(tensors[0]) if tensors else lambda: nn.Linear(1, 1)
    return nn.ParameterList(tensors) if known is None else known()


def flat(given: Iterable[Any]) -> Iterator[Any]:
    for entry in given:
        inner = entry["params"] if isinstance(entry, dict) else [entry]
        yield from [inner] if isinstance(inner, Tensor) else inner


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance / 100)


class Contract(OptimizerInfo):
    """A row.

    Args:
        name: of letters, digits and underscores.
        build: called with parameters and settings.
        settings: that the properties are tried with.
        attached: it hooks into the model, so that there are no copies of it.
        adds: takes further param groups.
        older: names of settings that a checkpoint may lack.
        skips_nonfinite: a step whose gradient is not finite is left out.
        exact: the package's own care for what is loaded: nothing is cast, nothing written to.
    """

    def __init__(
        self,
        name: str,
        build: Build,
        settings: dict[str, Any] | None = None,
        *,
        attached: bool = False,
        adds: bool = True,
        older: tuple[str, ...] = (),
        skips_nonfinite: bool = False,
        exact: bool = True,
        schedulers: tuple[str, ...] = ("StepLR", "OneCycleLR", "ReduceLROnPlateau"),
        **options: Any,
    ) -> None:
        self.settings, self.attached, self.skips_nonfinite, self.exact = (
            settings or {},
            attached,
            skips_nonfinite,
            exact,
        )
        self.schedulers, self.adds, self.older = schedulers, adds, older

        def optim_cls(params: Any, **given: Any) -> Optimizer:
            given_or_own = {**self.settings, **given}
            if isinstance(params, Iterator):
                params = list(params)
            return build(params, **given_or_own)

        optim_cls.__name__ = name
        flags: dict[str, Any] = {
            "optim_inputs_func": lambda device, dtype=None: [OptimizerInput(None, self.settings, name)]
        }
        flags |= {"supported_impls": (), "not_og_supported_flags": older, "supports_complex": False}
        flags |= {"optim_error_inputs_func": errors, **options}
        super().__init__(optim_cls, **flags)  # type: ignore[arg-type]


def errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """torch's own for all optimizers, in whose place some of ours say more; and settings that are no number >= 0."""
    found = get_error_inputs_for_all_optims(device, dtype)
    for error in found:
        if error.error_type is TypeError:
            error.error_regex = "(should|must) be an iterable"
        elif "1-element" in error.error_regex:
            error.error_regex = "Tensor lr must be 1-element|lr must be a finite number >= 0"
    leaf = nn.Parameter(torch.ones(1, 1, dtype=dtype))
    for params, settings, kind, message in (
        (None, {"lr": -0.5}, ValueError, r"(lr|[Ll]earning rate).*-0\.5"),
        (None, {"weight_decay": -0.5}, ValueError, r"weight.decay.*-0\.5"),
        ([leaf * 2], {}, ValueError, "non-leaf|parameters of the model|at least one parameter"),
        ([], {}, ValueError, "empty|at least one"),
    ):
        inputs = OptimizerInput(params, settings, str(settings))  # type: ignore[arg-type]
        found.append(ErrorOptimizerInput(inputs, error_type=kind, error_regex=message))
    return found


def settings_only(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [error for error in errors(device, dtype) if error.optimizer_error_input.params is None]


def of_a_model(build: Build) -> Build:
    return lambda params, **settings: build(owner(params), params=params, **settings)


def grng(name: str) -> Contract:
    settings: dict[str, Any] = {"curvature": Curvature(stats_every=2, inverse_every=4, burn_in=1)}
    if not METHODS[name].kalman:
        settings["momentum"] = 0.5
    return Contract(
        f"GRNG_{name}".replace("-", "_"),
        of_a_model(METHODS[name]),
        settings,
        attached=True,
        older=("momentum", "weight_decay", "fallback_lr", "base_lr"),
        skips_nonfinite=True,
        step_requires_closure=name in ("reng-double", "reng-finite"),
        schedulers=tuple(SCHEDULERS) if name == "ring" else ("StepLR", "OneCycleLR"),
    )


RULES: dict[str, Callable[[], Any]] = {
    "gnp": lambda: GNP(0.05),
    "gnp_repository": lambda: gnp_repository(0.05),
    "sam": lambda: SAM(0.05),
    "asam": lambda: ASAM(0.1, rule="common"),
    "explicit": lambda: Explicit(0.05),
    "explicit_double": lambda: Explicit(0.05, "double"),
    "agr": lambda: AGR(),
    "clip": lambda: ClipNorm(0.5),
    "chain": lambda: [GNP(0.05, warmup="lambda", warmup_steps=5), ClipNorm(0.5), AGR(warmup="lambda", warmup_steps=6)],
}
BASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (AdamW, {"lr": 0.01}),
    "Adan": (Adan, {"lr": 0.02}),
    "SOAP": (SOAP, {"lr": 0.01, "interval": 2}),
}


def regularized(base: str, rule: str) -> Contract:
    build, settings = BASES[base]
    return Contract(
        f"Regularized_{base}_{rule}",
        lambda params, **given: Regularized(build(params, **given), RULES[rule]()),
        settings,
        older=("foreach", "maximize", "differentiable") if base in ("SGD", "AdamW") else (),
        skips_nonfinite=True,
        exact=base not in ("SGD", "AdamW"),
        step_requires_closure=rule not in ("agr", "clip"),
        schedulers=tuple(SCHEDULERS) if (base, rule) == ("AdamW", "gnp") else ("StepLR", "ReduceLROnPlateau"),
    )


def of_torch(name: str, build: Build, **settings: Any) -> Contract:
    """Doors to torch's own: the measure of the others."""
    older = ("foreach", "maximize", "differentiable")
    return Contract(name, build, settings, older=older, exact=False, supports_complex=True)


def baselines() -> list[Contract]:
    every = tuple(SCHEDULERS)
    sophia = {"lr": 0.01, "interval": 2}
    return [
        Contract("Adan", Adan, {"lr": 0.02}, older=("weight_decay", "no_prox"), schedulers=every),
        Contract("AdanClipped", Adan, {"lr": 0.02, "max_grad_norm": 0.5}, older=("eps",)),
        Contract("SophiaG", of_a_model(SophiaG), sophia, attached=True, adds=False, older=("eps", "rho")),
        Contract("SophiaH", SophiaH, sophia, older=("eps", "rho"), step_requires_closure=True),
        Contract("SOAP", SOAP, {"lr": 0.01, "interval": 2}, older=("normalize", "max_dim")),
        Contract(
            "Muon",
            lambda params, **given: Muon(owner(params), **given),
            {"lr": 0.01},
            older=("weight_decay",),
            supports_param_groups=False,
            adds=False,
            optim_error_inputs_func=settings_only,
            schedulers=every,
        ),
        of_torch("SGD", SGD, lr=0.05),
        of_torch("SGDMomentum", SGD, lr=0.05, momentum=0.9),
        of_torch("AdamW", AdamW, lr=0.01),
        of_torch("NAdamW", NAdam, lr=0.01, decoupled_weight_decay=True),
        of_torch("RMSprop", RMSprop, lr=0.003),
    ]


DOORS = {  # make_optimizer's name: the row
    "adan": "Adan",
    "sophia-g": "SophiaG",
    "sophia-h": "SophiaH",
    "soap": "SOAP",
    "muon": "Muon",
    "sgd": "SGD",
    "sgd-momentum": "SGDMomentum",
    "adamw": "AdamW",
    "nadamw": "NAdamW",
    "rmsprop": "RMSprop",
    "ring": "GRNG_ring",
    "reng": "GRNG_reng_double",
    "kalman": "GRNG_kalman_vd",
    "kfac": "GRNG_kfac",
    "ekfac": "GRNG_ekfac",
}


def one_cycle(o: Optimizer) -> lr_scheduler.LRScheduler:
    """It moves what stands for momentum too, where there is such a setting."""
    moves = bool({"momentum", "betas"} & o.defaults.keys())
    return lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8, cycle_momentum=moves)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 2, cycle_momentum=False),
    "OneCycleLR": one_cycle,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.005, 3),
}

ALL = [
    *map(grng, METHODS),
    *baselines(),
    *(regularized(base, rule) for base in ("SGD", "AdamW") for rule in RULES),
    regularized("Adan", "clip"),
    regularized("SOAP", "gnp"),
    Contract(
        "Regularized_GRNG_gnp",
        of_a_model(lambda model, **given: Regularized(METHODS["ring"](model, **given), GNP(0.05))),
        {"curvature": Curvature(stats_every=2, inverse_every=4, burn_in=1)},
        attached=True,
        older=("fallback_lr",),
        skips_nonfinite=True,
        step_requires_closure=True,
    ),
]


def contracts(*dtypes: torch.dtype, where: Callable[[Contract], bool] = lambda info: True) -> optims:
    """Run a test on the rows of the table for which `where` holds, by torch's own decorator."""
    return optims([info for info in ALL if where(info)], dtypes=list(dtypes) or [torch.float64])


class Run:
    """A model and its optimizer."""

    def __init__(
        self,
        info: Contract,
        dtype: torch.dtype = torch.float64,
        params: Callable[[nn.Module], Any] = lambda model: model.parameters(),
        seed: int = 1,
        build: Callable[..., nn.Module] = mixed,
        **settings: Any,
    ) -> None:
        self.info, self.model = info, network(dtype, seed, build)
        self.optimizer = info.optim_cls(params(self.model), **settings)

    @classmethod
    def grouped(cls, info: Contract, *settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> "Run":
        """Two groups with settings of their own; Muon reads off the model which they are."""
        if info.supports_param_groups:
            return cls(
                info,
                dtype,
                lambda model: [
                    {"params": list(part.parameters()), **own}
                    for part, own in zip((model[:3], model[3:]), settings, strict=True)
                ],
            )
        run = cls(info, dtype)
        for group, own in zip(run.optimizer.param_groups, settings, strict=True):
            group.update(own)
        return run

    def steps(self, batches: Iterable[Batch]) -> list[float]:
        return train(self.optimizer, self.model, batches)

    @property
    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    @property
    def state(self) -> dict[str, Tensor]:
        return tensors_of(self.optimizer)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Settings of the param groups."""
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]


def batches(steps: int, dtype: torch.dtype = torch.float64, B: int = 8) -> list[Batch]:
    return stream(steps, B, dtype=dtype)
