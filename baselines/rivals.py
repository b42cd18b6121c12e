"""Doors to other libraries' optimizers, for comparisons: `make_optimizer("rival-singd", model, lr=1e-3)`.

None of these libraries is a requirement: a door imports its own when it is opened. The rules are the libraries' own,
and so are the defaults, but that heavyball is not compiled and that kfac-pytorch stands before an SGD of ours. What is
added is what an ordinary training loop needs: `step(closure)`, a second optimizer for parameters that the first one
leaves untrained, one checkpoint, and hooks that `close()` removes. They take one process and a model that is not
wrapped.

Not here: asdfghjkl (asdl), whose K-FAC calls model and loss itself, the loss with reduction="sum", so that no ordinary
loop or closure can drive it; SophiaG of sophia-opt, whose labels the loop has to draw, as :class:`SophiaG` does alone.
"""

import copy
import importlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.overrides import TorchFunctionMode

from grng.errors import unknown
from grng.torch_optim import bare_step

from .common import evaluated

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a torch module


@dataclass(frozen=True)
class Library:
    """What has to be importable, and where it comes from."""

    module: str
    install: str

    @property
    def installed(self) -> bool:
        """Found without being imported."""
        try:
            return find_spec(self.module) is not None
        except ImportError:  # of the package that it lies in
            return False

    def opened(self) -> ModuleType:
        """The module.

        Raises:
            ImportError: it cannot be imported; the message says what to install.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ImportError(f"{self.module} cannot be imported ({error}): {self.install}") from error


@dataclass(frozen=True)
class Rival:
    """One row of the table: what it is, the library that has it, how it is made of the library's module and a model."""

    about: str
    library: Library
    make: Callable[..., Optimizer]

    def build(self, model: nn.Module, **settings: Any) -> Optimizer:
        """The optimizer; settings are those of the library."""
        return self.make(self.library.opened(), model, **settings)


