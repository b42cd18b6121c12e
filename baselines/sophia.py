"""Sophia: momentum divided by a clipped diagonal curvature, estimated every few steps; Sophia-G and Sophia-H."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grng.curvature import Capture, Curvature, Layer, Statistics
from grng.curvature.engines import Hook
from grng.curvature.layers import plain_layer
from grng.curvature.plan import check_model, named_groups
from grng.distributed import unwrapped
from grng.errors import check_nonnegative, invalid
from grng.regularizers.explicit import ProductPass
from grng.torch_optim import StrictOptimizer, initialises, scalar

from .common import check_betas, evaluated, refuse_sparse

RNG = ("fisher_rng", "likelihood", "loss_scale")  # of the labels that are drawn, under the first parameter


class Sophia(StrictOptimizer):
    """What both forms share: settings, and the step

    m <- b1 m + (1-b1) g,   w <- (1 - lr wd) w - lr sign(m) min(1, |m| / (rho h + eps))
    """

    h = "hessian"
    common: ClassVar[tuple[str, ...]] = ("interval",)  # settings of which there is one for all param groups

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for name in ("rho", "eps"):
            check_nonnegative(name, group[name])
        check_betas(group["betas"], 2)
        interval = group["interval"]
        if type(interval) is not int or interval < 1:
            raise invalid("interval", interval, "a whole number of steps, at least 1")
        for name in self.common:
            if group[name] != self._common(name):
                raise invalid(name, group[name], f"the same in all param groups, {self._common(name)!r}")

    def _common(self, name: str) -> Any:
        return self.param_groups[0][name]

    @property
    def interval(self) -> int:
        """Steps between estimates, for all param groups."""
        return int(self._common("interval"))

    def _moments(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros(())
            for name in ("exp_avg", self.h):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _only_made(self) -> bool:
        """Whether step() is asked for nothing but the state, which is made then."""
        if not initialises(self):
            return False
        for p in self._trained():
            self._moments(p)
        return True

    def _trained(self) -> list[nn.Parameter]:
        """Parameters that have a gradient."""
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        refuse_sparse(type(self).__name__, found)
        return found

    def _move(self, measured: dict[Tensor, Tensor], late: bool) -> None:
        """A step of all parameters that have a gradient; `measured` enters h before it, or after it where `late`."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if not members:
                continue
            b1, b2 = group["betas"]
            states = [self._moments(p) for p in members]
            means, curvatures = ([state[name] for state in states] for name in ("exp_avg", self.h))
            torch._foreach_add_([state["step"] for state in states], 1.0)
            new = [(h, measured[p]) for p, h in zip(members, curvatures, strict=True) if p in measured]
            if new and not late:
                torch._foreach_lerp_([h for h, _ in new], [estimate for _, estimate in new], 1 - b2)
            torch._foreach_lerp_(means, [p.grad for p in members], 1 - b1)
            ratios = torch._foreach_abs(means)
            torch._foreach_div_(ratios, self._denominators(group, curvatures))
            torch._foreach_clamp_max_(ratios, 1.0)
            torch._foreach_mul_(ratios, torch._foreach_sign(means))
            lr = scalar(group["lr"])
            torch._foreach_mul_(members, 1 - lr * group["weight_decay"])
            torch._foreach_sub_(members, torch._foreach_mul(ratios, lr))
            if new and late:
                torch._foreach_lerp_([h for h, _ in new], [estimate for _, estimate in new], 1 - b2)

    def _denominators(self, group: dict[str, Any], curvatures: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def _count(self) -> int:
        """Steps made."""
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)


