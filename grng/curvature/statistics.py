"""What a preconditioner may ask of one use of a layer, given its rows."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from grng.kernels import Columns, DenseColumns, IndexColumns, by_group, gram, squared_gradients

# So many elements of patches are written out at a time: few enough for a CPU's cache, enough to fill other devices.
PATCH_ELEMENTS = {"cpu": 2**21}
MANY_ELEMENTS = 2**25


class Statistics(Protocol):
    """Sums over the rows of one use of a layer; k is the number of its matrices.

    Rows whose output gradient is zero are padding, or positions that the loss does not see; they do not count. All
    gradients are those of the loss summed over predictions, so that they do not depend on the loss's reduction.
    """

    samples: int
    offset: int  # samples that came before, in earlier micro-batches of the step
    aligned: bool  # whether its samples are those of the batch
    drawn: bool  # whether the labels are the model's own: gradients of samples are then independent, of mean zero
    draw: int  # which of the gradients at the model's output this belongs to, where a step takes several

    @property
    def positions(self) -> int:
        """Rows, those included that do not count: a Python number, from shapes alone."""

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What the rows are made of: the inputs, or an embedding's indices, and e."""

    @property
    def rows(self) -> Tensor:
        """(k,) rows that count."""

    def input_sum(self) -> Tensor:
        """(k, n_in, n_in) sum of x x^T, or (k, n_in), its diagonal, for an embedding."""

    def output_sum(self) -> Tensor:
        """(k, n_out, n_out) sum of e e^T."""

    def gradient(self) -> Tensor:
        """(k, n_out, n_in) sum of e x^T."""

    def magnitude(self) -> Tensor:
        """Sum over rows of |e| |x|: what rounding errors of `gradient` are relative to."""

    def squared_gradients(self, U_out: Tensor | None = None, U_in: Tensor | None = None) -> Tensor:
        """(k, n_out, n_in) sum over samples of the squared gradient, in the basis U_out, U_in where it is given."""

    def columns(self, groups: int | None = None) -> Columns:
        """Per-sample gradients as columns of V; or their sums over the samples b with (offset + b) mod groups = g."""

    def reduced(self) -> "Statistics":
        """One row a sample: inputs averaged, output gradients summed over the positions."""

    def joined(self, others: Sequence[Any]) -> "Statistics":
        """With those of further uses, by the same samples, as if all were positions of one."""


class Origin:
    """Where the rows of statistics come from; whoever delivers them sets what differs."""

    def __init__(self, samples: int) -> None:
        self.samples, self.offset, self.draw, self.drawn, self.aligned = samples, 0, 0, True, True


class DenseStatistics(Origin):
    """Statistics of a linear map: x (k, B, T, n_in), e (k, B, T, n_out)."""

    def __init__(self, x: Tensor, e: Tensor) -> None:
        super().__init__(x.shape[1])
        self.x, self.e = x, e

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.x, self.e

    @property
    def positions(self) -> int:
        return self.e.shape[1] * self.e.shape[2]

    @cached_property
    def _counts(self) -> Tensor:
        return (self.e != 0).any(-1)

    @property
    def rows(self) -> Tensor:
        return self._counts.sum((1, 2)).to(self.e.dtype)

    def input_sum(self) -> Tensor:
        return gram(self.x * self._counts.unsqueeze(-1))

    def output_sum(self) -> Tensor:
        return gram(self.e)

    def gradient(self) -> Tensor:
        return self.e.flatten(1, 2).mT @ self.x.flatten(1, 2)

    def magnitude(self) -> Tensor:
        return (self.e.norm(dim=-1) * self.x.norm(dim=-1)).sum()

    def squared_gradients(self, U_out: Tensor | None = None, U_in: Tensor | None = None) -> Tensor:
        x = self.x if U_in is None else self.x @ U_in.unsqueeze(1)
        e = self.e if U_out is None else self.e @ U_out.unsqueeze(1)
        return squared_gradients(x, e)

    def columns(self, groups: int | None = None) -> DenseColumns:
        if groups is None:
            return DenseColumns(self.x, self.e)
        x, e = (by_group(rows, groups, self.offset) for rows in (self.x, self.e))
        return DenseColumns(x, e, apart=self.drawn and self.x.shape[2] == 1)

    def reduced(self) -> "DenseStatistics":
        if self.x.shape[2] == 1:
            return self
        counts = self._counts.unsqueeze(-1)
        mean = (self.x * counts).sum(2, keepdim=True) / counts.sum(2, keepdim=True).clamp(min=1)
        return DenseStatistics(mean, self.e.sum(2, keepdim=True))

    def joined(self, others: "Sequence[DenseStatistics]") -> "DenseStatistics":
        parts = [self, *others]
        return DenseStatistics(torch.cat([s.x for s in parts], 2), torch.cat([s.e for s in parts], 2))


