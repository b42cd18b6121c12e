"""Processes that train one model together."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn


def unsynchronised(model: nn.Module | None) -> AbstractContextManager[None]:
    """A context in which forward and backward passes of `model` do not average gradients between processes.

    Raises:
        RuntimeError: there are several processes, but the model is not one that can be asked.
    """
    no_sync: Callable[[], AbstractContextManager[None]] | None = getattr(model, "no_sync", None)
    if no_sync is not None:
        return no_sync()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
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
    if not (dist.is_available() and dist.is_initialized()) or not tensors:
        return
    group = getattr(model, "process_group", None)
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        members = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        parts = flat.split([t.numel() for t in members])
        torch._foreach_copy_(members, [part.view_as(t) for part, t in zip(parts, members, strict=True)])