class Hooks:
    """The hooks that modules got within `noting()`, to be taken off and put back.

    >>> layer, hooks = nn.Linear(1, 1), Hooks()
    >>> with hooks.noting(layer):
    ...     _ = layer.register_forward_hook(lambda module, args, out: print("seen"))
    >>> with hooks.off():
    ...     _ = layer(torch.ones(1))
    >>> _ = layer(torch.ones(1))
    seen
    >>> hooks.remove()
    >>> _ = layer(torch.ones(1))
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[int, Any], int, Any]] = []

    @contextmanager
    def noting(self, model: nn.Module) -> Iterator[None]:
        """Some libraries keep no handles, so that what is new is found by looking before and after."""
        tables = [getattr(module, name) for module in model.modules() for name in HOOKS]
        before = [set(table) for table in tables]
        yield
        self._places += [
            (table, key, table[key])
            for table, old in zip(tables, before, strict=True)
            for key in table
            if key not in old
        ]

    def remove(self) -> None:
        """For good."""
        while self._places:
            table, key, _ = self._places.pop()
            table.pop(key, None)

    @contextmanager
    def off(self) -> Iterator[None]:
        for table, key, _ in self._places:
            table.pop(key, None)
        try:
            yield
        finally:
            for table, key, hook in self._places:
                table[key] = hook


class Driven(Optimizer):
    """Foreign optimizers, one after the other, as one optimizer of an ordinary loop.

    Args:
        parts: whose steps are made in this order; their param groups are those of the whole.
        first: called before them; what turns gradients into directions.
        hooks: that the parts have put on the model.
        twice: says whether the coming step differentiates the gradients; step() needs a closure then.

    >>> w, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    >>> optimizer = Driven([SGD([w], lr=0.5), SGD([b], lr=0.25)])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w + b).sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), w.item(), b.item()
    (2.0, 0.5, 0.75)
    """

    def __init__(
        self,
        parts: Sequence[Optimizer],
        first: Any = None,
        hooks: Hooks | None = None,
        twice: Callable[[], bool] | None = None,
    ) -> None:
        self.parts, self.first, self._hooks, self._twice = list(parts), first, hooks or Hooks(), twice
        self.requires_closure = twice is not None
        self.hessian_products = 0
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._finalizer = weakref.finalize(self, self._hooks.remove)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned.

        Raises:
            RuntimeError: there is no closure, where gradients are differentiated.
        """
        if closure is None and self.requires_closure:
            raise RuntimeError(f"{type(self.parts[0]).__name__} differentiates gradients: give step() a closure")
        kept = self._twice is not None and self._twice()
        with _KeptGraph() if kept else nullcontext():
            loss = evaluated(closure)
        if self.first is not None:
            self.first.step()
        for part in self.parts:
            bare_step(part)
        self.hessian_products += kept
        if kept:  # a gradient that holds its graph holds the parameter that holds it
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad = p.grad.detach()
            loss = loss.detach() if isinstance(loss, Tensor) else loss
        return loss

    def _saved(self) -> list[Any]:
        return [*([] if self.first is None else [self.first]), *self.parts]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is built: the parts would know nothing of it."""
        if hasattr(self, "_finalizer"):
            raise RuntimeError(
                "param groups cannot be added to a rival, which finds what it trains when it is built: call close() "
                "and build it anew"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with those of the parts."""
        return {**super().state_dict(), "parts": [part.state_dict() for part in self._saved()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        parts = [copy.deepcopy(saved) for saved in state_dict["parts"]]  # SINGD empties what it is given and keeps it
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "parts"})
        for part, saved in zip(self._saved(), parts, strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a rival cannot be copied or pickled: save state_dict(), build it anew and load it")

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forward and backward passes are not measured."""
        return self._hooks.off()

    def close(self) -> None:
        """Remove from the model every hook of the parts."""
        self._finalizer()


class _KeptGraph(TorchFunctionMode):
    """Within it backward() leaves gradients that can be differentiated."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            kwargs = {**kwargs, "create_graph": True}
        return func(*args, **kwargs)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _plain(cls: str, library: ModuleType, model: nn.Module, **settings: Any) -> Optimizer:
    """As the library has it: these take a closure themselves."""
    return getattr(library, cls)(_trained(model), **settings)


def _twice(cls: str, library: ModuleType, model: nn.Module, **settings: Any) -> Optimizer:
    """One of pytorch-optimizer that asks for backward(create_graph=True) whenever it measures, every update_period."""
    part = getattr(library, cls)(_trained(model), **settings)
    return Driven([part], twice=lambda: part.param_groups[0].get("step", 0) % part.update_period == 0)


def _heavyball(cls: str, library: ModuleType, model: nn.Module, *, compile: bool = False, **settings: Any) -> Optimizer:
    """Not compiled, which takes minutes without a GPU, unless asked for; the library has one switch for the process."""
    if not compile:
        library.utils.compile_mode = None
    return _plain(cls, library, model, **settings)


def _singd(
    library: ModuleType, model: nn.Module, *, beside: Mapping[str, Any] | None = None, **settings: Any
) -> Optimizer:
    """SINGD leaves all but Linear and Conv2d layers alone: those get AdamW, with the settings `beside`."""
    hooks = Hooks()
    with hooks.noting(model):
        part = library.SINGD(model, **{"warn_unsupported": False} | settings)
    taken = {p for group in part.param_groups for p in group["params"]}
    others = [p for p in _trained(model) if p not in taken]
    return Driven([part, *([AdamW(others, **beside or {})] if others else [])], hooks=hooks)


def _kfac(
    library: ModuleType,
    model: nn.Module,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    **settings: Any,
) -> Optimizer:
    """Its preconditioner, told SGD's learning rate of the moment, and SGD; layers that it does not know get SGD alone.

    lr is the library's default for its own argument, momentum that of its examples.
    """
    sgd, hooks = SGD(_trained(model), lr=lr, momentum=momentum, weight_decay=weight_decay), Hooks()
    with hooks.noting(model):
        preconditioner = library.KFACPreconditioner(model, lr=lambda step: sgd.param_groups[0]["lr"], **settings)
    return Driven([sgd], preconditioner, hooks)


KOZISTR = Library("pytorch_optimizer", "pip install pytorch-optimizer")
HEAVYBALL = Library("heavyball", "pip install heavyball")
SINGD = Library("singd.optim.optimizer", "pip install singd")
KAISA = Library("kfac.preconditioner", "install gpauloski/kfac-pytorch from GitHub; kfac on PyPI is another library")

RIVALS: dict[str, Rival] = {
    "rival-singd": Rival("SINGD, with AdamW beside it", SINGD, _singd),
    "rival-kfac-pytorch": Rival("K-FAC of kfac-pytorch, with SGD", KAISA, _kfac),
    "rival-adan": Rival("Adan of pytorch-optimizer", KOZISTR, partial(_plain, "Adan")),
    "rival-soap": Rival("SOAP of pytorch-optimizer", KOZISTR, partial(_plain, "SOAP")),
    "rival-shampoo": Rival("Shampoo of pytorch-optimizer", KOZISTR, partial(_plain, "ScalableShampoo")),
    "rival-psgd": Rival("PSGD of pytorch-optimizer", KOZISTR, partial(_plain, "Kron")),
    "rival-sophia-h": Rival("Sophia-H of pytorch-optimizer", KOZISTR, partial(_twice, "SophiaH")),
    "rival-adahessian": Rival("AdaHessian of pytorch-optimizer", KOZISTR, partial(_twice, "AdaHessian")),
    "rival-heavyball-soap": Rival("SOAP of heavyball", HEAVYBALL, partial(_heavyball, "SOAP")),
    "rival-heavyball-psgd": Rival("PSGD of heavyball", HEAVYBALL, partial(_heavyball, "PSGDKron")),
}


def available_rivals() -> tuple[str, ...]:
    """The rivals whose libraries are installed; none is imported for it.

    >>> set(available_rivals()) <= set(RIVALS)
    True
    """
    return tuple(name for name, rival in RIVALS.items() if rival.library.installed)


def rival_of(name: str) -> Rival:
    """The row of the table.

    >>> rival_of("rival-soap").about
    'SOAP of pytorch-optimizer'

    Raises:
        ValueError: there is no such rival.
    """
    if name not in RIVALS:
        raise unknown("optimizer", name, RIVALS)
    return RIVALS[name]
