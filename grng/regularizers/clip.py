"""Clipping by the global norm, as a part of the pipeline whose place is visible."""

from dataclasses import dataclass

from torch import Tensor

from grng.regularizers.base import Parameters, Transform, global_norm
from grng.regularizers.schedule import check_number


@dataclass(frozen=True)
class ClipNorm(Transform):
    r"""g <- g min(1, max_norm / \|g\|), the norm over all parameters that take part.

    After a regularizer that takes passes only: a first gradient that is clipped before it enters a finite difference
    makes that wrong by an order of magnitude.

    Args:
        max_norm: the largest norm that is let through.

    >>> import torch
    >>> from torch import nn
    >>> from grng.regularizers.base import Facts, describe
    >>> p = nn.Parameter(torch.zeros(2))
    >>> clipped = ClipNorm(1.0).transform(describe(Facts(), [{"params": [p]}]), [torch.tensor([3.0, 4.0])], 0)
    >>> [round(g, 3) for g in clipped[0].tolist()]
    [0.6, 0.8]
    """

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("max_norm", self.max_norm, strict=True)

    def transform(self, parameters: Parameters, gradients: list[Tensor], t: int) -> list[Tensor]:
        factor = (self.max_norm / (global_norm(gradients) + 1e-6)).clamp(max=1.0)
        return [g * factor.to(g.dtype) for g in gradients]
