"""The preconditioner protocol: three methods, and stacked quantities that save and load themselves."""

import gc
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grng.curvature import Batch, Curvature, Layer, Statistics
from grng.distributed import Processes
from grng.errors import invalid
from grng.kernels import ema_


@dataclass
class Group:
    """Matrices of one shape: k of them, from one or several layers, stacked as (k, n_out, n_in)."""

    n_out: int
    n_in: int
    indexed: bool
    plain: bool
    dtype: torch.dtype
    device: torch.device
    layers: list[Layer] = field(default_factory=list)
    size: int = 0


def make_groups(layers: Sequence[Layer], config: Curvature) -> list[Group]:
    """Sort layers into groups of one shape, dtype and device, and tell each layer its slots."""
    groups: dict[tuple, Group] = {}
    for layer in layers:
        dtype, device = config.factor_dtype(layer.owner), layer.owner.device
        key = (layer.n_out, layer.n_in, layer.indexed, layer.plain, dtype, device)
        group = groups.setdefault(key, Group(*key))
        layer.group = list(groups).index(key)
        layer.slots = slice(group.size, group.size + layer.blocks)
        group.layers.append(layer)
        group.size += layer.blocks
    return list(groups.values())


class Stacked:
    """One tensor per matrix, of a shape that depends on its group; equal shapes share one persistent stack.

    Attributes:
        stacks: the stacks, (sum of k over the groups of one shape, *shape).
        values: per group its part of a stack, (k, *shape): a view.
    """

    def __init__(self, groups: Sequence[Group], shape: Callable[[Group], tuple[int, ...]], fill: float = 0.0) -> None:
        # Quantities of one side of the matrices fall into stacks alike, whatever their shapes: factor i of one belongs
        # to basis i of another.
        keys = [(tuple(shape(g)), g.indexed, g.plain, g.dtype, g.device) for g in groups]
        self.keys = list(dict.fromkeys(keys))
        self.places: list[tuple[int, int]] = []
        sizes = dict.fromkeys(self.keys, 0)
        for key, group in zip(keys, groups, strict=True):
            self.places.append((self.keys.index(key), sizes[key]))
            sizes[key] += group.size
        self.stacks = [torch.full((sizes[k], *k[0]), fill, dtype=k[3], device=k[4]) for k in self.keys]
        self.values = self.split(self.stacks, groups)

    def split(self, stacks: list[Tensor], groups: Sequence[Group]) -> list[Tensor]:
        """Tensors laid out as the stacks are, seen group by group."""
        places = zip(self.places, groups, strict=True)
        return [stacks[i][start : start + group.size] for (i, start), group in places]

    def spread(self, values: list[Tensor]) -> list[Tensor]:
        """The inverse of `split` for one number per matrix: (k,) a group -> one tensor a stack."""
        out = [stack.new_zeros(len(stack)) for stack in self.stacks]
        for (i, start), value in zip(self.places, values, strict=True):
            out[i][start : start + len(value)] = value
        return out

    def of(self, layer: Layer) -> Tensor:
        """A layer's own part, (blocks, *shape): a view."""
        return self.values[layer.group][layer.slots]


class Moment(Stacked):
    """A running average of sums over rows, stack by stack.

    `add` collects within a step, over uses and micro-batches; `update` folds sum / weight into the average.
    """

    def __init__(self, groups: Sequence[Group], shape: Callable[[Group], tuple[int, ...]], decay: float) -> None:
        super().__init__(groups, shape)
        self.decay = decay
        self.counts = [stack.new_zeros(len(stack)) for stack in self.stacks]
        self.count_values = self.split(self.counts, groups)
        self._sums: list[Tensor | None] = [None] * len(self.stacks)
        self._weights: list[Tensor | None] = [None] * len(self.stacks)
        self._seen: list[Tensor | None] = [None] * len(self.stacks)  # 1 where something was added

    def add(self, layer: Layer, value: Tensor, weight: Tensor | None = None) -> None:
        """Add a sum over rows (blocks, *shape) and, where rows are counted per matrix, their number (blocks,)."""
        i, start = self.places[layer.group]
        slots = slice(start + layer.slots.start, start + layer.slots.stop)
        self._begin(i)
        self._sums[i][slots] += value  # type: ignore[index]
        self._seen[i][slots] = 1  # type: ignore[index]
        if weight is not None:
            self._weights[i][slots] += weight  # type: ignore[index]

    def _begin(self, i: int) -> None:
        if self._sums[i] is None:
            self._sums[i] = torch.zeros_like(self.stacks[i])
            self._weights[i], self._seen[i] = torch.zeros_like(self.counts[i]), torch.zeros_like(self.counts[i])

    def pending(self) -> list[Tensor]:
        """What was added since the last update: tensors of the same shapes in every process."""
        for i in range(len(self.stacks)):
            self._begin(i)
        return [t for tensors in (self._sums, self._weights, self._seen) for t in tensors if t is not None]

    def update(self, batch: Batch, by_rows: bool = False) -> None:
        """Fold what was added into the average: sums divided by the batch's predictions, or by the rows that were
        added with them. A batch that is not valid leaves average and count as they are."""
        for i, (total, rows, seen) in enumerate(zip(self._sums, self._weights, self._seen, strict=True)):
            if total is None or rows is None or seen is None:
                continue
            observed = (seen > 0) & batch.valid
            if by_rows:
                observed &= rows > 0
                mean = total / rows.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
            else:
                mean = total / batch.predictions.to(total)
            ema_(self.stacks[i], self.counts[i], mean, self.decay, observed)
        self.discard()

    def discard(self) -> None:
        """Forget what was added since the last update."""
        self._sums = [None] * len(self.stacks)
        self._weights = [None] * len(self.stacks)
        self._seen = [None] * len(self.stacks)


