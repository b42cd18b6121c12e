"""Norms of lists of tensors."""

import torch
from torch import Tensor


def norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms of tensors of any shapes, as one vector, in at least float32: float16 ends at 65504.

    >>> norms([torch.tensor([3e4, 4e4], dtype=torch.float16), torch.ones(2, 2)]).tolist()
    [50000.0, 2.0]
    """
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, dtype=wide))
