"""What a regularizer is, and what it is told of the parameters of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grng.errors import invalid, unknown
from grng.kernels import norms
from grng.regularizers.schedule import Schedule

RULES = ("norm", "bias", "embedding", "vector")
Note = Callable[[nn.Parameter, Tensor], None]
Exclude = str | tuple[str, ...] | Callable[[str, nn.Parameter], bool]


@dataclass
class Parameters:
    """The parameters of an optimizer, in order, with what a regularizer may ask of each.

    Attributes:
        tensors: the parameters.
        names: their names where known, else "".
        kinds: per parameter the rules of `exclude` that it falls under.
        overrides: the dict `regularizer` of its param group: settings of its own; None: the group takes no part.
        groups: the index of its param group.
    """

    tensors: list[nn.Parameter]
    names: list[str]
    kinds: list[frozenset[str]]
    overrides: list[dict[str, Any] | None]
    groups: list[int]

    def take(self, keep: Sequence[bool]) -> "Parameters":
        """Those where `keep`."""

        def chosen(values: list[Any]) -> list[Any]:
            return [value for value, kept in zip(values, keep, strict=True) if kept]

        return Parameters(*(chosen(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True, kw_only=True)
class Regularizer(Schedule, ABC):
    """A rule that replaces the gradient which the optimizer is handed.

    Args:
        exclude: parameters that take no part: any of "norm", "bias", "embedding" (these need the model), "vector" (at
            most one dimension), or a function of (name, parameter).
    """

    exclude: Exclude = ()
    per_group: ClassVar[tuple[str, ...]] = ()  # the settings that a param group may override
    takes_passes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.exclude, list | str):
            rules = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
            object.__setattr__(self, "exclude", rules)
        if not callable(self.exclude):
            if not isinstance(self.exclude, tuple):
                raise invalid("exclude", self.exclude, f"any of {', '.join(RULES)}, or a function of (name, parameter)")
            for rule in self.exclude:
                if rule not in RULES:
                    raise unknown("rule to exclude", rule, RULES, "Or give a function of (name, parameter).")

    @property
    def needs_names(self) -> bool:
        """Whether the rule looks at the parameters' names."""
        return callable(self.exclude)

    @property
    def needs_model(self) -> bool:
        """Whether the rule looks at the model."""
        return not callable(self.exclude) and bool(set(self.exclude) - {"vector"})

    def takes(self, parameters: Parameters) -> list[bool]:
        """Which parameters take part."""
        rule = self.exclude
        out: list[bool] = []
        for p, name, kinds, own in zip(
            parameters.tensors, parameters.names, parameters.kinds, parameters.overrides, strict=True
        ):
            excluded = bool(rule(name, p)) if callable(rule) else not kinds.isdisjoint(rule)
            out.append(own is not None and not excluded)
        return out

    def setting(self, name: str, own: dict[str, Any] | None) -> Any:
        """A setting, overridden by the param group's own."""
        return own[name] if own and name in own else getattr(self, name)

    def check_overrides(self, own: dict[str, Any]) -> None:
        """Refuse a param group's settings where the constructor would."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        known = {name: value for name, value in own.items() if name in self.per_group}
        type(self)(**{**mine, **known})


@dataclass(frozen=True, kw_only=True)
class Transform(Regularizer):
    """A regularizer that needs the gradient alone: it acts in step(), after accumulation, all-reduce and unscaling."""

    @abstractmethod
    def transform(self, parameters: Parameters, gradients: list[Tensor], t: int) -> list[Tensor]:
        """New gradients out of `gradients`, which are left as they are."""


@dataclass
class Gradients:
    """The gradients of the first pass, in at least float32.

    Attributes:
        values: one a parameter; zero where there was none.
        scale: what the loss was multiplied by (a GradScaler's scale), or None.
        norm: over the parameters that take part; of `values` unless given.
    """

    values: list[Tensor]
    scale: Tensor | None = None
    norm: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.norm = global_norm(self.values) if self.norm is None else self.norm
        self.scale = None if self.scale is None else self.scale.to(self.norm)

    @property
    def unscaled_norm(self) -> Tensor:
        return self.norm if self.scale is None else self.norm / self.scale


@dataclass(frozen=True, kw_only=True)
class Passes(Regularizer):
    """A regularizer that takes further gradients, of the same batch at displaced weights.

    Args:
        same_rng: every pass draws the same random numbers (dropout); else each its own.
        sync: under distributed training, every process displaces by the same, averaged gradient; False: each by its
            own, the gradients are averaged once, after they are combined (needs the DistributedDataParallel module).
        precision: "float32": low-precision weights are replaced by float32 ones while they are displaced, since a small
            displacement is rounded away in bfloat16; "parameter": they are displaced in their own precision.
    """

    same_rng: bool = True
    sync: bool = True
    precision: str = "float32"
    takes_passes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in ("float32", "parameter"):
            raise unknown("precision", self.precision, ("float32", "parameter"))

    @property
    def needs_scale(self) -> bool:
        """Whether the rule depends on what the loss was multiplied by."""
        return False

    def signs(self, t: int) -> tuple[float, ...]:
        """Multiples of the displacement at which further gradients are taken; none where the rule needs none."""
        return (1.0,)

    def first_pass(self, parameters: Parameters, model: nn.Module | None, note: Note, t: int) -> "FirstPass":
        """What surrounds the first pass; `note` is to be called with gradients that autograd's hooks do not see."""
        return FirstPass()

    @abstractmethod
    def displacement(self, parameters: Parameters, first: Gradients, t: int) -> list[Tensor]:
        """e, one tensor a parameter, for sign 1; for those that take part only."""

    @abstractmethod
    def combine(
        self, parameters: Parameters, first: Gradients, further: list[list[Tensor]], t: int
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """The gradient to hand on, and what to report: numbers or scalars on the device."""


@dataclass
class FirstPass:
    """The surroundings of a first pass that is like any other."""

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def further(self, paused: Callable[[], AbstractContextManager[None]]) -> list[dict[nn.Parameter, Tensor]]:
        """Gradients that can be had from the graph of the first pass."""
        return []


@dataclass
class Facts:
    """What a model tells of its parameters: their names, and the rules of `exclude` that they fall under."""

    names: dict[Tensor, str] = field(default_factory=dict)
    kinds: dict[Tensor, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | None) -> "Facts":
        facts = cls()
        for module_name, module in model.named_modules() if model is not None else ():
            for name, p in module.named_parameters(recurse=False):
                facts.names.setdefault(p, f"{module_name}.{name}" if module_name else name)
                facts.kinds.setdefault(p, set()).update(_kinds(module, name))
        return facts


def describe(facts: Facts, groups: Iterable[dict[str, Any]]) -> Parameters:
    """The parameters of param groups, with names and kinds from the model or from named groups."""
    found = Parameters([], [], [], [], [])
    for index, group in enumerate(groups):
        given = group.get("param_names") or [""] * len(group["params"])
        own = group.get("regularizer", {})
        for p, name in zip(group["params"], given, strict=True):
            found.tensors.append(p)
            found.names.append(facts.names.get(p, name))
            found.kinds.append(frozenset(facts.kinds.get(p, set()) | ({"vector"} if p.ndim <= 1 else set())))
            found.overrides.append(None if own is False else own)
            found.groups.append(index)
    return found


def _kinds(module: nn.Module, name: str) -> set[str]:
    kind = type(module).__name__
    found = {"bias"} if name.startswith("bias") or name.endswith("bias") else set()
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        found.add("embedding")
    # By name too: transformers and timm have norms of their own that share no base class.
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) or "Norm" in kind:
        found.add("norm")
    return found


def check_groups(regularizers: Iterable[Regularizer], groups: Iterable[dict[str, Any]]) -> None:
    """Refuse settings of a param group that no regularizer knows, or that it would refuse itself."""
    chain = list(regularizers)
    known = sorted({name for regularizer in chain for name in regularizer.per_group})
    for group in groups:
        own = group.get("regularizer", {})
        if own is False:
            continue
        if not isinstance(own, dict):
            raise invalid("a param group's 'regularizer'", own, f"a dict of {', '.join(known)}, or False")
        for name in own:
            if name not in known:
                raise unknown("setting of a param group's 'regularizer'", name, known)
        for regularizer in chain:
            regularizer.check_overrides(own)


def at_least_float32(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, those of low precision in float32."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item()
    5.0
    """
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(norms(tensors))


@dataclass
class Values:
    """Parameters that share a number, so that one batched operation serves them all."""

    number: float
    indices: list[int] = field(default_factory=list)


def by_value(numbers: Iterable[float]) -> list[Values]:
    """Indices by number.

    >>> by_value([1.0, 2.0, 1.0])
    [Values(number=1.0, indices=[0, 2]), Values(number=2.0, indices=[1])]
    """
    found: dict[float, Values] = {}
    for i, number in enumerate(numbers):
        found.setdefault(number, Values(number)).indices.append(i)
    return list(found.values())
