"""What ties an optimizer to a model: hooks, layers, the preconditioner's stacks; coverage, state and life cycle."""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from grng.curvature import Capture, Coverage, Curvature, Layer, Statistics
from grng.curvature.engines import Hook
from grng.curvature.layers import STATUS
from grng.curvature.order import ORDERS, UNKNOWN
from grng.curvature.plan import check_model, coverage_of, find_layers, named_groups
from grng.damping import Damping
from grng.distributed import several, unwrapped
from grng.errors import GRNGWarning, check_nonnegative, finite, invalid
from grng.fallback import make_averages, make_momentum
from grng.matrices import Matrices
from grng.preconditioners import Preconditioner, make_groups
from grng.region import TrustRegion
from grng.regularizers import FrontEnd
from grng.regularizers.base import check_groups
from grng.regularizers.frontend import STEPS
from grng.schedule import Schedule
from grng.torch_optim import StrictOptimizer

DRIFT = 1e-4  # of |g|^2 and |D|^2 between processes: rounding stays below it
COUNTS = ("refreshes", "skipped", "uncaptured", "broken")
COUNTERS = ("grad_norm", "lam", "kl_scale", "misfit", *COUNTS)
ON_HOST = (
    *("fisher_rng", "likelihood", "layer_status", "grng_steps", "grng_method", "grng_period", "grng_decomposed"),
    "grng_visits",
    STEPS,
)
OF_A_PARAMETER = ("momentum", "exp_avg", "exp_avg_sq", "step")


