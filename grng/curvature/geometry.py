"""Geometry: how one kind of module becomes rows x and e with dL/dW = sum e x^T.

Every supported module is seen as k matrices of shape (n_out, n_in); a trainable bias is a last column of ones.

    module                              k             row x                                 n_out
    Linear, transformers' Conv1D        1             input                                 outputs
    Conv1d/2d/3d                        groups        patch of the padded input             channels of a group
    ConvTranspose1d/2d/3d               groups        patch of the spread input             channels of a group
    Embedding, EmbeddingBag             1             one-hot                               dimension
    LayerNorm, RMSNorm, BatchNorm, ...  channels      gradient of a sample's (scale, shift) 1
    MultiheadAttention's in_proj        3 (q, k, v)   input                                 dimension
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grng.curvature.statistics import DenseStatistics, IndexStatistics, PatchStatistics, Statistics, UnitStatistics

Shape = tuple[int, int, int]


class Geometry:
    """One kind of module. It has no state: the module is handed in.

    Attributes:
        indexed: whether x is one-hot, so that Lambda is a diagonal.
    """

    indexed = False
    swaps = False  # whether any dimensions may come before the last one, so that samples need not come first

    def shape(self, module: Any) -> Shape:
        """k, n_out and the columns of the weight."""
        raise NotImplementedError

    def view(self, body: Tensor, weight: nn.Parameter) -> Tensor:
        """The matrices (k, n_out, columns) in the weight's own shape: a view."""
        return body.view(weight.shape)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What of the module's arguments the rows are made of."""
        return args[0] if args else next(iter(kwargs.values()))

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        """Rows of one use.

        Args:
            module: whose geometry this is.
            x: its input.
            e: gradient at its output, of the loss summed over predictions.
            batch: samples in the batch, where the model's output shows it: leading dimensions are grouped by it.
            dtype: of the factors.
            parts: whether weight and bias are trained.
        """
        raise NotImplementedError


class LinearGeometry(Geometry):
    swaps = True

    def shape(self, module: Any) -> Shape:
        return 1, module.out_features, module.in_features

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        columns = x.reshape(1, -1, x.shape[-1])
        rows = samples_of(x.shape[0] if x.ndim > 1 else 1, columns.shape[1], batch)
        gradients = e.reshape(1, rows, -1, e.shape[-1])
        return dense(columns.reshape(1, rows, -1, x.shape[-1]) if parts[0] else None, gradients, dtype, parts[1])


class TransposedLinearGeometry(LinearGeometry):
    """transformers' Conv1D, a linear layer whose weight is (n_in, n_out)."""

    def shape(self, module: Any) -> Shape:
        return 1, module.weight.shape[1], module.weight.shape[0]

    def view(self, body: Tensor, weight: nn.Parameter) -> Tensor:
        return body[0].mT


class ConvGeometry(Geometry):
    def shape(self, module: Any) -> Shape:
        groups: int = module.groups
        return groups, module.out_channels // groups, module.weight[0].numel()

    def windows(self, module: Any, x: Tensor, e: Tensor) -> Tensor:
        return conv_windows(module, x)

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        if x.ndim == len(module.kernel_size) + 1:
            x, e = x.unsqueeze(0), e.unsqueeze(0)
        rows, groups = samples_of(x.shape[0], x.shape[0], batch), module.groups
        gradients = e.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
        gradients = gradients.reshape(groups, rows, -1, gradients.shape[-1])
        if not parts[0]:
            return dense(None, gradients, dtype, parts[1])
        return PatchStatistics(self.windows(module, x, e), gradients.to(dtype), parts[1])


