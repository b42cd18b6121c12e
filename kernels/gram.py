"""What is measured of a layer: second moments and gradients made of its inputs x and output gradients e."""

from torch import Tensor

# Per-sample gradients are formed at most this many elements at a time.
CHUNK_ELEMENTS = 2**24
# On a CPU a sum of outer products is formed without its lower half, in up to four panels of this many columns or more,
# where the rows are so many that copying panels is little beside it.
PANEL, PANELS, MANY = 192, 4, 1024


def gram(rows: Tensor) -> Tensor:
    """Sum of outer products over rows: `(k, B, T, n) -> (k, n, n)`, sum_bt r_bt r_bt^T.

    >>> import torch
    >>> gram(torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])).tolist()
    [[[1.0, 2.0], [2.0, 5.0]]]
    """
    flat = rows.flatten(1, 2)
    k, count, n = flat.shape
    panels = min(PANELS, n // PANEL) if flat.device.type == "cpu" and count >= MANY else 1
    if panels < 2:
        return flat.mT @ flat
    total, size = flat.new_empty(k, n, n), -(-n // panels)
    for start in range(0, n, size):
        panel = flat[..., start : start + size].mT @ flat[..., start:]
        total[:, start : start + size, start:] = panel
        total[:, start + size :, start : start + size] = panel[..., size:].mT
    return total


def squared_gradients(x: Tensor, e: Tensor) -> Tensor:
    """Sum over samples of the squared per-sample gradient, elementwise.

        S_ij = sum_b (sum_t e_bti x_btj)^2

    Args:
        x: (k, B, T, n_in).
        e: (k, B, T, n_out).

    Returns:
        (k, n_out, n_in).

    >>> import torch
    >>> x, e = torch.tensor([[[[1.0]], [[2.0]]]]), torch.tensor([[[[3.0]], [[1.0]]]])
    >>> squared_gradients(x, e).item()
    13.0
    """
    k, samples, positions, n_in = x.shape
    n_out = e.shape[-1]
    if positions == 1:  # (e x)^2 = e^2 x^2: one product, no per-sample gradient
        return e.squeeze(2).square().mT @ x.squeeze(2).square()
    total = x.new_zeros(k, n_out, n_in)
    step = max(1, CHUNK_ELEMENTS // max(1, k * n_in * n_out))
    for start in range(0, samples, step):
        part = e[:, start : start + step].mT @ x[:, start : start + step]
        total += part.square_().sum(1)
    return total
