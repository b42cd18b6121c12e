"""What ties an optimizer to a model: hooks, layers, the preconditioner's stacks; coverage and life cycle."""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from grng.curvature import Capture, Coverage, Curvature, Layer, Statistics
from grng.curvature.engines import Hook
from grng.curvature.plan import check_model, coverage_of, find_layers, named_groups
from grng.distributed import several, unwrapped
from grng.errors import GRNGWarning, check_nonnegative, finite, invalid
from grng.keeping import COUNTERS, KeepingOptimizer
from grng.matrices import Matrices
from grng.preconditioners import Preconditioner, make_groups
from grng.regularizers.base import check_groups
from grng.schedule import Schedule

DRIFT = 1e-4  # of |g|^2 and |D|^2 between processes: rounding stays below it


class AttachedOptimizer(KeepingOptimizer):
    """The part of GRNG that is neither the step nor what is kept."""

    def _attach(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        curvature: Curvature,
        preconditioner: Preconditioner,
        twice: bool,
    ) -> None:
        """Find the layers, allocate their stacks and hook into the model; nothing is touched where that is refused."""
        called, model = model, unwrapped(model)  # whose own output is read, and whose names stand in messages
        check_model(model)
        self._called = weakref.ref(called)
        self._curvature, self._preconditioner = curvature, preconditioner
        self._names = {p: name for name, p in model.named_parameters()}
        super().__init__(named_groups(model, params, self._names), defaults)
        for group in self.param_groups:
            group["base_lr"] = float(group["lr"])
        trainable = {p for group in self.param_groups for p in group["params"]}
        self._frozen = [p for p in self._names if not p.requires_grad]
        self._layers, self._uncovered = find_layers(
            model,
            trainable,
            preconditioner.takes_others and curvature.fisher != "empirical",
            lambda layer: preconditioner.obstacle(layer, curvature),
        )
        self._paired = [] if preconditioner.elementwise else [x for x in self._layers if len(x.parameters) > 1]
        self._shares: Tensor | None = None  # of every matrix in the largest curvature, until the next refresh
        preconditioner.attach(self)
        self._allocate()
        # A weak sink: the finalizer keeps the capture, which must not keep this optimizer.
        self._capture = Capture(
            model,
            self._layers,
            curvature,
            Hook(self, "_observe"),
            twice,
            dropped=Hook(self, "_discard"),
            entered=Hook(self, "_follow"),
        )
        self._finalizer = weakref.finalize(self, self._capture.close)
        self._model = weakref.ref(model)
        self._schedule = Schedule(self._layers, curvature, preconditioner)
        self._fresh: set[Layer] = set()  # observed since the last step
        self._current: set[Layer] = set()  # observed for this step
        self._observed: set[Layer] = set()  # ever observed
        self._missed: dict[Layer, int] = {}  # how often in a row, though they have gradients
        self._link_state()

    def _allocate(self) -> None:
        """Make what lies where the parameters do and is as precise as they are."""
        devices = {p.device for group in self.param_groups for p in group["params"]}
        if len(devices) > 1:
            raise invalid("model", sorted(map(str, devices)), "on one device", "Move it with model.to(device).")
        self._device, self._places = devices.pop(), self._where()
        self._groups = make_groups(self._layers, self._curvature)
        self._matrices = Matrices(self._layers, self._groups)
        self._preconditioner.setup(self._groups, self._curvature)
        self._made = torch.zeros(2, dtype=torch.float64, device=self._device)  # |g|^2 and |D|^2 of the last step
        self._scalars = {name: torch.zeros((), device=self._device) for name in COUNTERS}

    def _observe(self, layer: Layer, statistics: Statistics) -> None:
        self._schedule.observe(layer, statistics)
        self._preconditioner.observe(layer, statistics)
        self._fresh.add(layer)

    def _share(self) -> None:
        """Add up what several processes have measured for this step, so that all of them go on alike.

        Raises:
            RuntimeError: their last steps differ.
        """
        processes = self._capture.processes
        if processes is None and several() and self._schedule.t == 0:
            warnings.warn(
                "torch.distributed runs several processes, but no DistributedDataParallel calls the model: each "
                "measures and steps for itself",
                GRNGWarning,
                stacklevel=5,
            )
        if processes is None or not self._due():
            return
        fresh = torch.tensor([layer in self._fresh for layer in self._layers], dtype=torch.float64)
        own = [self._made, torch.tensor([self._schedule.work], dtype=torch.float64), fresh]
        device = self._device
        rows = processes.rows(torch.cat([*(part.to(device) for part in own), self._capture.report(device)]))
        processes.sum_([rows, *self._preconditioner.pending(), *self._capture.fisher.noise.pending()])
        gradients, directions, work, *fresh_rows = rows[:, : 3 + len(self._layers)].T.tolist()
        if max(gradients) > (1 + DRIFT) * min(gradients):
            raise RuntimeError(
                f"the processes stepped by different gradients: |g|^2 = {gradients}. Let the last backward() before a "
                "step be outside of no_sync(), and go through the DistributedDataParallel module"
            )
        if max(directions) > (1 + DRIFT) * min(directions):
            raise RuntimeError(
                f"the processes made different steps of one gradient: |D|^2 = {directions}. Preconditioner "
                f"{self._preconditioner.name!r} goes by what observe() saw in its own process: let it collect in a "
                "self.moment(...), return other sums from pending(), or exchange in share() what cannot be added"
            )
        self._schedule.work = sum(work) / processes.size
        self._fresh = {layer for layer, theirs in zip(self._layers, fresh_rows, strict=True) if any(theirs)}
        self._capture.agree(processes, rows[:, 3 + len(self._layers) :])
        if self._capture.batch is not None:
            self._preconditioner.share(processes)

    def _discard(self) -> None:
        """Let go of what was observed for this step."""
        self._current, self._fresh = set(), set()
        self._preconditioner.discard()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The part of a step before anything is moved: where an exception leaves it, factors and counts are put back as
        they were, and what was measured for the step is dropped."""
        # Factors change only where something was measured.
        tensors = self._preconditioner.tensors() if self._fresh or self._capture.processes else []
        copies = [t.clone() for t in tensors]
        parts: list[Any] = [self._damping, self._region, self._capture.fisher.noise, self._front, self._schedule]
        before = [dict(vars(part)) for part in parts]
        failures = self._preconditioner.failures
        numbers: dict[str, Any] = {"_made": self._made, "_shares": self._shares}
        numbers |= {"_observed": set(self._observed), "_scalars": dict(self._scalars)}
        try:
            yield
        except BaseException:
            if tensors:
                torch._foreach_copy_(tensors, copies)
            for part, attributes in zip(parts, before, strict=True):
                vars(part).update(attributes)
            vars(self).update(numbers)
            self._preconditioner.failures = failures
            self._capture.drop()
            for layer in self._layers:
                self._preconditioner.load_state(layer, self._preconditioner.state(layer))
            self._capture.finish_step(self._due())
            raise

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model from now on, say those of a layer that is unfrozen. As layers are found
        when the optimizer is built, these parameters follow the first-order fallback: see :meth:`coverage`.

        Raises:
            ValueError: they are not the model's, or frozen, or trained already.
        """
        if not hasattr(self, "_capture"):  # while it is built
            super().add_param_group(param_group)
            return
        (group,) = named_groups(self._model() or nn.Module(), [param_group], self._names)
        check_groups(self._front.chain, [group])
        super().add_param_group(group)
        added = self.param_groups[-1]
        added["base_lr"] = float(added["lr"])
        self._uncovered.update(dict.fromkeys(added["params"], "added after the optimizer was built"))
        self._frozen = [p for p in self._frozen if p not in set(added["params"])]

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_hyperparameters(momentum=group["momentum"], fallback_lr=group["fallback_lr"])

    def _warn_of_freezing(self) -> None:
        """Say once what is trainable by now and not trained, and what was frozen without its partner."""
        halves = [
            layer for layer in self._paired if layer.active and len({p.requires_grad for p in layer.parameters}) > 1
        ]
        if halves:
            self._paired = [layer for layer in self._paired if layer not in halves]
            warnings.warn(
                f"GRNG takes weight and bias of {', '.join(layer.name for layer in halves)} for one matrix, of which "
                "one was frozen since: the other moves as if both did, a direction of descent but not its own natural "
                "gradient. close() the optimizer and build it anew to have that",
                GRNGWarning,
                stacklevel=5,
            )
        found = [p for p in self._frozen if p.requires_grad]
        if found:
            self._frozen = [p for p in self._frozen if not p.requires_grad]
            warnings.warn(
                f"GRNG does not train {', '.join(self._names[p] for p in found)}, frozen when it was built: call "
                "add_param_group({'params': [...]}) to have them follow the first-order fallback, or close() it and "
                "build it anew for curvature",
                GRNGWarning,
                stacklevel=5,
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was measured along with these gradients is dropped with them."""
        super().zero_grad(set_to_none)
        self._front.zeroed()
        if self._capture.collecting:  # not in the second pass of a step
            self._capture.drop()

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forward and backward passes are not measured."""
        return self._capture.paused()

    def note_gradient(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Tell of a gradient that was formed without `loss.backward()`, for the check of what is captured."""
        self._capture.note_gradient(p, gradient)

    def around_passes(self, scale: Tensor | None, taken: bool = True) -> AbstractContextManager[None]:
        """A context for the passes of a step that somebody else takes: see :meth:`Capture.around_passes`."""
        return self._capture.around_passes(scale, taken)

    def _due(self) -> bool:
        """Whether the coming step measures."""
        return not self._observed or self._schedule.measures()

    # What the user looks at.

    def coverage(self) -> Coverage:
        """How every trained parameter is treated: method, engine, whether the capture was verified, and why."""
        trained = [p for group in self.param_groups for p in group["params"]]
        method = self._preconditioner
        return coverage_of(
            self._names, trained, self._layers, self._uncovered, self._capture, method.name, "adamw", method.remark
        )

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last step, on the device.

        grad_norm, lam (of the first group), rho, kl_scale (nu), misfit (of the likelihood); and counts: refreshes,
        skipped (steps with a gradient that is not finite), uncaptured (statistics steps that saw no output), failures
        (decompositions that kept the previous result, or took the diagonal where there was none), broken (matrices that
        stayed where they were for a step, because their direction was not finite). With regularizers that take passes
        also theirs: see `grng.regularizers.Regularized.diagnostics`.
        """
        own = {**self._scalars, "rho": self._damping.rho, "failures": self._preconditioner.failures}
        return {**self._front.diagnostics, **own}

    # Life cycle.

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a GRNG optimizer is attached to its model and cannot be copied or pickled: save state_dict(), build "
            "GRNG(model, ...) anew and load it"
        )

    @property
    def open(self) -> bool:
        """Whether it sees its model: until `close()`."""
        return hasattr(self, "_finalizer") and self._finalizer.alive

    def close(self) -> None:
        """Remove every hook from the model; the optimizer cannot be used afterwards."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_hyperparameters(**values: Any) -> None:
    """Numbers of a param group: finite and not negative, momentum below 1."""
    for name, value in values.items():
        if name == "momentum":
            if not (finite(value) and 0 <= value < 1):
                raise invalid(name, value, "in [0, 1)")
        else:
            check_nonnegative(name, value)
