"""Running averages of stacked quantities."""

import torch
from torch import Tensor


def ema_(average: Tensor, count: Tensor, new: Tensor, decay: float, observed: Tensor) -> None:
    """Bias-corrected exponential moving average, in place, member by member of a stack.

        count <- count + 1,   average <- average + a (new - average),   a = (1 - b) / (1 - b^count)

    so that after the first observation the average *is* that observation, and b = 1 gives the plain mean. Members
    that were not observed, or whose new value is not finite, keep their average and their count; one whose average is
    not finite starts anew.

    Args:
        average: (k, ...) updated in place.
        count: (k,) observations so far, updated in place.
        new: (k, ...) the new observation.
        decay: b in [0, 1].
        observed: (k,) bool, which members were observed.

    >>> average, count = torch.zeros(2, 1), torch.zeros(2)
    >>> ema_(average, count, torch.tensor([[4.0], [4.0]]), 0.5, torch.tensor([True, False]))
    >>> ema_(average, count, torch.tensor([[1.0], [float("nan")]]), 0.5, torch.tensor([True, True]))
    >>> average.flatten().tolist(), count.tolist()
    ([2.0, 0.0], [2.0, 0.0])
    """
    use = observed & _finite(new)
    lost = ~_finite(average)
    average.masked_fill_(lost.view(-1, *[1] * (average.ndim - 1)), 0)
    count.masked_fill_(lost, 0)
    count += use
    shown = count.clamp(min=1).double()  # in lower precision the first weight is not exactly 1
    weight = 1 / shown if decay == 1 else (1 - decay) / (1 - decay**shown)
    shape = (-1,) + (1,) * (new.ndim - 1)
    weight = torch.where(use, weight, 0).to(average.dtype).view(shape)
    average.lerp_(torch.where(use.view(shape), new, average), weight)


def _finite(stack: Tensor) -> Tensor:
    return torch.isfinite(stack.reshape(len(stack), -1).sum(1))
