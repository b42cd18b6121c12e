"""Processes that train one model together."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """Several processes whose DistributedDataParallel averages their gradients.

    Attributes:
        rank: which of them this one is.
        size: how many there are.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def sum_(self, tensors: list[Tensor]) -> None:
        """Add up `tensors`, of the same shapes everywhere, in place, by one message a dtype."""
        _sum_(tensors, self.group)

    def average_(self, tensors: list[Tensor]) -> None:
        """Average `tensors` in place."""
        _sum_(tensors, self.group)
        torch._foreach_div_(tensors, self.size)

    def rows(self, own: Tensor) -> Tensor:
        """What `own` (n,) is to be written into, and summed, for everybody to have all of them: (size, n)."""
        rows = own.new_zeros(self.size, len(own))
        rows[self.rank] = own
        return rows

    def gather(self, tensors: Mapping[Any, Tensor], device: torch.device) -> list[dict[Any, Tensor]]:
        """Everybody's tensors by rank, whichever they have: one message says which, then there is one a dtype."""
        layouts: list[Any] = [None] * self.size
        dist.all_gather_object(layouts, {name: (t.shape, t.dtype) for name, t in tensors.items()}, group=self.group)
        found: list[dict[Any, Tensor]] = [{} for _ in layouts]
        for dtype in sorted({kind for layout in layouts for _, kind in layout.values()}, key=str):
            shapes = [{n: shape for n, (shape, kind) in layout.items() if kind == dtype} for layout in layouts]
            sizes = [[shape.numel() for shape in each.values()] for each in shapes]
            own = torch.zeros(max(map(sum, sizes)), dtype=dtype, device=device)
            if shapes[self.rank]:
                flat = torch.cat([tensors[name].reshape(-1) for name in shapes[self.rank]])
                own[: len(flat)] = flat
            everybody = [torch.empty_like(own) for _ in layouts]
            dist.all_gather(everybody, own, group=self.group)
            for each, flat, theirs, lengths in zip(found, everybody, shapes, sizes, strict=True):
                parts = flat[: sum(lengths)].split(lengths)
                each.update({n: part.view(shape) for (n, shape), part in zip(theirs.items(), parts, strict=True)})
        return found


def together() -> Processes | None:
    """The processes of the DistributedDataParallel whose forward pass is running, where they are several.

    Raises:
        RuntimeError: it is under `join()`, where some of them may be through with their data: they make no step.
    """
    caller = DistributedDataParallel._active_ddp_module if several() else None
    if caller is None or dist.get_world_size(caller.process_group) == 1:
        return None
    if caller._join_config.enable:
        raise RuntimeError(
            "GRNG's steps need every process, and DistributedDataParallel.join() lets some end before others: give all "
            "the same number of batches, as torch.utils.data.DistributedSampler does"
        )
    return Processes(caller.process_group)


def several() -> bool:
    """Whether torch.distributed runs several processes, whatever they train.

    >>> several()
    False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that a DistributedDataParallel calls."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def shards(model: nn.Module) -> str:
    """By what the parameters of a model are spread over processes; empty where each process has them whole."""
    # What nobody has imported has spread nothing, and these imports are slow.
    tensor, fsdp = (sys.modules.get(f"torch.distributed.{name}") for name in ("tensor", "fsdp"))
    if tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters()):
        return "DTensor, as of fully_shard"
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        return "FullyShardedDataParallel"
    return ""


def unsynchronised(model: nn.Module | None) -> AbstractContextManager[None]:
    """A context in which forward and backward passes of `model` do not average gradients between processes.

    Raises:
        RuntimeError: there are several processes, but the model is not one that can be asked.
    """
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(model, "no_sync", None)
    if no_sync is not None:
        return no_sync()
    if several():
        raise RuntimeError(
            f"sync=False needs the DistributedDataParallel module as model=, whose no_sync() it enters, but was given: "
            f"{type(model).__name__}"
        )
    return nullcontext()


def average_(tensors: list[Tensor], model: nn.Module | None) -> None:
    """Average `tensors` in place over the processes of the model's group, by one message a dtype.

    >>> t = torch.ones(2)
    >>> average_([t], None)  # one process
    >>> t.tolist()
    [1.0, 1.0]
    """
    if several() and tensors:
        Processes(getattr(model, "process_group", None)).average_(tensors)


def _sum_(tensors: list[Tensor], group: Any) -> None:
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat, group=group)
        parts = flat.split([t.numel() for t in members])
        torch._foreach_copy_(members, [part.view_as(t) for part, t in zip(parts, members, strict=True)])