class SophiaG(Sophia):
    r"""Sophia with the Gauss-Newton-Bartlett estimate: labels are drawn from the model every `interval` steps.

    .. math::
        m &\leftarrow b_1 m + (1-b_1)\,g, \qquad
        \theta \leftarrow (1 - \mathrm{lr}\,\mathrm{wd})\,\theta
            - \mathrm{lr}\,\mathrm{sign}(m)\,\min\Big(1, \frac{|m|}{\rho\,h + \epsilon}\Big) \\
        h &\leftarrow b_2 h + (1-b_2)\,B\,\hat g^2 \quad\text{after every interval-th step}

    with ĝ the gradient of the mean loss on labels that the model draws for its B predictions. No bias correction: until
    the first estimate the step is lr sign(m).

    Published: Liu et al. 2023 (arXiv 2305.14342); rule and defaults are those of the authors' code, whose training
    script takes a forward and backward pass of its own for ĝ and multiplies by a batch size that the user has to give.
    Here a hook on the model's output draws the labels within the user's own backward pass, at the weights before the
    step, and counts the predictions. ĝ is not clipped. Under DistributedDataParallel it is that of all processes.

    Args:
        model: the model that the loop calls; its loss one whose labels can be drawn (cross-entropy, binary
            cross-entropy, squared error).
        params: parameters of it, or param groups; None: all that are trainable.
        lr: learning rate; the authors recommend one somewhat below AdamW's.
        betas: b_1, b_2.
        rho: the larger, the fewer entries are clipped. The authors watch the share that is not clipped, which
            should lie between 0.1 and 0.5.
        weight_decay: wd, decoupled.
        interval: steps between estimates.
        eps: added to the denominator.
        likelihood: as in `Curvature`: read off the gradient where it is "auto".
        seed: of the labels.

    Raises:
        ValueError: a setting is out of range.
        RuntimeError: `step` meets a sparse gradient, or no label could be drawn when an estimate was due.

    >>> model = nn.Linear(2, 3)
    >>> optimizer = SophiaG(model, lr=0.1)
    >>> before = model.weight.detach().clone()
    >>> nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0])).backward()
    >>> optimizer.step()
    >>> moved = model.weight.detach() - 0.99 * before  # the decay is lr times 0.1; the step itself lr
    >>> round(moved.abs().max().item(), 5)
    0.1
    """

    as_saved = ("step", *RNG)

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        interval: int = 10,
        eps: float = 1e-15,
        likelihood: Any = "auto",
        seed: int = 0,
    ) -> None:
        model = unwrapped(model)
        check_model(model)
        config = Curvature(likelihood=likelihood, capture="hooks", seed=seed)
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"interval": interval}
        names = {p: name for name, p in model.named_parameters()}
        super().__init__(named_groups(model, params, names), defaults)
        self._sampled: dict[Tensor, Tensor] = {}
        layers = [plain_layer(names[p], model, p) for group in self.param_groups for p in group["params"]]
        self._capture = Capture(model, layers, config, Hook(self, "_observe"), dropped=Hook(self, "_discard"))
        self._finalizer = weakref.finalize(self, self._capture.close)
        self._capture.finish_step(self._due())

    def _observe(self, layer: Layer, statistics: Statistics) -> None:
        p, found = layer.owner, statistics.gradient().view_as(layer.owner)
        self._sampled[p] = self._sampled[p] + found if p in self._sampled else found

    def _discard(self) -> None:
        self._sampled.clear()

    def _due(self) -> bool:
        """Whether an estimate is taken at the coming step: the interval-th, twice interval-th ..."""
        return self._count() % self.interval == self.interval - 1

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while it is built, when it hooks into what it trains."""
        if hasattr(self, "_capture"):
            raise RuntimeError(
                "param groups cannot be added to SophiaG, which hooks into its parameters when it is built: call "
                "close() and build it anew, with the group in params="
            )
        super().add_param_group(param_group)

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forward and backward passes are not measured."""
        return self._capture.paused()

    def around_passes(self, scale: Tensor | None, taken: bool = True) -> AbstractContextManager[None]:
        """A context for the passes of a step that somebody else takes: see `grng.curvature.Capture.around_passes`."""
        return self._capture.around_passes(scale, taken)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was measured along with these gradients is dropped with them."""
        super().zero_grad(set_to_none)
        if self._capture.collecting:
            self._capture.drop()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned."""
        if closure is None and self._only_made():
            return None
        loss = evaluated(closure)
        trained = self._trained()
        if self._due():
            self._share()
        batch, sampled = self._capture.batch, self._sampled
        if trained and self._due() and (batch is None or not sampled):
            if not self._capture.entered:
                why = "it saw no forward pass of the model that it was given: call that model, not a part of it"
            else:
                why = f"{self._capture.fisher.reason}: SophiaG takes a loss whose labels can be drawn"
            raise RuntimeError(f"SophiaG could not draw labels: {why}")
        # The sum over predictions squared over their number is B times the square of the mean.
        measured = {p: (g.square() / batch.predictions).to(p.dtype) for p, g in sampled.items()} if batch else {}
        self._move(measured, late=True)
        self._sampled = {}
        self._capture.finish_step(self._due())
        return loss

    def _share(self) -> None:
        """Of several processes: the sum of the gradients over all of them."""
        processes = self._capture.processes
        if processes is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            kinds = {p: torch.promote_types(p.dtype, torch.float32) for p in params}
            self._sampled = {p: self._sampled.get(p, torch.zeros_like(p, dtype=kinds[p])) for p in params}
            rows = processes.rows(self._capture.report(params[0].device))
            processes.sum_([rows, *self._sampled.values()])
            self._capture.agree(processes, rows)

    def _denominators(self, group: dict[str, Any], curvatures: list[Tensor]) -> list[Tensor]:
        found = torch._foreach_mul(curvatures, group["rho"])
        torch._foreach_add_(found, group["eps"])
        return list(found)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the source of the drawn labels stands under the first parameter."""
        first = self.param_groups[0]["params"][0]
        self._moments(first).update(self._capture.fisher.state(first.device))
        return super().state_dict()

    def _restore(self, state_dict: dict[str, Any]) -> None:
        super()._restore(state_dict)
        first = self.param_groups[0]["params"][0]
        self._capture.fisher.load_state(self.state[first], first.device)
        self._capture.finish_step(self._due())

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "SophiaG is attached to its model and cannot be copied or pickled: save state_dict(), build "
            "SophiaG(model, ...) anew and load it"
        )

    def close(self) -> None:
        """Remove every hook from the model."""
        self._finalizer()


class SophiaH(Sophia):
    r"""Sophia with Hutchinson's estimate of the Hessian's diagonal, from a product every `interval` steps.

    .. math::
        m &\leftarrow b_1 m + (1-b_1)\,g, \qquad
        h \leftarrow b_2 h + (1-b_2)\,z \circ (H z) \quad\text{before every interval-th step, the first one included} \\
        \theta &\leftarrow (1 - \mathrm{lr}\,\mathrm{wd})\,\theta
            - \mathrm{lr}\,\mathrm{clip}\big(m / \max(\gamma h, \epsilon), -1, 1\big)

    Published: Liu et al. 2023 (arXiv 2305.14342), algorithm 3 with algorithm 1; the authors' code has only the other
    form, so that the defaults are the paper's as others report them. It takes `step(closure)`, whose `backward()` is
    differentiated twice on these steps.

    Args:
        params: tensors or param groups.
        lr: learning rate.
        betas: b_1, b_2.
        rho: gamma.
        weight_decay: wd, decoupled.
        interval: steps between products.
        eps: the smallest denominator.
        distribution: of z: "gaussian", as published, or "rademacher", of less variance.
        seed: of z.

    >>> w = nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = SophiaH([w], lr=0.1, weight_decay=0.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w**4).sum()
    ...     loss.backward()
    ...     return loss
    >>> _ = optimizer.step(closure)
    >>> [round(x, 4) for x in w.tolist()]
    [0.9, -1.9]
    """

    requires_closure = True
    common = ("interval", "distribution", "seed")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.01,
        weight_decay: float = 0.1,
        *,
        interval: int = 10,
        eps: float = 1e-12,
        distribution: str = "gaussian",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"interval": interval, "distribution": distribution, "seed": seed}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["distribution"] not in ("gaussian", "rademacher"):
            raise invalid("distribution", group["distribution"], '"gaussian" or "rademacher"')
        if type(group["seed"]) is not int:
            raise invalid("seed", group["seed"], "a whole number")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns what the closure returned.

        Raises:
            RuntimeError: there is no closure.
        """
        if closure is None and self._only_made():
            return None
        if closure is None:
            raise RuntimeError("SophiaH differentiates backward() twice: give step() a closure that calls it")
        measured: dict[Tensor, Tensor] = {}
        with torch.enable_grad():
            if self._count() % self.interval:
                loss = closure()
            else:
                params = [p for group in self.param_groups for p in group["params"]]
                taken = HutchinsonPass(params, [True] * len(params), None, lambda p, g: None, draw=self._drawing())
                with taken.context():
                    loss = closure()
                measured = {p: h for p, h in taken.further(nullcontext)[0].items()}
        self._trained()
        self._move(measured, late=False)
        return loss

    @property
    def hessian_products(self) -> int:
        """How many so far."""
        return -(-self._count() // self.interval)

    def _drawing(self) -> Callable[[Tensor], Tensor]:
        """What draws z, from the seed and the number of steps alone, so that a resumed run needs no more."""
        generator = torch.Generator().manual_seed((self._common("seed") << 32) + self._count())
        signs = self._common("distribution") == "rademacher"

        def draw(p: Tensor) -> Tensor:
            z = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            return (z.sign() if signs else z).to(p.device)

        return draw

    def _denominators(self, group: dict[str, Any], curvatures: list[Tensor]) -> list[Tensor]:
        found = torch._foreach_mul(curvatures, group["rho"])
        torch._foreach_clamp_min_(found, group["eps"])
        return list(found)


@dataclass
class HutchinsonPass(ProductPass):
    """Its product is z o (H z)."""

    draw: Callable[[Tensor], Tensor] = field(default=torch.randn_like)

    def _hessian(self, have: list[tuple[nn.Parameter, Tensor, Tensor]]) -> Sequence[Tensor | None]:
        drawn = [(p, g, self.draw(p)) for p, g, _ in have]
        found, z = super()._hessian(drawn), {p: v for p, _, v in drawn}
        return [None if Hz is None else z[p] * Hz for p, Hz in zip(self.parameters, found, strict=True)]
