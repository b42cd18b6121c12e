"""Tensor contractions whose order is planned once per shape."""

from functools import lru_cache
from typing import Any

import opt_einsum
from torch import Tensor


@lru_cache(maxsize=512)
def _expression(subscripts: str, *shapes: tuple[int, ...]) -> Any:
    return opt_einsum.contract_expression(subscripts, *shapes)


def contract(subscripts: str, *operands: Tensor) -> Tensor:
    """Einstein summation; opt_einsum's plan is kept for every combination of subscripts and shapes.

    >>> import torch
    >>> a, b = torch.arange(6.0).view(2, 3), torch.ones(3, 2)
    >>> contract("ij,jk->ik", a, b).tolist()
    [[3.0, 3.0], [12.0, 12.0]]
    """
    return _expression(subscripts, *(tuple(o.shape) for o in operands))(*operands, backend="torch")
