"""What torch.optim leaves to optimizers that hold others, and to those that are resumed to the bit."""

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grng.errors import check_nonnegative, check_real

State = dict[nn.Parameter, dict[str, Any]]


def initialises(optimizer: Optimizer) -> bool:
    """Whether step() is called to have the state made, as torch.distributed.checkpoint does: before the first step,
    without a closure, on gradients of zero and at learning rates of zero."""
    groups = optimizer.param_groups
    if optimizer.state or any(group["lr"] for group in groups):
        return False
    return not any(p.grad is None or p.grad.any() for group in groups for p in group["params"] if p.requires_grad)


def bare_step(optimizer: Optimizer) -> None:
    """A step without the profiler's wrapper, in which the global hooks would fire a second time."""
    step = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)  # type: ignore[attr-defined]
    optimizer._opt_called = True  # type: ignore[attr-defined]  # for a scheduler that is built over it


def demands_closure(optimizer: Optimizer) -> bool:
    """Whether its step() takes nothing else than a closure.

    >>> w = nn.Parameter(torch.zeros(1))
    >>> demands_closure(torch.optim.LBFGS([w])), demands_closure(torch.optim.SGD([w]))
    (True, False)
    """
    closure = signature(type(optimizer).step).parameters.get("closure")
    return getattr(optimizer, "requires_closure", False) or (closure is not None and closure.default is closure.empty)


def scalar(lr: Any) -> Any:
    """A learning rate, which may be a tensor of one element, without dimensions.

    >>> scalar(torch.tensor([0.5]))
    tensor(0.5000)
    """
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


class StrictOptimizer(Optimizer):
    """An optimizer that refuses wrong param groups, and whose checkpoints come back as they were saved.

    torch casts all of the state to the parameter's dtype, the float32 averages of bfloat16 weights, whole numbers and
    states of generators included; lets later steps write into the loaded dictionary, where it casts nothing; and drops
    the settings that a param group of the checkpoint lacks, which here stay as they were built.
    """

    as_saved: ClassVar[tuple[str, ...]] = ("step",)  # state that keeps its dtype, and its place on the CPU

    def state_dtype(self, p: Tensor) -> torch.dtype:
        """The precision in which floating-point state of a parameter is kept."""
        return p.dtype

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that is refused is not added."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where parameters or settings are out of range."""
        check_real(group["params"])
        for name in ("lr", "weight_decay"):
            check_nonnegative(name, group[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, to the bit."""
        built, found = self.param_groups, list[dict[str, Any]]()

        def look(_: Optimizer, saved: dict[str, Any]) -> None:
            self._check_state(saved)
            found.append(saved)

        def restore(_: Optimizer) -> None:
            for group, own in zip(self.param_groups, built, strict=True):
                group.update({name: value for name, value in own.items() if name not in group})
            self._restore(found[0])

        # After the user's own hooks on the way in, before them on the way out.
        hooks = [
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        """Raise where a checkpoint does not fit; nothing is changed then."""

    def _saved(self, state_dict: dict[str, Any]) -> State:
        """A checkpoint's state by parameter."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        return {p: state_dict["state"].get(i, {}) for i, p in zip(ids, params, strict=True)}

    def _restore(self, state_dict: dict[str, Any]) -> None:
        """Put the checkpoint's own tensors in the place of those that torch has cast."""
        for p, state in self._saved(state_dict).items():
            if state:
                self.state[p] = {name: self._kept(p, name, value) for name, value in state.items()}

    def _kept(self, p: Tensor, name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self._kept(p, name, item) for item in value]
        if not isinstance(value, Tensor):
            return value
        if name in self.as_saved:
            return value.to("cpu", copy=True)
        return value.to(p.device, self.state_dtype(p) if value.is_floating_point() else value.dtype, copy=True)
