"""The columns of V, with E[V V^T] = sum_i F_i, kept as the rows that they are made of: V itself is never held whole.

For each of k matrices (n_out, n_in), column c is V_c = sum_r e_cr x_cr^T: one row where a column is one sample of a
layer that is used at one position, more where it is a sum over positions or over a group of samples.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

Part = tuple[slice, slice]  # of the matrices, of their output rows

CACHED = 2**21
LAUNCHED = 2**26  # elements that are worth an accelerator's launch

# Of `products` on a processor, as measured: how many rows are many, how long is long; parts and rows of one product.
MANY, LONG, PARTS, BLOCK = 48, 2**12, 32, 12


class Stack(Protocol):
    """(k, n_out, n_in): a tensor, or what is computed part by part."""

    def __getitem__(self, part: Part, /) -> Tensor: ...


def pieces(k: int, n_out: int, width: int, device: torch.device) -> Iterator[Part]:
    """Parts of k matrices of n_out rows, a row being `width` elements, so that what is done to one stays in the cache.

    >>> [rows for _, rows in pieces(1, 5, CACHED // 2, torch.device("cpu"))]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    most = CACHED if device.type == "cpu" else LAUNCHED
    several = min(k, max(1, most // max(1, width * n_out)))
    step = min(n_out, max(1, most // max(1, several * width)))
    for first in range(0, k, several):
        for start in range(0, n_out, step):
            yield slice(first, min(k, first + several)), slice(start, min(n_out, start + step))


class Columns:
    """Common part: everything that only needs V in chunks of output rows.

    Attributes:
        e: (k, m, R, n_out) output gradients; m columns of R rows.
        apart: whether the rows are known to be draws of mean zero, each a sample's own. Then the rows' own squares have
            the expectation of the column's square at a fraction of its variance, and `squares` is made of them.
    """

    e: Tensor
    apart: bool = False

    @property
    def touched(self) -> Tensor | None:
        """Of the inputs, where V is zero at the others."""
        return None

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What V is made of: the inputs and e."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """m."""
        return self.e.shape[1]

    def zeros(self, count: int) -> Self:
        """As many columns that are zero."""
        raise NotImplementedError

    def chunk(self, part: Part, into: Tensor) -> None:
        """Write V[matrices, :, rows], only of the inputs that are touched, into (matrices, m, rows * width)."""
        raise NotImplementedError

    def combine(self, z: Tensor) -> Tensor:
        """sum_c z_c V_c: z (m,) -> (k, n_out, n_in)."""
        raise NotImplementedError

    def _chunks(self, extra: int = 0) -> Iterator[tuple[Part, Tensor]]:
        """V in parts (matrices, m + extra, rows * width), the last `extra` rows to be filled by who asks. The memory is
        the same for all of them."""
        k, m, _, n_out = self.e.shape
        width = self._width()
        buffer: Tensor | None = None
        for part in pieces(k, n_out, (m + extra) * width, self.e.device):
            count, rows = (each.stop - each.start for each in part)
            if buffer is None:  # the first part is the largest
                buffer = self.e.new_empty(count * (m + extra) * rows * width)
            V = buffer[: count * (m + extra) * rows * width].view(count, m + extra, rows * width)
            self.chunk(part, V[:, :m])
            yield part, V

    def _width(self) -> int:
        """Inputs that a chunk spans."""
        raise NotImplementedError

    @classmethod
    def joined(cls, parts: "Sequence[Self]", axis: int) -> Self:
        """Columns put together: axis 0 stacks matrices, 1 appends columns, 2 appends rows to the columns; where parts
        differ in rows they are filled up with zeros."""
        raise NotImplementedError

    def _take(self, values: Stack, part: Part) -> Tensor:
        """The part (matrices, 1, rows * width) of (k, n_out, n_in) that a chunk spans."""
        found = values[part]
        return (found if self.touched is None else found[..., self.touched]).flatten(1).unsqueeze(1)

    def _put(self, out: Tensor, part: Part, values: Tensor) -> None:
        found = out[part]
        if self.touched is None:
            found += values.view_as(found)
        else:
            found.index_add_(-1, self.touched, values.view(*found.shape[:-1], -1))

    def dense(self) -> Tensor:
        """V itself, (m, k, n_out, n_in): to look at."""
        return torch.stack([self.combine(unit) for unit in torch.eye(self.count, dtype=self.e.dtype).to(self.e.device)])

    def gram(self, q: Stack | None = None, others: "Columns | None" = None) -> Tensor:
        """V^T q V (m, m), summed over the k matrices; q (k, n_out, n_in) is diagonal, None is the identity.

        `others` are columns of the same rows that stand on the right.
        """
        total = self.e.new_zeros(self.count, self.count)
        right = None if others is None else others._chunks()
        for part, V in self._chunks():
            W = V if right is None else next(right)[1]
            total += torch.bmm(V if q is None else V * self._take(q, part), W.mT).sum(0)
        return total

    def measure(self, p: Stack, lam: Tensor, G: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """V^T q V (m, m) and V^T q G (m,) for q = p / (1 + lam p), and `squares`, in one pass.

        Args:
            p, G: (k, n_out, n_in).
            squares: likewise, added to.
            lam: (k, 1, 1).
        """
        m = self.count
        gram = self.e.new_zeros(m + 1, m + 1)
        for part, V in self._chunks(extra=1):
            # One buffer, which stays in the cache: G stands beside V, so that one product serves both.
            prior = self._take(p, part)
            q = prior / (1 + lam[part[0]] * prior)
            root = q.sqrt()
            columns, last = V.split_with_sizes((m, 1), 1)
            columns.mul_(root)
            torch.mul(self._take(G, part), root, out=last)
            gram += products(V)
            if not self.square_by_rows:
                self._put(squares, part, columns.mul_(columns).sum(1, keepdim=True).div_(q))
        if self.square_by_rows:
            squares += self.squares(squares)
        return gram[:m, :m], gram[:m, m]

    def lengths(self, q: Tensor) -> Tensor:
        """v^T q v for every column v, (m,); q (k, n_out, n_in) is diagonal."""
        total = self.e.new_zeros(self.count)
        for part, V in self._chunks():
            total += (V.square() @ self._take(q, part).mT).sum((0, 2))
        return total

    @property
    def square_by_rows(self) -> bool:
        """Whether the squares need no column as a whole."""
        return False

    def squares(self, like: Tensor) -> Tensor:
        """rowsum V o V, or what stands for it where rows are apart, in the shape of `like` (k, n_out, n_in)."""
        out = torch.zeros_like(like)
        for part, V in self._chunks():
            self._put(out, part, V.mul_(V).sum(1))
        return out

    def whitened_squares(self, root: Tensor, like: Tensor) -> Tensor:
        """rowsum of V (L L^T)^{-1} o V for a lower triangular L (m, m)."""
        out = torch.zeros_like(like)
        for part, V in self._chunks():
            half = torch.linalg.solve_triangular(root, V, upper=False)
            self._put(out, part, half.square().sum(1))
        return out


class DenseColumns(Columns):
    """Columns of linear maps: x (k, m, R, n_in), e (k, m, R, n_out).

    >>> V = DenseColumns(torch.ones(1, 2, 1, 3), torch.tensor([[[[1.0]], [[2.0]]]]))  # two columns of one row each
    >>> V.gram().tolist()
    [[3.0, 6.0], [6.0, 12.0]]
    """

    def __init__(self, x: Tensor, e: Tensor, apart: bool = False) -> None:
        self.x, self.e, self.apart = x, e, apart

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.x, self.e

    def zeros(self, count: int) -> "DenseColumns":
        k, _, _, n_in = self.x.shape
        x, e = self.x.new_zeros(k, count, 1, n_in), self.e.new_zeros(k, count, 1, self.e.shape[-1])
        return DenseColumns(x, e, self.apart)

    @property
    def single(self) -> bool:
        """Whether every column is an outer product."""
        return self.e.shape[2] == 1

    @classmethod
    def joined(cls, parts: "Sequence[DenseColumns]", axis: int) -> "DenseColumns":
        if len(parts) == 1:
            return parts[0]
        most = max(part.e.shape[2] for part in parts) if axis == 1 else 0
        x, e = ([getattr(part, name) for part in parts] for name in ("x", "e"))
        if axis == 1:
            x, e = [longer(rows, most, 2) for rows in x], [longer(rows, most, 2) for rows in e]
        return cls(torch.cat(x, axis), torch.cat(e, axis), all(part.apart for part in parts))

    def _width(self) -> int:
        return self.x.shape[-1]

    def chunk(self, part: Part, into: Tensor) -> None:
        matrices, rows = part
        e, x = self.e[matrices, ..., rows], self.x[matrices]
        shape = *e.shape[:2], e.shape[-1], x.shape[-1]
        if self.single:
            torch.mul(e.mT, x, out=into.view(shape))
        elif len(e) == 1:
            torch.bmm(e[0].mT, x[0], out=into.view(shape)[0])
        else:
            into.view(shape).copy_(e.mT @ x)

    def combine(self, z: Tensor) -> Tensor:
        weighted = self.e * z.view(1, -1, 1, 1)
        return weighted.flatten(1, 2).mT @ self.x.flatten(1, 2)

    def inner(self, G: Tensor) -> Tensor:
        """V^T G (m,)."""
        return torch.bmm(self.e.flatten(1, 2), G).mul_(self.x.flatten(1, 2)).sum((0, 2)).view(self.count, -1).sum(1)

    def lengths(self, q: Tensor) -> Tensor:
        if not self.single:
            return super().lengths(q)
        x, e = self.x.squeeze(2).square(), self.e.squeeze(2).square()
        return (torch.bmm(e, q) * x).sum((0, 2))

    @property
    def square_by_rows(self) -> bool:
        return self.single or self.apart

    def squares(self, like: Tensor) -> Tensor:
        if self.square_by_rows:  # (e x)^2 = e^2 x^2: one product
            return self.e.flatten(1, 2).square().mT @ self.x.flatten(1, 2).square()
        return super().squares(like)

    def transformed(self, A: Tensor, B: Tensor) -> "DenseColumns":
        """Columns A^T V_c B, for A (k, n_out, n_out) and B (k, n_in, n_in)."""
        k, m, R, _ = self.e.shape
        x, e = torch.bmm(self.x.flatten(1, 2), B), torch.bmm(self.e.flatten(1, 2), A)
        return DenseColumns(x.view(k, m, R, -1), e.view(k, m, R, -1))

    def scaled(self, factor: Tensor) -> "DenseColumns":
        """Columns times a number for each matrix, (k, 1, 1)."""
        return DenseColumns(self.x, self.e * factor.unsqueeze(1))

    def dot(self, other: "DenseColumns") -> Tensor:
        """<V_c, W_c> for every column, (m,), summed over the k matrices."""
        return ((self.e @ other.e.mT) * (self.x @ other.x.mT)).sum((0, 2, 3))

    def cross(self, other: "DenseColumns") -> Tensor:
        """V^T W (m, m) summed over the k matrices, for columns W of as many rows: by products of rows where that costs
        less than forming V and W."""
        _, m, R, n_out = self.e.shape
        n_in = self.x.shape[-1]
        by_rows = (m * R) ** 2 * (n_in + n_out)
        by_columns = 2 * m * R * n_out * n_in + m * m * n_out * n_in
        if by_rows > by_columns:
            return self.gram(others=other)
        x, e = self.x.flatten(1, 2), self.e.flatten(1, 2)
        products = torch.bmm(x, other.x.flatten(1, 2).mT) * torch.bmm(e, other.e.flatten(1, 2).mT)
        return products.sum(0).view(m, R, m, R).sum((1, 3))


class IndexColumns(Columns):
    """Columns of an embedding: its inputs are one-hot, index (m, R), e (1, m, R, n_out)."""

    def __init__(self, index: Tensor, e: Tensor, n_in: int) -> None:
        self.index, self.e, self.n_in = index, e, n_in

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        return self.index, self.e

    @classmethod
    def joined(cls, parts: "Sequence[IndexColumns]", axis: int) -> "IndexColumns":
        if len(parts) == 1:
            return parts[0]
        index, e = [part.index for part in parts], [part.e for part in parts]
        if axis == 1:
            most = max(part.e.shape[2] for part in parts)
            index, e = [longer(i, most, 1) for i in index], [longer(rows, most, 2) for rows in e]
        return cls(torch.cat(index, axis - 1), torch.cat(e, axis), parts[0].n_in)

    def zeros(self, count: int) -> "IndexColumns":
        index, e = self.index.new_zeros(count, 1), self.e.new_zeros(1, count, 1, self.e.shape[-1])
        return IndexColumns(index, e, self.n_in)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return torch.unique(self.index, return_inverse=True)

    @property
    def touched(self) -> Tensor:
        return self._places[0]

    def _width(self) -> int:
        return len(self.touched)

    def chunk(self, part: Part, into: Tensor) -> None:
        m, width = self.count, self._width()
        bins = (torch.arange(m, device=self.e.device).unsqueeze(1) * width + self._places[1]).flatten()
        e = self.e[0, ..., part[1]].flatten(0, 1)
        sums = e.new_zeros(m * width, e.shape[1]).index_add_(0, bins, e)
        into.view(1, m, -1, width).copy_(sums.view(1, m, width, -1).mT)

    def combine(self, z: Tensor) -> Tensor:
        e = (self.e * z.view(1, -1, 1, 1)).flatten(0, 2)
        return e.new_zeros(self.n_in, e.shape[1]).index_add_(0, self.index.flatten(), e).mT.unsqueeze(0)


def by_group(rows: Tensor, groups: int, offset: int = 0, axis: int = 1) -> Tensor:
    """Rows of samples as rows of groups: (..., B, T, ...) -> (..., groups, ceil(B/groups) * T, ...).

    Sample b belongs to group (offset + b) mod groups, so that a partition goes on over micro-batches. With labels drawn
    from the model the groups' gradients are independent and of mean zero, so that sum_g V_g V_g^T is an unbiased
    estimate of the summed Fisher, at the price of one weight gradient. Groups that are not full end with zeros.

    >>> by_group(torch.tensor([[1.0], [2.0], [4.0]]), 2, axis=0).tolist()
    [[1.0, 4.0], [2.0, 0.0]]
    """
    samples = rows.shape[axis]
    before = offset % groups
    after = -(before + samples) % groups
    rows = pad(rows, [0, 0] * (rows.ndim - axis - 1) + [before, after])
    return rows.unflatten(axis, (-1, groups)).transpose(axis, axis + 1).flatten(axis + 1, axis + 2)


def longer(rows: Tensor, count: int, axis: int) -> Tensor:
    """Filled up with zeros to `count` along an axis.

    >>> longer(torch.ones(1), 2, 0).tolist()
    [1.0, 0.0]
    """
    missing = count - rows.shape[axis]
    return rows if missing == 0 else pad(rows, [0, 0] * (rows.ndim - axis - 1) + [0, missing])


def products(V: Tensor) -> Tensor:
    """sum over k of V_k V_k^T, for a few long rows: (k, m, n) -> (m, m).

    >>> products(torch.ones(2, 3, 5)).tolist()
    [[10.0, 10.0, 10.0], [10.0, 10.0, 10.0], [10.0, 10.0, 10.0]]
    """
    _, m, n = V.shape
    if V.device.type != "cpu" or m >= MANY or n < LONG:
        return torch.bmm(V, V.mT).sum(0)
    # A processor multiplies a few long rows at a third of its speed or less; as a batch of shorter ones it does better,
    # and uses all of its threads.
    whole = n - n % PARTS
    total = V[..., whole:] @ V[..., whole:].mT
    for i, rows in enumerate(V[..., :whole].unflatten(2, (PARTS, -1)).transpose(1, 2)):
        blocks = [torch.bmm(block, rows.mT).sum(0) for block in rows.split(BLOCK, 1)]
        total[i] += torch.cat(blocks)
    return total.sum(0)