class ConvTransposeGeometry(ConvGeometry):
    """A transposed convolution is a convolution, with stride 1 and the kernel turned round, of the input spread out by
    the stride. Its weight is (inputs, outputs of a group, kernel)."""

    def shape(self, module: Any) -> Shape:
        groups: int = module.groups
        return groups, module.out_channels // groups, module.weight[:, 0].numel() // groups

    def view(self, body: Tensor, weight: nn.Parameter) -> Tensor:
        groups, n_out = body.shape[:2]
        matrices = body.view(groups, n_out, weight.shape[0] // groups, *weight.shape[2:])
        return matrices.transpose(1, 2).view(weight.shape)

    def windows(self, module: Any, x: Tensor, e: Tensor) -> Tensor:
        return transposed_windows(module, x, e.shape[2:])


class EmbeddingGeometry(Geometry):
    indexed = swaps = True

    def shape(self, module: Any) -> Shape:
        return 1, module.embedding_dim, module.num_embeddings

    def view(self, body: Tensor, weight: nn.Parameter) -> Tensor:
        return body[0].mT

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        index, n_out = x.reshape(-1), module.embedding_dim
        rows = samples_of(x.shape[0] if x.ndim > 1 else index.numel(), index.numel(), batch)
        e = e.reshape(-1, n_out).to(dtype)
        if module.padding_idx is not None:  # its vector receives no gradient
            e = e * (index != module.padding_idx).unsqueeze(1)
        return IndexStatistics(index.view(rows, -1), e.view(rows, -1, n_out), module.num_embeddings)


class BagGeometry(EmbeddingGeometry):
    """Bags of indices, one a row of a matrix: every index is a row of its own, with the gradient of its bag."""

    swaps = False

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        if x.ndim != 2:
            raise ValueError("bags given by offsets")
        if module.mode == "mean":
            kept = x != (-1 if module.padding_idx is None else module.padding_idx)
            e = e / kept.sum(1, keepdim=True).clamp(min=1)
        e = e.unsqueeze(1).expand(-1, x.shape[1], -1)
        return super().statistics(module, x, e, batch, dtype, parts)


class NormGeometry(Geometry):
    """A normalisation's scale and shift, channel by channel: the block of a channel is exact, not a product.

    A sample's own gradient u = (sum_t e x, sum_t e), x the normalised input, takes the place of the row, and 1 that of
    e: then Lambda (x) Gamma = 1/N sum over samples of u u^T. In BatchNorm the statistics of the batch are held fixed.
    """

    def shape(self, module: Any) -> Shape:
        own = module.weight if module._parameters.get("weight") is not None else module.bias
        return own.numel(), 1, 1

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        channels, lead = self.shape(module)[0], x.shape[0] if x.ndim > 1 else 1
        both = [normalise(module, x), e] if parts[0] else [e]
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            both = [t.movedim(1, -1) for t in both]  # where the others have their channels
        flat = [t.reshape(-1, channels).to(dtype) for t in both]
        *normalised, e = (t.view(samples_of(lead, len(t), batch), -1, channels) for t in flat)
        return UnitStatistics(normalised[0] if normalised else None, e, parts[1])


class RowNormGeometry(NormGeometry):
    """One that normalises along the last dimension alone."""

    swaps = True


class PackedGeometry(Geometry):
    """MultiheadAttention's in_proj: queries, keys and values are projected by a third of the weight each."""

    def shape(self, module: Any) -> Shape:
        return 3, module.embed_dim, module.embed_dim

    def statistics(
        self, module: Any, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype, parts: tuple[bool, bool]
    ) -> Statistics:
        """x (B, T, n); e (B, T, 3 n), zero where this input is not projected."""
        rows = samples_of(x.shape[0], x.shape[0], batch)
        gradients = e.unflatten(-1, (3, -1)).movedim(-2, 0).reshape(3, rows, -1, module.embed_dim)
        columns = x.expand(3, *x.shape).reshape(3, rows, -1, x.shape[-1])
        return dense(columns if parts[0] else None, gradients, dtype, parts[1])


def dense(columns: Tensor | None, gradients: Tensor, dtype: torch.dtype, bias: bool) -> DenseStatistics:
    """Rows (k, B, T, n_in) of a weight, with a column of ones for a bias."""
    gradients = gradients.to(dtype)
    parts = [] if columns is None else [columns.to(dtype)]
    if bias:
        parts.append(gradients.new_ones(*gradients.shape[:3], 1))
    return DenseStatistics(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], gradients)


def samples_of(leading: int, rows: int, batch: int | None) -> int:
    """How many samples the rows belong to: the batch where the leading dimension is a multiple of it."""
    return batch if batch and leading % batch == 0 and rows % batch == 0 else leading


