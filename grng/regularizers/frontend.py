"""The front end: runs the passes of a step and hands on one gradient a parameter.

for each in passes():            g_1, then gradients at displaced weights; then their combination stands in p.grad
    with each: loss.backward()
step():                          transforms, in their order -> the optimizer
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grng.distributed import average_, unsynchronised
from grng.errors import check_real, invalid
from grng.regularizers.base import (
    Facts,
    Gradients,
    Note,
    Parameters,
    Passes,
    Regularizer,
    Transform,
    at_least_float32,
    check_groups,
    describe,
    global_norm,
)
from grng.regularizers.displacement import RandomState, displaced, kept_buffers, same_random_numbers
from grng.regularizers.passes import ByParameter, Pass, PutBack, clear, refuse_sparse, true_gradients
from grng.regularizers.scaler import Closure, as_scale

Paused = Callable[[], AbstractContextManager[None]]
Around = Callable[[Tensor | None, bool], AbstractContextManager[None]]
STEPS = "regularizer_steps"


class FrontEnd:
    """The regularizers of an optimizer, in order, and the step they are at.

    Args:
        regularizers: at most one of them takes passes, and it stands first.
        groups: returns the optimizer's param groups.
        model: returns the model, for names, kinds and buffers; the DistributedDataParallel module for sync=False.
        paused: a context in which the optimizer captures no curvature.
        note: called with a parameter and its plain gradient where autograd's hooks do not see it.
        around: a context for the passes of a step, given what their loss is multiplied by, as far as that is known, and
            whether gradients of before are taken away in it and given back.
    """

    def __init__(
        self,
        regularizers: Regularizer | Iterable[Regularizer] | None,
        groups: Callable[[], list[dict[str, Any]]],
        model: Callable[[], nn.Module | None],
        paused: Paused = nullcontext,
        note: Note = lambda p, g: None,
        around: Around = lambda scale, taken: nullcontext(),
    ) -> None:
        self.chain = as_chain(regularizers)
        self.method = next((part for part in self.chain if isinstance(part, Passes)), None)
        self.transforms = [part for part in self.chain if isinstance(part, Transform)]
        self._groups, self._model, self._paused, self._note, self._around = groups, model, paused, note, around
        self.t = 0
        self.ready = False  # p.grad holds what the passes of this step amount to
        self.scale: Tensor | None = None  # what they were told that the loss was multiplied by
        self.hessian_products = 0
        self.report: dict[str, Any] = {}
        self._zeroed = False
        self._plain: ByParameter = {}
        self.check()

    def check(self) -> None:
        """Refuse what cannot work: a missing model or missing names, and wrong settings of a param group."""
        model = self._model()
        # Here and not in every step: a walk through the modules is longer than many of them.
        self._facts = Facts.of(model)
        self._disturbed = [m for m in getattr(model, "modules", list)() if hasattr(m, "true_gradient")]
        check_groups(self.chain, self._groups())
        check_real(p for group in self._groups() for p in group["params"])
        for part in self.chain:
            if part.needs_model and model is None:
                remedy = "Regularized(base, regularizer, model=model) has it."
                raise invalid("model", None, f"the model, for {part}", remedy)
            if part.needs_names and not all(self._parameters().names):
                remedy = "Give model=model, or build the optimizer over model.named_parameters()."
                raise invalid("the parameters' names", "unknown", f"known for {part}", remedy)
        if self.method is not None and any(group.get("maximize") for group in self._groups()):
            remedy = f"{type(self.method).__name__} goes by what rises: negate the loss instead."
            raise invalid("maximize", True, "False under a regularizer that takes passes", remedy)
        if self.method is not None and not self.method.sync and model is None:
            raise invalid("model", None, "the DistributedDataParallel module, for sync=False")

    def _parameters(self) -> Parameters:
        return describe(self._facts, self._groups())

    @property
    def requires_passes(self) -> bool:
        """Whether some step takes more than loss.backward()."""
        return self.method is not None

    # Passes.

    def passes(self, scale: Any = None, replace: bool = False) -> Iterator[AbstractContextManager[None]]:
        """The passes of one step; afterwards p.grad holds the combined gradient, added to what was there before.

        Args:
            scale: what the loss is multiplied by: a number, a scalar or a GradScaler.
            replace: the passes themselves zero what was there before (a closure).
        """
        method, every, scale = self.method, self._parameters(), as_scale(scale)
        before = {p: p.grad for p in every.tensors if p.grad is not None}
        self._zeroed = self.ready = False
        with PutBack(every.tensors, before), self._around(scale, not replace):
            if not replace:
                clear(every.tensors)
            if method is None or not method.acts(self.t):
                one = Pass(every.tensors, [])
                yield one
                self._plain, self.report = one.gradients, {}
            else:
                yield from self._regularized(every, method, scale, before if replace else None)
            if not replace and not self._zeroed:
                with torch.no_grad():
                    for p, g in before.items():
                        p.grad = g if p.grad is None else p.grad + g
        self.ready, self.scale = True, scale

    def _regularized(
        self, every: Parameters, method: Passes, scale: Tensor | None, before: ByParameter | None
    ) -> Iterator[AbstractContextManager[None]]:
        model, t, params = self._model(), self.t, every.tensors
        signs = method.signs(t)
        random = RandomState(params) if method.same_rng and signs else None

        def local() -> list[AbstractContextManager[Any]]:
            return [] if method.sync else [unsynchronised(model)]

        around = method.first_pass(every, model, self._note, t)
        one = Pass(params, [*local(), around.context(), true_gradients(self._disturbed if signs else [])])
        yield one
        if before and not self._zeroed and any(p.grad is g for p, g in before.items()):
            raise RuntimeError(
                "the closure adds to gradients that were there before, which the further passes of a regularizer "
                "cannot repeat: call optimizer.zero_grad() in it (or model.zero_grad() with set_to_none=True)"
            )
        first = one.gradients
        moving = every.take([taken and p in first for taken, p in zip(method.takes(every), params, strict=True)])
        start = Gradients(at_least_float32(first[p] for p in moving.tensors), scale)
        further = around.further(self._paused)
        self.hessian_products += len(further)
        if signs and moving.tensors:
            with torch.no_grad():
                e = method.displacement(moving, start, t)
            for sign in signs:
                clear(params)
                another = Pass(
                    params,
                    [
                        *local(),
                        self._paused(),
                        kept_buffers(model),
                        same_random_numbers(random, params),
                        displaced(moving.tensors, e, sign, method.precision),
                    ],
                )
                yield another
                further.append(another.gradients)
        with torch.no_grad():
            self._combine(every, method, first, further, start)
            if not method.sync:
                for p in params:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                average_([p.grad for p in params if p.grad is not None], model)

    def _combine(
        self, every: Parameters, method: Passes, first: ByParameter, further: list[ByParameter], moving: Gradients
    ) -> None:
        """Leave the combined gradient in p.grad."""
        have = every.take([any(p in found for found in (first, *further)) for p in every.tensors])

        def values(found: ByParameter) -> list[Tensor]:
            return at_least_float32(found[p] if p in found else torch.zeros_like(p) for p in have.tensors)

        start, others = values(first), [values(found) for found in further]
        combined, told = method.combine(have, Gradients(start, moving.scale, moving.norm), others, self.t)
        clear(every.tensors)
        for p, g in zip(have.tensors, combined, strict=True):
            p.grad = g.to(p.dtype)
        norm = moving.norm if len(moving.values) == len(start) else global_norm(start)
        self.report = measured(norm, start, combined, others if method.signs(self.t) else [], told.pop("share", None))
        self.report |= told
        if moving.scale is not None:
            for name in self.report.keys() & {"norm_1", "norm_2"}:
                self.report[name] = self.report[name] / moving.scale
        held = [p for p in have.tensors if p.numel()]
        if held and first:
            # A step whose first gradient is not finite is no step, also where the others are finite.
            smallest = min(held, key=lambda p: p.numel())
            assert smallest.grad is not None
            smallest.grad = torch.where(torch.isfinite(norm), smallest.grad, torch.nan)
        self._plain = first

    def evaluate(self, closure: Closure) -> tuple[Any, ByParameter]:
        """Run the closure as often as the step asks for.

        Returns:
            what it returned first, and the combined gradients; p.grad holds the plain ones.

        Raises:
            RuntimeError: it returned None, or does not zero the gradients.
        """
        results = []
        for each in self.passes(replace=True):
            with each, torch.enable_grad():
                results.append(closure())
            if results[0] is None:
                raise RuntimeError("the closure returned None: it must return the loss it called backward() on")
        params = [p for group in self._groups() for p in group["params"]]
        combined = {p: p.grad for p in params if p.grad is not None}
        for p in params:
            p.grad = self._plain.get(p)
        self._plain = {}
        return results[0], combined

    def evaluate_again(self, closure: Closure, random: RandomState) -> Any:
        """What the closure returns by now, with the random numbers from `random` on; gradients, buffers and random
        numbers are afterwards what they were."""
        params = [p for group in self._groups() for p in group["params"]]
        gradients = {p: p.grad for p in params}
        clear(params)
        try:
            with (
                self._paused(),
                kept_buffers(self._model()),
                same_random_numbers(random, params),
                torch.enable_grad(),
            ):
                return closure()
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient

    # The step.

    def transform(self, gradients: ByParameter) -> ByParameter:
        """The pipeline's part that needs the gradient alone."""
        transforms = [part for part in self.transforms if part.acts(self.t)]
        if not transforms or not gradients:
            return gradients
        refuse_sparse(gradients)
        every = self._parameters()
        gradients = dict(gradients)
        for part in transforms:
            taking = [taken and p in gradients for taken, p in zip(part.takes(every), every.tensors, strict=True)]
            chosen = every.take(taking)
            found = part.transform(chosen, [gradients[p] for p in chosen.tensors], self.t)
            gradients.update(zip(chosen.tensors, found, strict=True))
        return gradients

    def zeroed(self) -> None:
        """The gradients were dropped."""
        self._zeroed, self.ready = True, False

    def finish(self) -> None:
        """A step was made, or skipped."""
        self.t += 1
        self.ready, self.scale = False, None
        self._plain = {}

    def refuse_missing_passes(self) -> None:
        """Raise where p.grad is not what the passes amount to."""
        if self.requires_passes and not self.ready:
            raise RuntimeError(
                f"{type(self.method).__name__} takes a second pass: call step(closure) with a closure that calls "
                "zero_grad(), the forward pass and backward() and returns the loss; or take the passes before step(), "
                "`for each in optimizer.passes():` and in it `with each:` the forward pass and backward()"
            )

    def unscale_(self, optimizer: Any, gradients: list[Tensor]) -> Tensor | None:
        """Divide by the scale that GradScaler.step() left on the optimizer, unless its unscale_() was called before.

        Returns:
            what the loss was multiplied by, where it is known.
        """
        method = self.method
        if method is not None and method.needs_scale and self.scale is None:
            raise RuntimeError(
                f"{type(method).__name__} with these settings depends on what the loss is multiplied by: call "
                "optimizer.passes(scaler), with the GradScaler"
            )
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, scale.double().reciprocal().float())
        return self.scale if scale is None else scale

    # State.

    def state(self) -> dict[str, Tensor]:
        return {STEPS: torch.tensor(self.t)} if self.chain else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.chain:
            self.t = int(state[STEPS])
        self.ready = False

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Scalars of the last step that had further passes."""
        return {name: torch.as_tensor(value) for name, value in self.report.items()}


def measured(
    norm: Tensor, first: list[Tensor], combined: list[Tensor], further: list[list[Tensor]], share: float | None
) -> dict[str, Any]:
    """norm_1, norm_2, cosine of the first two gradients, and penalty_ratio |G - g1| / |g1|, on the device.

    Args:
        share: G - g1 = share (g2 - g1), where it is so simple.
    """
    tiny = torch.finfo(norm.dtype).tiny

    def distance(to: list[Tensor]) -> Tensor:
        return global_norm(list(torch._foreach_sub(to, first))) if first else norm

    found = {"norm_1": norm}
    if further:
        other, between = global_norm(further[0]), distance(further[0])
        found["norm_2"] = other
        # From the distance, which is exact where the two are close.
        found["cosine"] = (norm**2 + other**2 - between**2) / (2 * norm * other).clamp(min=tiny)
    added = distance(combined) if share is None or not further else share * between
    found["penalty_ratio"] = added / norm.clamp(min=tiny)
    return found


def as_chain(regularizers: Regularizer | Iterable[Regularizer] | None) -> tuple[Regularizer, ...]:
    """The regularizers as a tuple, checked for their order.

    Raises:
        ValueError: two take passes, or something stands before the one that does.
    """
    if regularizers is None:
        return ()
    found = tuple(regularizers) if isinstance(regularizers, list | tuple | Iterator) else (regularizers,)
    for part in found:
        if not isinstance(part, Regularizer):
            raise TypeError(f"a regularizer must be one of grng.regularizers, but is: {part!r}")
    with_passes = [i for i, part in enumerate(found) if part.takes_passes]
    if len(with_passes) > 1:
        raise invalid("regularizer", found, "a list of which one takes further passes", "Choose one of them.")
    if with_passes and with_passes[0] != 0:
        raise invalid(
            "regularizer",
            found,
            f"a list that begins with {type(found[with_passes[0]]).__name__}",
            "What stands before it would change the first gradient but not the others, which ruins their difference.",
        )
    return found