class PatchStatistics(DenseStatistics):
    """Statistics of a convolution. Its rows are patches that overlap, many times the input in memory: they are written
    out at once only where more is asked for than their second moments.

    Args:
        windows: where the patches are in the input, a view (k, images, positions..., channels, kernel...).
        e: (k, B, T, n_out), of the same rows in the same order.
        bias: whether a column of ones follows.
    """

    def __init__(self, windows: Tensor, e: Tensor, bias: bool) -> None:
        Origin.__init__(self, e.shape[1])
        self.windows, self.e, self.bias = windows, e, bias

    @cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        return self._written(self.windows).view(*self.e.shape[:3], -1)

    def _written(self, windows: Tensor) -> Tensor:
        """Some images' patches (k, images, positions..., n_in)."""
        axes = (windows.ndim - 3) // 2
        columns = windows.shape[2 + axes :]
        rows = self.e.new_empty(*windows.shape[: 2 + axes], columns.numel() + self.bias)
        rows[..., : columns.numel()].unflatten(-1, columns).copy_(windows)
        rows[..., columns.numel() :] = 1
        return rows

    def input_sum(self) -> Tensor:
        if "x" in vars(self):
            return super().input_sum()
        k, images = self.windows.shape[:2]
        elements = PATCH_ELEMENTS.get(self.e.device.type, MANY_ELEMENTS)
        step = max(1, elements // max(1, self.windows[:, :1].numel()))
        counts = self._counts.reshape(k, images, -1 if images else 0, 1)
        total = torch.zeros((), dtype=self.e.dtype, device=self.e.device)
        for windows, counted in zip(self.windows.split(step, 1), counts.split(step, 1), strict=True):
            total = total + gram(self._written(windows).flatten(2, -2).mul_(counted))
        return total


class UnitStatistics(DenseStatistics):
    """Statistics of a scale and shift, channel by channel: normalised input and output gradient (B, T, k).

    A sample's gradient u = (sum_t e x, sum_t e) of a channel takes the place of the row, 1 that of its e: Lambda (x)
    Gamma = 1/N sum over samples of u u^T is no approximation then.
    """

    def __init__(self, x: Tensor | None, e: Tensor, shift: bool) -> None:
        products = [] if x is None else [x * e]
        if shift:
            products.append(e)
        u = torch.stack([product.sum(1).mT for product in products], dim=-1)
        counts = (e != 0).any(1).mT
        super().__init__(u.unsqueeze(2), counts.to(e.dtype)[..., None, None])
        self._size = torch.stack([product.abs().sum() for product in products]).sum()

    def magnitude(self) -> Tensor:
        return self._size

    def joined(self, others: "Sequence[DenseStatistics]") -> "DenseStatistics":
        """A sample's gradient is the sum of its gradients."""
        parts = [self, *others]
        counts = torch.stack([s.e for s in parts]).amax(0)
        return DenseStatistics(torch.stack([s.x for s in parts]).sum(0), counts)


class IndexStatistics(Origin):
    """Statistics of an embedding: its inputs are one-hot, index (B, T), e (B, T, n_out); x is never formed."""

    def __init__(self, index: Tensor, e: Tensor, n_in: int) -> None:
        super().__init__(index.shape[0])
        self.index, self.e, self.n_in = index, e, n_in

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.index, self.e

    @property
    def positions(self) -> int:
        return self.index.numel()

    @cached_property
    def _counts(self) -> Tensor:
        return (self.e != 0).any(-1)

    @property
    def rows(self) -> Tensor:
        return self._counts.sum().to(self.e.dtype).view(1)

    def _scatter(self, bins: Tensor, values: Tensor, count: int) -> Tensor:
        return values.new_zeros(count, *values.shape[1:]).index_add_(0, bins.reshape(-1), values)

    def input_sum(self) -> Tensor:
        return self._scatter(self.index, self._counts.reshape(-1).to(self.e.dtype), self.n_in).unsqueeze(0)

    def output_sum(self) -> Tensor:
        return gram(self.e.unsqueeze(0))

    def gradient(self) -> Tensor:
        return self._scatter(self.index, self.e.flatten(0, 1), self.n_in).mT.unsqueeze(0)

    def magnitude(self) -> Tensor:
        return self.e.norm(dim=-1).sum()

    def squared_gradients(self, U_out: Tensor | None = None, U_in: Tensor | None = None) -> Tensor:
        if U_in is not None:
            raise ValueError("an embedding's input basis is the identity: pass U_in=None")
        e = self.e if U_out is None else self.e @ U_out[0]
        sample = torch.arange(self.samples, device=e.device).unsqueeze(1)
        pairs, place = torch.unique(sample * self.n_in + self.index, return_inverse=True)
        per_sample = self._scatter(place, e.flatten(0, 1), len(pairs))
        return self._scatter(pairs % self.n_in, per_sample.square(), self.n_in).mT.unsqueeze(0)

    def columns(self, groups: int | None = None) -> IndexColumns:
        index, e = self.index, self.e
        if groups is not None:
            index, e = (by_group(rows, groups, self.offset, axis=0) for rows in (index, e))
        return IndexColumns(index, e.unsqueeze(0), self.n_in)

    def reduced(self) -> "IndexStatistics":
        return self  # an average of one-hot rows is not one-hot: embeddings are always expanded

    def joined(self, others: "Sequence[IndexStatistics]") -> "IndexStatistics":
        parts = [self, *others]
        return IndexStatistics(torch.cat([s.index for s in parts], 1), torch.cat([s.e for s in parts], 1), self.n_in)


class SummedStatistics(Origin):
    """Statistics of a parameter without geometry: its gradient (1, 1, n) summed over a batch with drawn labels.

    The samples' gradients are independent and of mean zero, so that the square of their sum, over all micro-batches of
    a step, estimates the sum of their squares without bias.
    """

    def __init__(self, gradient: Tensor, samples: int) -> None:
        super().__init__(samples)
        self._gradient = gradient

    @property
    def positions(self) -> int:
        return 1

    def gradient(self) -> Tensor:
        """(1, 1, n)."""
        return self._gradient