class Preconditioner(ABC):
    """Makes a direction out of a gradient. A method states three things: what it observes, how it refreshes, how it
    preconditions.

        observe(layer, statistics)     inside the backward pass, for every use of a layer on a statistics step
        refresh(batch, decompose)      once in the step, after all of them
        precondition(gradients, damping) -> directions

    Gradients and directions are lists with one stack (k, n_out, n_in) a group; a direction is added to the
    parameters, so that <direction, gradient> < 0. Quantities made by `moment` and `buffer` in `allocate` are saved
    with the parameters and loaded back without further code.

    >>> from grng.preconditioners import Preconditioner, register_preconditioner
    >>> @register_preconditioner("example-rms")
    ... class RMS(Preconditioner):
    ...     def allocate(self):
    ...         self.second = self.moment("second", lambda group: (group.n_out, group.n_in))
    ...
    ...     def observe(self, layer, statistics):
    ...         self.second.add(layer, statistics.squared_gradients())
    ...
    ...     def refresh(self, batch, decompose):
    ...         self.second.update(batch)
    ...
    ...     def precondition(self, gradients, damping):
    ...         return [-g / (s.sqrt() + d) for g, s, d in zip(gradients, self.second.values, damping)]
    """

    name = "custom"
    weighs_sums = False  # whether the gradient of the summed loss enters, as N times that of the loss
    takes_others = False  # whether parameters outside of layers are observed too, as layers that are `plain`
    elementwise = False  # whether an element's direction depends on no other element's gradient or curvature
    every_step = False  # whether statistics are needed at every step, whatever `stats_every` says

    _owner: Callable[[], Any] = staticmethod(lambda: None)  # a weak reference

    def attach(self, optimizer: Any) -> None:
        """Belong to an optimizer from now on; raise ValueError where it belongs to one that is still open."""
        if self._owner() is not None:
            gc.collect()  # lest one that nobody holds any more should count
        owner = self._owner()
        if owner is not None and owner.open:
            raise invalid(
                "preconditioner",
                self,
                "an instance of its own for every optimizer",
                "This one is another optimizer's, whose factors it would change: make a new one, or close that",
            )
        self._owner = weakref.ref(optimizer)

    def setup(self, groups: Sequence[Group], config: Curvature) -> None:
        """Called by the optimizer with the groups of layers; calls `allocate`."""
        self.groups, self.config = list(groups), config
        # A lower bound of every damping to come, one that goes with (k, 1, 1) for every group
        self.floors = [torch.zeros((), dtype=torch.float64)] * len(self.groups)
        self.saved: dict[str, Stacked] = {}
        self.failures = torch.zeros(())  # decompositions that found no result
        self.allocate()

    def obstacle(self, layer: Layer, config: Curvature) -> str:
        """Why a layer is left to the fallback, or "". Asked before `setup`."""
        return ""

    def remark(self, layer: Layer) -> str:
        """What the coverage says of a layer beside what it is."""
        return ""

    def allocate(self) -> None:  # noqa: B027
        """Make the quantities that live across steps; a method without any has nothing to do here."""

    @abstractmethod
    def observe(self, layer: Layer, statistics: Statistics) -> None:
        """Take what is needed from one use of a layer."""

    @abstractmethod
    def refresh(self, batch: Batch, decompose: bool) -> None:
        """Fold the observations in; `decompose` says that decompositions or inverses are due."""

    @abstractmethod
    def precondition(self, gradients: list[Tensor], damping: list[Tensor]) -> list[Tensor]:
        """Directions for the gradients; damping has one entry a group, (k, 1, 1)."""

    def precondition_penalised(self, gradients: list[Tensor], damping: list[Tensor], rho: Tensor) -> list[Tensor]:
        """Directions for G + rho F G, of which RENG's mode "ggn" is made."""
        return self.precondition(self.penalised(gradients, rho), damping)

    def penalised(self, gradients: list[Tensor], rho: Tensor) -> list[Tensor]:
        """G + rho F G per group."""
        products = self.curvature_product(gradients)
        return [G + rho.to(G.dtype) * FG for G, FG in zip(gradients, products, strict=True)]

    def scales(self) -> list[Tensor]:
        """The largest eigenvalue that F has in every matrix, (k, 1, 1) a group; ones where the method knows no F."""
        return [torch.ones(g.size, 1, 1, device=g.device) for g in self.groups]

    def largest_curvature(self) -> Tensor:
        """The scale of the curvature, its largest eigenvalue where the method knows it: defaults are relative to it."""
        return torch.stack([scale.amax() for scale in self.scales()]).amax()

    def measured(self) -> list[Tensor]:
        """Which matrices have been measured, one bool (k, 1, 1) a group; the others are not moved."""
        for stacked in self.saved.values():
            if isinstance(stacked, Moment):
                return [(count > 0).view(-1, 1, 1) for count in stacked.count_values]
        return [torch.ones(g.size, 1, 1, dtype=torch.bool, device=g.device) for g in self.groups]

    def curvature_product(self, gradients: list[Tensor]) -> list[Tensor]:
        """F G per group."""
        raise TypeError(f"preconditioner {self.name!r} has no curvature product: RENG's mode 'ggn' needs kfac or ekfac")

    def decomposition_cost(self) -> float:
        """Floating-point operations of one `refresh` with `decompose`, in units of those of a matrix product: how often
        it is worth while is judged by it. Zero: it may come with all statistics."""
        return 0.0

    # Several processes: between `observe` and `refresh`, on every one of them.

    def pending(self) -> list[Tensor]:
        """What `observe` has collected that is to be added up over the processes, in place: of the same shapes in all
        of them. What stands in moments."""
        return [t for stacked in self.saved.values() if isinstance(stacked, Moment) for t in stacked.pending()]

    def share(self, processes: Processes) -> None:  # noqa: B027
        """Exchange what `observe` has collected that cannot be added up, by `processes.gather`."""

    def discard(self) -> None:
        """Forget observations of a step that is not to be counted."""
        for stacked in self.saved.values():
            if isinstance(stacked, Moment):
                stacked.discard()

    def moment(self, name: str, shape: Callable[[Group], tuple[int, ...]], decay: float | None = None) -> Moment:
        """A running average (decay from the settings) that is saved under `name`."""
        self.saved[name] = moment = Moment(self.groups, shape, self.config.ema if decay is None else decay)
        return moment

    def buffer(self, name: str, shape: Callable[[Group], tuple[int, ...]], fill: float = 0.0) -> Stacked:
        """A stacked quantity that is saved under `name`."""
        self.saved[name] = Stacked(self.groups, shape, fill)
        return self.saved[name]

    def tensors(self) -> list[Tensor]:
        """All stacks of what is saved."""
        counts = [count for stacked in self.saved.values() if isinstance(stacked, Moment) for count in stacked.counts]
        return [stack for stacked in self.saved.values() for stack in stacked.stacks] + counts

    def state(self, layer: Layer) -> dict[str, Tensor]:
        """A layer's part of everything that is saved: views, so that a checkpoint is always current."""
        state = {}
        for name, stacked in self.saved.items():
            state[name] = stacked.of(layer)
            if isinstance(stacked, Moment):
                state[name + ".count"] = stacked.count_values[layer.group][layer.slots]
        return state

    def load_state(self, layer: Layer, state: dict[str, Tensor]) -> None:
        """Copy a layer's part back."""
        for name, view in self.state(layer).items():
            if name not in state or state[name].shape != view.shape:
                raise ValueError(
                    f"the checkpoint does not fit layer {layer.name!r} under preconditioner {self.name!r}: "
                    f"{name!r} of shape {tuple(view.shape)} is expected"
                )
            view.copy_(state[name])