def conv_windows(module: Any, x: Tensor) -> Tensor:
    """The patches that a Conv1d/2d/3d sees of x (B, C, ...): (groups, B, positions..., C/groups, kernel...), a view.

    The input is padded by the module's own mode and then read with strides, which serves every padding mode, dilation
    and group count alike.

    >>> conv_windows(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
    [[[[[1.0, 2.0]], [[2.0, 3.0]]]]]
    """
    padding = list(module._reversed_padding_repeated_twice)
    if any(padding):
        mode = module.padding_mode
        x = F.pad(x, padding) if mode == "zeros" else F.pad(x, padding, mode=mode)
    return _read(x, module.groups, module.kernel_size, module.stride, module.dilation)


def transposed_windows(module: Any, x: Tensor, size: torch.Size) -> Tensor:
    """The patches that a ConvTranspose1d/2d/3d sees whose output has that size, laid out as those of a convolution.

    >>> transposed_windows(nn.ConvTranspose1d(1, 1, 2), torch.tensor([[[1.0, 2.0]]]), torch.Size([3])).tolist()
    [[[[[1.0, 0.0]], [[2.0, 1.0]], [[0.0, 2.0]]]]]
    """
    kernel, dilation = module.kernel_size, module.dilation
    lengths = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *lengths)
    every: Any = (..., *(slice(None, None, step) for step in module.stride))
    spread[every] = x
    padding: list[int] = []
    for n, out, k, d, p in zip(lengths, size, kernel, dilation, module.padding, strict=True):
        before = d * (k - 1) - p
        padding = [
            before,
            out + d * (k - 1) - n - before,
            *padding,
        ]  # torch.nn.functional.pad begins with the last axis
    windows = _read(F.pad(spread, padding), module.groups, kernel, (1,) * len(lengths), dilation)
    return windows.flip(tuple(range(-len(lengths), 0)))  # the kernel is turned round


def _read(
    x: Tensor, groups: int, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Patches of a padded input."""
    axes = x.ndim - 2
    for axis, (k, step, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (k - 1) * d + 1, step)[..., ::d]
    # (B, C, positions..., kernel...)
    return x.unflatten(1, (groups, -1)).movedim(0, 1).movedim(2, 2 + axes)


def normalise(module: Any, x: Tensor) -> Tensor:
    """What a normalisation scales and shifts.

    >>> normalise(nn.RMSNorm(2, eps=0.0), torch.tensor([[1.0, 7.0]])).tolist()
    [[0.20000000298023224, 1.399999976158142]]
    """
    if isinstance(module, nn.modules.batchnorm._NormBase):
        fixed = not module.training and module.running_mean is not None
        mean, var = (module.running_mean, module.running_var) if fixed else (None, None)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            return F.instance_norm(x, mean, var, use_input_stats=not fixed, eps=module.eps)
        return F.batch_norm(x, mean, var, training=not fixed, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    eps = next(getattr(module, name) for name in EPSILONS if hasattr(module, name))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


EPSILONS = ("variance_epsilon", "eps", "epsilon")  # of the RMSNorms of model libraries
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)
PLAIN, LINEAR, PACKED = Geometry(), LinearGeometry(), PackedGeometry()
NORM, ROW_NORM = NormGeometry(), RowNormGeometry()
TRANSPOSED = TransposedLinearGeometry()
KINDS: tuple[tuple[Any, Geometry], ...] = (
    (nn.Linear, LINEAR),
    (nn.Conv1d | nn.Conv2d | nn.Conv3d, ConvGeometry()),
    (nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, ConvTransposeGeometry()),
    (nn.Embedding, EmbeddingGeometry()),
    (nn.EmbeddingBag, BagGeometry()),
)


def find_geometry(module: Any) -> Geometry | None:
    """The geometry of a module, or None for a kind that has none."""
    kind, weight = type(module), module._parameters.get("weight")
    # A normalisation's rows are computed anew, so that only torch's own formula will do.
    if any(issubclass(kind, norm) and kind.forward is norm.forward for norm in NORMS):
        return ROW_NORM if len(getattr(module, "normalized_shape", ())) == 1 else NORM
    if kind.__name__.endswith("RMSNorm") and weight is not None and weight.ndim == 1:
        return ROW_NORM if any(hasattr(module, name) for name in EPSILONS) else None
    if kind.__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2:
        return TRANSPOSED
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return None
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and 1 not in (
        module.groups,
        len(module.weight) // module.groups,
    ):
        return None  # its weight is no view of a stack of matrices
    return next((geometry for kinds, geometry in KINDS if isinstance(module, kinds)), None)