class AttachedOptimizer(StrictOptimizer):
    """The part of GRNG that is not the step."""

    variant: str
    _damping: Damping
    _region: TrustRegion
    _front: FrontEnd

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
        devices = {p.device for p in trainable}
        if len(devices) > 1:
            raise invalid("model", sorted(map(str, devices)), "on one device", "Move it with model.to(device).")
        self._device = devices.pop()
        self._layers, self._uncovered = find_layers(
            model, trainable, preconditioner.takes_others and curvature.fisher != "empirical"
        )
        self._groups = make_groups(self._layers, curvature)
        self._matrices = Matrices(self._layers, self._groups)
        self._paired = [] if preconditioner.elementwise else [x for x in self._layers if len(x.parameters) > 1]
        self._shares: Tensor | None = None  # of every matrix in the largest curvature, until the next refresh
        preconditioner.attach(self)
        preconditioner.setup(self._groups, curvature)
        # A weak sink: the finalizer keeps the capture, which must not keep this optimizer.
        self._capture = Capture(
            model, self._layers, curvature, Hook(self, "_observe"), twice, dropped=Hook(self, "_discard")
        )
        self._finalizer = weakref.finalize(self, self._capture.close)
        self._model = weakref.ref(model)
        self._schedule = Schedule(self._layers, curvature, preconditioner)
        self._made = torch.zeros(2, dtype=torch.float64, device=self._device)  # |g|^2 and |D|^2 of the last step
        self._fresh: set[Layer] = set()  # observed since the last step
        self._current: set[Layer] = set()  # observed for this step
        self._observed: set[Layer] = set()  # ever observed
        self._missed: dict[Layer, int] = {}  # how often in a row, though they have gradients
        self._scalars = {name: torch.zeros((), device=self._device) for name in COUNTERS}
        self._link_state()

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
        method = self._preconditioner.name
        return coverage_of(self._names, trained, self._layers, self._uncovered, self._capture, method, "adamw")

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

    # State and life cycle.

    def _link_state(self) -> None:
        """Put the preconditioner's quantities under their parameters, as views."""
        _ = self.state[self._first]  # torch.distributed.checkpoint asks for a step where there is no state
        for layer in self._layers:
            self.state[layer.owner].update(self._preconditioner.state(layer))

    def _complete_state(self) -> None:
        """Make what the first step would: a checkpoint is read back by the names that a fresh optimizer's state has."""
        active = {p for layer in self._layers if layer.active for p in layer.parameters}
        for group in self.param_groups:
            for p in group["params"]:
                like = torch.empty_like(p, dtype=self._curvature.factor_dtype(p))
                if p not in active:
                    make_averages(self.state[p], like)
                elif group["momentum"]:
                    make_momentum(self.state[p], like)

    @property
    def _first(self) -> nn.Parameter:
        return self.param_groups[0]["params"][0]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; every tensor stands under a parameter, factors in their own precision.

        Take it between `step()` and the next `backward()`: what a backward pass has measured so far is not in it.
        """
        self._complete_state()
        for layer in self._layers:
            order = ORDERS.index(layer.order), self._capture.order.axis
            flags = (STATUS.index(layer.status), layer in self._observed, *order)
            for p in layer.parameters:  # torch.distributed.checkpoint takes no parameter without state
                self.state[p]["layer_status"] = torch.tensor(flags)
        shared = {**self._schedule.state(), **self._damping.state(), **self._region.state()}
        shared["grng_method"] = torch.tensor(list(self._method.encode()), dtype=torch.uint8)
        counts = [self._scalars[name] for name in COUNTS]
        shared["grng_counts"] = torch.stack([*counts, self._preconditioner.failures.to(self._device)])
        shared |= self._front.state()
        self.state[self._first].update(shared, **self._capture.fisher.state(self._device))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, to the bit.

        Raises:
            ValueError: it was written by another variant or for another model; nothing is changed then.
        """
        super().load_state_dict(state_dict)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        for p, state in self._saved(state_dict).items():
            for name, value in state.items():
                self.state[p][name] = value.to("cpu" if name in ON_HOST else p.device, copy=True)
        self._preconditioner.discard()
        self._fresh, self._observed = set(), set()
        self._shares = None
        for layer in self._layers:
            state = self.state[layer.owner]
            self._preconditioner.load_state(layer, state)
            status, observed, order, axis = (int(v) for v in state["layer_status"])
            # What was found here stays so, where the checkpoint is of before.
            if ORDERS[order] != UNKNOWN:
                layer.order, self._capture.order.axis = ORDERS[order], axis
            if STATUS[status] != "pending":
                layer.status = STATUS[status]
                layer.reason = "as in the checkpoint" if layer.status == "failed" else ""
            if observed:
                self._observed.add(layer)
        shared = self.state[self._first]
        self._schedule.load_state(shared)
        self._damping.load_state(shared)
        self._region.load_state(shared)
        self._front.load_state(shared)
        if "grng_counts" in shared:
            *counts, failures = shared["grng_counts"].clone()
            self._scalars.update(zip(COUNTS, counts, strict=True))
            self._preconditioner.failures = failures.cpu()
        self._capture.fisher.load_state(shared, self._device)
        self._link_state()
        self._capture.finish_step(self._due())

    @property
    def _method(self) -> str:
        return f"variant {self.variant!r} with preconditioner {self._preconditioner.name!r}"

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        own, theirs = ([len(g["params"]) for g in groups] for groups in (self.param_groups, state_dict["param_groups"]))
        if own != theirs:
            return  # torch says so itself
        saved = self._saved(state_dict)
        if "grng_method" not in saved[self._first]:
            raise ValueError("the checkpoint is not GRNG's: it holds no 'grng_method' under the first parameter")
        written = bytes(saved[self._first]["grng_method"].tolist()).decode()
        remedy = "Build GRNG with the variant, preconditioner and model that the checkpoint was written with"
        if written != self._method:
            raise ValueError(f"the checkpoint was written by {written}, but this is {self._method}. {remedy}")
        if self._front.chain and STEPS not in saved[self._first]:
            raise ValueError(f"the checkpoint was written without regularizers: it holds no {STEPS!r}. {remedy}")
        held = [(p, name) for p in saved for name in OF_A_PARAMETER if name in saved[p]]
        wanted = {(p, name): torch.Size() if name == "step" else p.shape for p, name in held}
        for part in (self._damping, self._region):
            wanted.update({(self._first, name): value.shape for name, value in part.state().items()})
        for layer in self._layers:
            state = {**self._preconditioner.state(layer), "layer_status": torch.zeros(4)}
            wanted.update({(layer.owner, name): value.shape for name, value in state.items()})
        for (p, name), shape in wanted.items():
            if name not in saved[p] or saved[p][name].shape != shape:
                raise ValueError(
                    f"the checkpoint does not fit {self._names[p]} of the model under {self._method}: {name!r} of "
                    f"shape {tuple(shape)} is expected. {remedy}"
                )
        failed = [layer for layer in self._layers if STATUS[int(saved[layer.owner]["layer_status"][0])] == "failed"]
        if self._capture.fisher.lacks(saved[self._first]) or any(
            "exp_avg" not in saved[p] for layer in failed for p in layer.parameters
        ):
            raise ValueError(
                "the checkpoint is not whole: torch.distributed.checkpoint.load() reads it by the names that this "
                "optimizer's state has. Let it make a step before its state is asked for"
            )

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
