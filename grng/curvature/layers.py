"""Geometry: how a layer's input and output gradient become rows x and e with dL/dW = sum e x^T.

Every supported module is seen as k matrices of shape (n_out, n_in), k > 1 only for grouped convolutions; a trainable
bias is a last column of ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grng.curvature.statistics import DenseStatistics, IndexStatistics, Statistics


@dataclass(eq=False)
class Layer:
    """One module with curvature: its parameters, its matrix shape, and where its stacks lie.

    `group` and `slots` say which stack of same-shape matrices holds it and at which indices. `status` is "pending"
    until the captured pair has reproduced the gradient, then "verified" or "failed". A `plain` one is a parameter
    alone, seen as one row; of it only the gradient summed over the batch is known.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    blocks: int
    n_out: int
    n_in: int
    indexed: bool = False
    plain: bool = False
    group: int = -1
    slots: slice = field(default_factory=lambda: slice(0, 0))
    status: str = "pending"
    reason: str = ""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.weight, self.bias) if p is not None]

    @property
    def owner(self) -> nn.Parameter:
        """The parameter that carries the layer's state."""
        return self.parameters[0]

    @property
    def active(self) -> bool:
        return self.status != "failed"

    def views(self, stack: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parts of this layer's matrices (blocks, n_out, n_in) that belong to each parameter, in its shape."""
        columns = self.n_in - (self.bias is not None)
        if self.weight is not None:
            body = stack[..., :columns]
            yield self.weight, body[0].mT if self.indexed else body.view(self.weight.shape)
        if self.bias is not None:
            yield self.bias, stack[..., columns].view(self.bias.shape)

    def put(self, stack: Tensor, values: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Write one tensor per parameter into this layer's matrices (blocks, n_out, n_in); None is written as zero."""
        for parameter, view in self.views(stack):
            value = values(parameter)
            view.zero_() if value is None else view.copy_(value)

    def statistics(self, x: Tensor, e: Tensor, batch: int | None, dtype: torch.dtype) -> Statistics:
        """Rows of one use of the module.

        Args:
            x: the module's input.
            e: gradient at the module's output, of the loss summed over predictions.
            batch: samples in the batch, where the model's output shows it: leading dimensions are grouped by it.
            dtype: of the factors.
        """
        if self.indexed:
            index, e = x.reshape(-1), e.reshape(-1, self.n_out).to(dtype)
            rows = _samples(x.shape[0] if x.ndim > 1 else index.numel(), index.numel(), batch)
            padding = getattr(self.module, "padding_idx", None)
            if padding is not None:  # an embedding's padding vector receives no gradient
                e = e * (index != padding).unsqueeze(1)
            return IndexStatistics(index.view(rows, -1), e.view(rows, -1, self.n_out), self.n_in)
        if isinstance(self.module, nn.Linear):
            columns = x.reshape(1, -1, x.shape[-1])
            gradients = e.reshape(1, -1, self.n_out)
            rows = _samples(x.shape[0] if x.ndim > 1 else 1, columns.shape[1], batch)
        else:
            dims = len(self.module.kernel_size)  # type: ignore[arg-type]
            if x.ndim == dims + 1:
                x, e = x.unsqueeze(0), e.unsqueeze(0)
            rows = _samples(x.shape[0], x.shape[0], batch)
            columns = conv_patches(self.module, x) if self.weight is not None else x.new_zeros(self.blocks, 1, 0)
            gradients = e.flatten(2).view(e.shape[0], self.blocks, self.n_out, -1).permute(1, 0, 3, 2)
        gradients = gradients.reshape(self.blocks, rows, -1, self.n_out).to(dtype)
        parts = []
        if self.weight is not None:
            parts.append(columns.reshape(self.blocks, rows, gradients.shape[2], -1).to(dtype))
        if self.bias is not None:
            parts.append(gradients.new_ones(*gradients.shape[:3], 1))
        return DenseStatistics(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], gradients)


def plain_layer(name: str, module: nn.Module, parameter: nn.Parameter) -> Layer:
    """A parameter without factors, as a matrix of one row."""
    return Layer(name, module, parameter, None, 1, 1, parameter.numel(), plain=True)


def _samples(leading: int, rows: int, batch: int | None) -> int:
    """How many samples the rows belong to: the batch where the leading dimension is a multiple of it."""
    return batch if batch and leading % batch == 0 and rows % batch == 0 else leading


def conv_patches(module: nn.Module, x: Tensor) -> Tensor:
    """Input patches of a Conv1d/2d/3d: (B, C, ...) -> (groups, B, positions, C/groups * prod(kernel)).

    The input is padded by the module's own mode and then read with strides, which serves every padding mode, dilation
    and group count alike.

    >>> conv_patches(nn.Conv1d(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
    [[[[1.0, 2.0], [2.0, 3.0]]]]
    """
    groups: int = module.groups  # type: ignore[assignment]
    padding = list(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    if any(padding):
        mode = module.padding_mode
        x = F.pad(x, padding) if mode == "zeros" else F.pad(x, padding, mode=mode)  # type: ignore[arg-type]
    geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)  # type: ignore[arg-type]
    dims = x.ndim - 2
    for axis, (kernel, stride, dilation) in enumerate(geometry, start=2):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # (B, C, positions..., kernel...) -> (groups, B, positions, C/groups * kernel)
    batch, channels = x.shape[:2]
    positions, kernel = x.shape[2 : 2 + dims], x.shape[2 + dims :]
    x = x.reshape(batch, groups, channels // groups, positions.numel(), kernel.numel())
    return x.permute(1, 0, 3, 2, 4).reshape(groups, batch, positions.numel(), -1)


def make_layer(name: str, module: nn.Module, trainable: set[nn.Parameter]) -> Layer | None:
    """The layer of a supported module, or None where the module has no trainable parameter or is of another kind."""
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return None
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    weight = weight if weight in trainable else None
    bias = bias if bias in trainable else None
    if weight is None and bias is None:
        return None
    if isinstance(module, nn.Embedding):
        return Layer(name, module, weight, None, 1, module.embedding_dim, module.num_embeddings, indexed=True)
    if isinstance(module, nn.Linear):
        return Layer(
            name,
            module,
            weight,
            bias,
            1,
            module.out_features,
            (weight is not None) * module.in_features + (bias is not None),
        )
    blocks, n_out = module.groups, module.out_channels // module.groups
    columns = module.weight[0].numel() if weight is not None else 0
    return Layer(name, module, weight, bias, blocks, n_out, columns + (bias is not None))
