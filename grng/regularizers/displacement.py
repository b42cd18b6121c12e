"""Passes at other weights, after which everything is as it was: parameters, buffers, random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

LOW_PRECISION = (torch.bfloat16, torch.float16)
SETTERS = ("__setitem__", "__set__", "copy_")


@contextmanager
def displaced(parameters: list[nn.Parameter], by: list[Tensor], sign: float, precision: str) -> Iterator[None]:
    """Inside, every parameter is w + sign e, computed in at least float32; afterwards it is w to the bit.

    Parameters of low precision are float32 inside (unless precision="parameter"), and operations that meet both
    precisions promote. Everything else is moved in place and restored from a copy.
    """
    saved = [p.data for p in parameters]
    swap = [precision == "float32" and p.dtype in LOW_PRECISION for p in parameters]
    copies = [None if swapped else w.clone() for w, swapped in zip(saved, swap, strict=True)]
    try:
        with torch.no_grad():
            for p, e, swapped in zip(parameters, by, swap, strict=True):
                if swapped:
                    p.data = p.data.float().add_(e, alpha=sign)
                elif p.dtype in LOW_PRECISION:
                    p.copy_(p.float().add_(e, alpha=sign))
                else:
                    p.add_(e, alpha=sign)
        torch.clear_autocast_cache()  # an autocast around the passes keeps casts of the weights
        if any(swap):
            with Promoting():
                yield
        else:
            yield
    finally:
        with torch.no_grad():
            for p, w, copy in zip(parameters, saved, copies, strict=True):
                if copy is None:
                    p.grad = None  # of another precision than w
                    p.data = w
                else:
                    p.copy_(copy)
        torch.clear_autocast_cache()


class Promoting(TorchFunctionMode):
    """Operations on both low-precision and float32 tensors run in float32, as elementwise ones do by themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name in SETTERS or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        if not in_place:
            dtypes = {t.dtype for t in _tensors([args, kwargs])}
            if torch.float32 in dtypes and not dtypes.isdisjoint(LOW_PRECISION):
                args, kwargs = _promoted(args), _promoted(kwargs)
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _promoted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in LOW_PRECISION else value
    if isinstance(value, dict):
        return {key: _promoted(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_promoted(item) for item in value)
    return value


@contextmanager
def kept_buffers(model: nn.Module | None) -> Iterator[None]:
    """Afterwards the buffers of all modules in training (BatchNorm's running statistics) are what they were.

    Without a model, those of every module that is called inside.
    """
    saved: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
    seen: set[nn.Module] = set()

    def save(root: nn.Module, *_: Any) -> None:
        if root in seen:
            return
        for module in root.modules():
            if module not in seen:
                seen.add(module)
                for name, buffer in module._buffers.items():
                    if buffer is not None and module.training:
                        saved[module, name] = buffer, buffer.detach().clone()

    if model is not None:
        save(model)
    hook = register_module_forward_pre_hook(save) if model is None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        with torch.no_grad():
            for (module, name), (buffer, value) in saved.items():
                buffer.copy_(value)
                module._buffers[name] = buffer


class RandomState:
    """The global generators of the CPU and of the parameters' devices."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.cpu = torch.get_rng_state()
        devices = {p.device for p in parameters if p.device.type == "cuda"}
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def same_random_numbers(before: RandomState | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, random numbers are drawn as from `before` on; afterwards as if nothing had been drawn inside."""
    if before is None:
        yield
        return
    after = RandomState(parameters)
    before.restore()
    try:
        yield
    finally:
        after.restore()
