"""Any optimizer under regularizers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grng.errors import invalid
from grng.regularizers.base import Regularizer, global_norm
from grng.regularizers.frontend import STEPS, FrontEnd
from grng.regularizers.scaler import under_scaler
from grng.torch_optim import bare_step, demands_closure, initialises

SKIPPED = "regularizer_skipped"
SHARED_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Regularized(Optimizer):
    r"""An optimizer that is handed a regularised gradient; itself an optimizer.

    .. math:: g \to \text{passes: } G(g_1, g_2, ...) \to \text{transforms, in their order} \to \text{base}

    Param groups, state and hooks are the base's own: schedulers may be built over either, every hook fires once, and
    one state_dict holds both. `regularizer` is one or a list, applied in that order: at most one that takes passes
    (GNP, SAM, ASAM, Explicit) comes first, then AGR and ClipNorm.

    With a regularizer that takes passes, either call `step(closure)`, or take the passes yourself, which is the way
    with a GradScaler and under gradient accumulation:

        for each in optimizer.passes(scaler):
            with each:
                scaler.scale(loss_fn(model(x), y)).backward()
        scaler.unscale_(optimizer)  # once, and only to clip
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    A loop over micro-batches around `passes()` displaces the weights for each of them; one inside `with each:`
    displaces once, by the gradient of all, and replays them.

    Args:
        base: any torch optimizer that needs no closure of its own.
        regularizer: one, or a list.
        model: needed by rules that look at it (norms, biases and embeddings excluded; ASAM's names; Gauss-Newton
            products), and for sync=False, there the DistributedDataParallel module.
        skip_nonfinite: leave out a step whose gradient is not finite. A look at a value on the host, except where the
            base decides on the device (GRNG, fused=True).

    Raises:
        ValueError: the list's order, a missing model, or a base with passes of its own.

    Example:
        >>> from grng.regularizers import AGR, GNP
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(4, 1), torch.randn(8, 4)
        >>> optimizer = Regularized(torch.optim.AdamW(model.parameters()), [GNP(r=0.05, alpha=0.8), AGR()])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(x).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> bool(optimizer.step(closure) < first), sorted(optimizer.diagnostics)
        (True, ['alpha', 'cosine', 'norm_1', 'norm_2', 'penalty_ratio', 'r', 'skipped'])
    """

    # scaler.step() then hands on its scale and what it found, and a closure can be told from a plain step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        base: Optimizer,
        regularizer: Regularizer | Iterable[Regularizer],
        *,
        model: nn.Module | None = None,
        skip_nonfinite: bool = True,
    ) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, but is: {type(base).__name__}")
        if demands_closure(base):
            raise invalid(
                "base",
                type(base).__name__,
                "an optimizer that takes one pass",
                "GRNG(..., regularizer=...) combines a penalty of its own with AGR and ClipNorm.",
            )
        self.base, self.model, self.skip_nonfinite = base, model, skip_nonfinite
        self._skipped: int | Tensor = 0  # a tensor where the base decides on the device
        self._link()
        paused = getattr(base, "paused", nullcontext)
        note = getattr(base, "note_gradient", lambda p, gradient: None)
        around = getattr(base, "around_passes", lambda scale, taken: nullcontext())
        self._front = FrontEnd(regularizer, lambda: base.param_groups, lambda: model, paused, note, around)
        if not self._front.chain:
            raise invalid("regularizer", regularizer, "a regularizer, or a list with at least one")

    def _link(self) -> None:
        """Be an Optimizer around the base's own groups, state and hooks."""
        self.defaults = self.base.defaults
        for name in SHARED_HOOKS:
            setattr(self, name, getattr(self.base, name))
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    # The base may replace these objects when it loads a checkpoint.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def regularizers(self) -> tuple[Regularizer, ...]:
        """In the order in which they act."""
        return self._front.chain

    @property
    def skipped(self) -> int:
        """How many steps were left out as not finite; a look at a value of the device."""
        return int(self._skipped)

    @property
    def requires_closure(self) -> bool:
        """Whether some step takes further passes, by step(closure) or by passes()."""
        return self._front.requires_passes

    @property
    def hessian_products(self) -> int:
        """How many products with a second derivative were formed so far."""
        return self._front.hessian_products

    def __getattr__(self, name: str) -> Any:
        """What else the base offers: coverage(), close(), ..."""
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __repr__(self) -> str:
        return f"Regularized({self.base!r}, {list(self.regularizers)!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's; {"regularizer": {...}} in it overrides settings, {"regularizer": False} excludes it."""
        self.base.add_param_group(param_group)
        try:
            self._front.check()
        except ValueError:
            self.base.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._front.zeroed()
        self.base.zero_grad(set_to_none)

    # The step.

    def passes(self, scale: Any = None) -> Iterator[AbstractContextManager[None]]:
        """The forward and backward passes of the coming step: as many as it takes, each in a `with`.

        Args:
            scale: a GradScaler, or the number that the loss is multiplied by, where there is one.

        Afterwards p.grad holds the combined gradient, in units of the scaled loss, added to what was there before.
        """
        return self._front.passes(scale)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base.

        Args:
            closure: calls `zero_grad`, forward and backward, and returns the loss; called once a pass.

        Returns:
            what it returned first, the loss at the weights themselves.

        Raises:
            RuntimeError: further passes are due, but there is no closure and passes() was not gone through; or a
                closure under a GradScaler, which would unscale the wrong gradients.
        """
        with under_scaler(self, closure) as scaled:
            return self._step(closure, scaled)

    def _step(self, closure: Callable[[], Any] | None, scaled: bool) -> Any:
        front, loss = self._front, None
        if closure is None and initialises(self.base):  # no step of ours, and no passes
            bare_step(self.base)
            return None
        if closure is not None:
            loss, gradients = front.evaluate(closure)
        else:
            front.refuse_missing_passes()
            gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
            if scaled:
                scale = front.unscale_(self, list(gradients.values()))
                getattr(self.base, "note_scale", lambda scale: None)(scale)
        with torch.no_grad():
            self._hand_on(front.transform(gradients), check=self.skip_nonfinite or scaled)
        front.finish()
        return loss

    def _hand_on(self, gradients: dict[nn.Parameter, Tensor], check: bool) -> None:
        """Let the base make its step with these gradients in p.grad, and put back what was there."""
        decides = getattr(self.base, "skips_nonfinite", False)
        on_device = not decides and getattr(self.base, "_step_supports_amp_scaling", False)
        if check and not decides and gradients:
            finite = torch.isfinite(global_norm(list(gradients.values())))
            if on_device:
                self.base.found_inf = (~finite).float()  # type: ignore[attr-defined]
                self._skipped = self._skipped + ~finite
            elif not finite:
                self._skipped += 1
                return
        params = [p for group in self.param_groups for p in group["params"]]
        held = [p.grad for p in params]
        try:
            for p in params:
                p.grad = gradients.get(p)
            bare_step(self.base)
        finally:
            for p, g in zip(params, held, strict=True):
                p.grad = g
            if hasattr(self.base, "found_inf"):
                del self.base.found_inf

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """The base's, and scalars of the last step that had further passes.

        alpha, r, norm_1 and norm_2 (of the first two gradients), cosine (between them), penalty_ratio
        (norm of what was added to the first, over norm_1); skipped: steps left out as not finite.
        """
        own = getattr(self.base, "diagnostics", {"skipped": torch.as_tensor(self._skipped)})
        return {**own, **self._front.diagnostics}

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict; what the regularizers need stands under every parameter, of which
        torch.distributed.checkpoint wants all to have state, or none."""

        def add(_: Optimizer, state_dict: dict[str, Any]) -> None:
            every = [p for group in state_dict["param_groups"] for p in group["params"]]
            saved, own = state_dict["state"], {**self._front.state(), SKIPPED: torch.tensor(self.skipped)}
            state_dict["state"] = {**saved, **{p: {**saved.get(p, {}), **own} for p in every}}

        hook = self.base.register_state_dict_post_hook(add, prepend=True)  # before the user's own
        try:
            return self.base.state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, to the bit.

        Raises:
            ValueError: it was written without regularizers.
        """
        found: list[dict[str, Any]] = []

        def take(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            own = next((state for state in saved["state"].values() if STEPS in state), None)
            if own is None:
                raise ValueError(
                    f"the checkpoint was written without regularizers: it holds no {STEPS!r} under a parameter. Load "
                    "it by optimizer.base.load_state_dict(...), and the regularizers start at step 0"
                )
            found.append({STEPS: own[STEPS], SKIPPED: own.get(SKIPPED, torch.tensor(0))})
            rest = {p: {n: v for n, v in state.items() if n not in found[0]} for p, state in saved["state"].items()}
            return {**saved, "state": {p: state for p, state in rest.items() if state}}

        def restore(_: Optimizer) -> None:
            self._front.load_state(found[0])
            self._skipped = int(found[0][SKIPPED])

        # After the user's own hooks on the way in, before them on the way out.
        hooks = [
            self.base.register_load_state_dict_pre_hook(take),
            self.base.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            self.base.load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        settings = {"regularizer": list(self.regularizers), "model": self.model, "skip_nonfinite": self.skip_nonfinite}
        return {"base": self.base, "settings": settings, "skipped": self.skipped, **self._front.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"], **state["settings"])  # type: ignore[misc]
        self._skipped = state["skipped"]
        self._front.load_state(state)
