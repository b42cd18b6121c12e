"""What ties an optimizer to a model: hooks, layers, the preconditioner's stacks; coverage, state and life cycle."""

import math
import weakref
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grng.curvature import Capture, Coverage, Curvature, Layer, Statistics
from grng.curvature.engines import Hook
from grng.curvature.plan import check_model, coverage_of, find_layers, named_groups
from grng.damping import Damping
from grng.errors import invalid
from grng.preconditioners import Preconditioner, make_groups

STATUS = ("pending", "verified", "failed")
COUNTERS = ("grad_norm", "lam", "kl_scale", "refreshes", "skipped", "uncaptured", "misfit")
ON_HOST = ("fisher_rng", "likelihood", "layer_status", "grng_steps")


class AttachedOptimizer(Optimizer):
    """The part of GRNG that is not the step."""

    variant: str
    _damping: Damping

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
        check_model(model)
        self._curvature, self._preconditioner = curvature, preconditioner
        self._names = {p: name for name, p in model.named_parameters()}
        super().__init__(named_groups(model, params, self._names), defaults)
        for group in self.param_groups:
            check_hyperparameters(**{name: group[name] for name in defaults})
            group["base_lr"] = float(group["lr"])
        trainable = {p for group in self.param_groups for p in group["params"]}
        devices = {p.device for p in trainable}
        if len(devices) > 1:
            raise invalid("model", sorted(map(str, devices)), "on one device", "Move it with model.to(device).")
        self._device = devices.pop()
        self._layers, self._uncovered = find_layers(model, trainable)
        self._groups = make_groups(self._layers, curvature)
        preconditioner.setup(self._groups, curvature)
        # A weak sink: the finalizer keeps the capture, which must not keep this optimizer.
        self._capture = Capture(model, self._layers, curvature, Hook(self, "_observe"), twice)
        self._finalizer = weakref.finalize(self, self._capture.close)
        self._model = weakref.ref(model)
        self._steps = 0
        self._fresh: set[Layer] = set()  # observed since the last step
        self._current: set[Layer] = set()  # observed for this step
        self._observed: set[Layer] = set()  # ever observed
        self._scalars = {name: torch.zeros((), device=self._device) for name in COUNTERS}
        self._link_state()

    def _observe(self, layer: Layer, statistics: Statistics) -> None:
        self._preconditioner.observe(layer, statistics)
        self._fresh.add(layer)

    def _due(self) -> bool:
        """Whether the coming step measures."""
        t = self._steps
        often = self._preconditioner.every_step or t < self._curvature.burn_in or not self._observed
        return often or t % self._curvature.stats_every == 0

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
        (decompositions that kept the previous result).
        """
        failures = getattr(self._preconditioner, "failures", torch.zeros(()))
        return {**self._scalars, "rho": self._damping.strength(), "failures": failures}

    # State and life cycle.

    def _link_state(self) -> None:
        """Put the preconditioner's quantities under their parameters, as views."""
        for layer in self._layers:
            self.state[layer.owner].update(self._preconditioner.state(layer))

    @property
    def _first(self) -> nn.Parameter:
        return self.param_groups[0]["params"][0]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; every tensor stands under a parameter, factors in their own precision.

        Take it between `step()` and the next `backward()`: what a backward pass has measured so far is not in it.
        """
        for layer in self._layers:
            flags = (STATUS.index(layer.status), layer in self._observed)
            self.state[layer.owner]["layer_status"] = torch.tensor(flags)
        shared = {"grng_steps": torch.tensor(self._steps), **self._damping.state()}
        shared["grng_skipped"] = self._scalars["skipped"]
        self.state[self._first].update(shared, **self._capture.state(self._device))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, to the bit.

        Raises:
            ValueError: it was written by another variant or for another model; nothing is changed then.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        for layer in self._layers:
            state = self.state[layer.owner]
            self._preconditioner.load_state(layer, state)
            status, observed = (int(v) for v in state["layer_status"])
            layer.status = STATUS[status]
            if observed:
                self._observed.add(layer)
        shared = self.state[self._first]
        self._steps = int(shared["grng_steps"])
        self._damping.load_state(shared)
        self._scalars["skipped"] = shared["grng_skipped"].clone()
        self._capture.load_state(shared, self._device)
        self._link_state()
        self._capture.finish_step(self._due())

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = {p: state_dict["state"].get(i, {}) for i, p in zip(ids, params, strict=False)}
        for layer in self._layers:
            mine, theirs = self._preconditioner.state(layer), saved.get(layer.owner, {})
            wrong = [n for n, t in mine.items() if n not in theirs or theirs[n].shape != t.shape]
            if wrong or "layer_status" not in theirs:
                raise ValueError(
                    f"the checkpoint does not fit {layer.name or 'the model'} under variant {self.variant!r} "
                    f"({self._preconditioner.name}): it lacks {', '.join(wrong) or 'layer_status'} in the right shape. "
                    "Build GRNG with the variant, preconditioner and model that the checkpoint was written with"
                )
        if "grng_steps" not in saved.get(params[0], {}):
            raise ValueError("the checkpoint is not GRNG's: it holds no 'grng_steps' under the first parameter")

    @staticmethod
    def _process_value_according_to_param_policy(
        param: Tensor, value: Tensor, param_id: int, param_groups: list[dict[Any, Any]], key: Any = None
    ) -> Tensor:
        # torch would cast every floating tensor to the parameter's dtype, which ruins the factors of a bf16 layer.
        return value if key in ON_HOST else value.to(param.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a GRNG optimizer is attached to its model and cannot be copied or pickled: save state_dict(), build "
            "GRNG(model, ...) anew and load it"
        )

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
            if isinstance(value, str) or not 0 <= value < 1:
                raise invalid(name, value, "in [0, 1)")
        elif isinstance(value, str) or not (math.isfinite(value) and value >= 0):
            raise invalid(name, value, "a finite number >= 0")
