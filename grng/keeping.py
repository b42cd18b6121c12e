"""What an optimizer keeps: under the parameters, in checkpoints, and where the model is moved to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grng.curvature import Capture, Curvature, Layer
from grng.curvature.layers import STATUS
from grng.curvature.order import ORDERS, UNKNOWN
from grng.damping import Damping
from grng.fallback import make_averages, make_momentum
from grng.matrices import Matrices
from grng.preconditioners import Preconditioner
from grng.region import TrustRegion
from grng.regularizers import FrontEnd
from grng.regularizers.frontend import STEPS
from grng.schedule import Schedule
from grng.torch_optim import StrictOptimizer

COUNTS = ("refreshes", "skipped", "uncaptured", "broken")
COUNTERS = ("grad_norm", "lam", "kl_scale", "misfit", *COUNTS)
ON_HOST = (
    *("fisher_rng", "likelihood", "layer_status", "grng_steps", "grng_method", "grng_period", "grng_decomposed"),
    "grng_visits",
    STEPS,
)
AS_GRADIENTS = ("momentum", "exp_avg", "exp_avg_sq")  # in shape and precision
OF_A_PARAMETER = (*AS_GRADIENTS, "step")


class KeepingOptimizer(StrictOptimizer):
    """The part of GRNG that saves and loads.

    Tensors stand under the parameters that they belong to, those of the whole model under the first one; what the
    preconditioner keeps as views of its stacks, so that they are always current.
    """

    variant: str
    _capture: Capture
    _curvature: Curvature
    _damping: Damping
    _device: torch.device
    _fresh: set[Layer]
    _front: FrontEnd
    _layers: list[Layer]
    _matrices: Matrices
    _names: dict[nn.Parameter, str]
    _observed: set[Layer]
    _places: list[tuple[torch.device, torch.dtype]]
    _preconditioner: Preconditioner
    _region: TrustRegion
    _scalars: dict[str, Tensor]
    _schedule: Schedule
    _shares: Tensor | None

    def _allocate(self) -> None:
        """Make what lies where the parameters do and is as precise as they are."""
        raise NotImplementedError

    def _due(self) -> bool:
        """Whether the coming step measures."""
        raise NotImplementedError

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
        self._follow()
        self._gather()
        return super().state_dict()

    def _gather(self) -> None:
        """Put everything that is kept under the parameters."""
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, to the bit.

        Raises:
            ValueError: it was written by another variant or for another model; nothing is changed then.
        """
        self._follow()
        super().load_state_dict(state_dict)

    def _restore(self, state_dict: dict[str, Any]) -> None:
        self._take(self._saved(state_dict))

    def _take(self, saved: Mapping[Any, dict[str, Tensor]]) -> None:
        for p, state in saved.items():
            for name, value in state.items():
                dtype = self._curvature.factor_dtype(p) if name in AS_GRADIENTS else None
                self.state[p][name] = value.to("cpu" if name in ON_HOST else p.device, dtype, copy=True)
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

    # Where the model is moved to.

    def _where(self) -> list[tuple[torch.device, torch.dtype]]:
        owners = (self._first, *(layer.owner for layer in self._layers))
        return [(p.device, p.dtype) for p in owners]

    def _follow(self) -> None:
        """Go along where the model was moved since, to another device or precision, with all that is kept: trainers
        move it after the optimizer was made."""
        if self._where() == self._places:
            return
        self._gather()
        saved, reason = {p: dict(state) for p, state in self.state.items()}, self._capture.fisher.reason
        self._allocate()
        self._region.place(self._matrices)
        self._damping.place(self._device)
        self._take(saved)
        self._capture.fisher.reason = reason
