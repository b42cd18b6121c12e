r"""Explicit gradient regularization: the gradient of the loss plus a penalty on its own norm.

L + rho/2 \|grad L\|^2  ->  g + rho H g           L + rho \|grad L\|  ->  g + rho H g / \|g\|
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from grng.curvature.passes import find_output, origin
from grng.distributed import Processes, together
from grng.errors import invalid, unknown
from grng.regularizers.base import FirstPass, Gradients, Note, Parameters, Passes
from grng.regularizers.gnp import TINY, scaled
from grng.regularizers.schedule import check_number

SIGNS = {"forward": (1.0,), "backward": (-1.0,), "central": (0.5, -0.5), "double": (), "ggn": ()}
PENALTIES = ("squared", "norm")


@dataclass(frozen=True)
class Explicit(Passes):
    r"""G = g + rho H g, the gradient of L + rho/2 \|grad L\|^2; or g + rho H g/\|g\|, that of L + rho \|grad L\|.

    ========== ======================================================= ===================== ==================
    mode       H g                                                     error                 gradients a step
    ========== ======================================================= ===================== ==================
    "double"   differentiated twice                                    none                  1 + a product
    "forward"  \|g\| (grad L(w + eps u) - g) / eps, u = g/\|g\|            linear in eps         2
    "backward" \|g\| (g - grad L(w - eps u)) / eps                       linear in eps         2
    "central"  \|g\| (grad L(w + eps u/2) - grad L(w - eps u/2)) / eps   quadratic in eps      3
    "ggn"      G g, G the Gauss-Newton matrix of the loss, for H g     H - G                 1 + a product
    ========== ======================================================= ===================== ==================

    Published: Barrett & Dherin 2021 (arXiv 2009.11162); forward and backward Karakida et al. 2023 (arXiv 2210.02720).

    Args:
        rho: strength; a param group's {"regularizer": {"rho": ...}} overrides it. A function without arguments that
            returns a scalar is asked after the first pass.
        mode: one of the table; "double" and "ggn" take one backward() a closure, and every operation of the model must
            be twice differentiable (fused attention is not). "ggn" needs the model, whose output it reads.
        penalty: "squared" or "norm".
        eps: the distance of the finite differences.
        normalize: False: displace by eps g, as Karakida et al. do, in place of eps g/\|g\|.
        warmup: "lambda" ramps rho, "zero" starts late; there is no "r".
        and those of :class:`Passes`.

    >>> from grng.regularizers import Regularized
    >>> w = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Regularized(torch.optim.SGD([w], lr=1.0), Explicit(0.1, mode="double"))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> round(optimizer.step(closure).item(), 4), round(w.item(), 4)  # g = 2, H = 2: G = 2 + 0.1 * 4
    (1.0, -1.4)
    """

    rho: float | Callable[[], Tensor] = 0.01
    mode: str = "forward"
    penalty: str = "squared"
    eps: float = 1e-2
    normalize: bool = True
    per_group: ClassVar[tuple[str, ...]] = ("rho",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, choices in (("mode", self.mode, tuple(SIGNS)), ("penalty", self.penalty, PENALTIES)):
            if value not in choices:
                raise unknown(name, value, choices)
        if not callable(self.rho):
            check_number("rho", self.rho)
        check_number("eps", self.eps, strict=True)
        if self.warmup == "r":
            raise invalid("warmup", self.warmup, '"none", "lambda" or "zero" for Explicit, which has no distance r')

    @property
    def needs_scale(self) -> bool:
        return self.penalty == "squared" or not self.normalize

    @property
    def needs_model(self) -> bool:
        return self.mode == "ggn" or super().needs_model

    @property
    def from_graph(self) -> bool:
        """Whether the products come from the graph of the first pass."""
        return self.mode in ("double", "ggn")

    def signs(self, t: int) -> tuple[float, ...]:
        return SIGNS[self.mode] if self.strength_ramp(t) else ()

    def first_pass(self, parameters: Parameters, model: nn.Module | None, note: Note, t: int) -> FirstPass:
        if not self.from_graph or not self.strength_ramp(t):
            return FirstPass()
        read = model if self.mode == "ggn" else None
        return ProductPass(parameters.tensors, self.takes(parameters), read, note, self.sync)

    def displacement(self, parameters: Parameters, first: Gradients, t: int) -> list[Tensor]:
        if self.normalize:
            return scaled(first.values, [self.eps] * len(first.values), first.norm)
        scale = first.norm.new_ones(()) if first.scale is None else first.scale
        finite = torch.isfinite(first.norm)
        return [torch.where(finite, g * (self.eps / scale), 0.0) for g in first.values]

    def combine(
        self, parameters: Parameters, first: Gradients, further: list[list[Tensor]], t: int
    ) -> tuple[list[Tensor], dict[str, Any]]:
        rho = [self._rho(own, first.norm) * self.strength_ramp(t) for own in parameters.overrides]
        report = {"rho": rho[0] if rho else 0.0, "r": self.eps if self.signs(t) else 0.0}
        if not further:
            return first.values, report
        norm = first.unscaled_norm
        if self.from_graph:
            # H_S g_S of a loss multiplied by S is S^2 H g.
            products = further[0]
            factor = torch.ones_like(norm) if first.scale is None else 1 / first.scale
        else:
            high, low = {
                "forward": (further[0], first.values),
                "backward": (first.values, further[0]),
                "central": (further[0], further[-1]),
            }[self.mode]
            products = list(torch._foreach_sub(high, low))
            factor = (norm if self.normalize else torch.ones_like(norm)) / self.eps
        if self.penalty == "norm":
            factor = factor / (norm + TINY)
        strengths = [(r * factor).to(h.dtype) for r, h in zip(rho, products, strict=True)]
        return [g + s * h for g, s, h in zip(first.values, strengths, products, strict=True)], report

    def _rho(self, own: dict[str, Any] | None, norm: Tensor) -> Tensor:
        rho = self.setting("rho", own)
        return (rho() if callable(rho) else torch.as_tensor(rho, dtype=torch.float64)).to(norm.device)


@dataclass
class ProductPass(FirstPass):
    """A first pass whose backward() leaves gradients that can be differentiated once more, and the products H g or G g.

    Without the reference cycle of `backward(create_graph=True)`. Of several processes, whose gradients
    DistributedDataParallel averages in a backward() alone, H is the mean, and g too.
    """

    parameters: list[nn.Parameter]
    taking: list[bool]
    model: nn.Module | None  # given for Gauss-Newton products, whose output is read
    note: Note
    sync: bool = True
    processes: Processes | None = None
    gradients: list[Tensor | None] | None = None
    directions: list[Tensor | None] = field(default_factory=list)
    loss: Tensor | None = None
    output: Tensor | None = None
    calls: int = 0
    hook: Any = field(default=None, repr=False)

    def context(self) -> AbstractContextManager[Any]:
        return _Context(self)

    def backward(self, loss: Tensor, gradient: Any = None, inputs: Any = None, **_: Any) -> None:
        """In place of `loss.backward()`."""
        if self.gradients is not None:
            raise RuntimeError(
                "modes 'double' and 'ggn' take one backward() a closure or step: the penalty of a gradient that is "
                "accumulated over several cannot be formed from its parts. Use finite differences (mode 'forward', for "
                "variant 'reng' mode 'finite'), or one larger batch"
            )
        if gradient is not None or inputs is not None:
            raise RuntimeError("modes 'double' and 'ggn' take backward() without gradient= and inputs=")
        found = derivatives(loss, self.parameters, create_graph=True)
        self.gradients, self.loss = found, loss
        for p, g in zip(self.parameters, found, strict=True):
            if g is not None:
                self.note(p, g)
        self.directions = self._averaged([None if g is None else g.detach() for g in found])
        for p, v in zip(self.parameters, self.directions, strict=True):
            if v is not None:
                p.grad = v.clone() if p.grad is None else p.grad.add_(v)

    def _averaged(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """The mean over the processes; zero stands for what only others have."""
        if self.processes is None:
            return tensors
        pairs = zip(self.parameters, tensors, strict=True)
        found = [(torch.zeros_like(p) if t is None else t.clone()) if p.requires_grad else None for p, t in pairs]
        self.processes.average_([t for t in found if t is not None])
        return found

    def further(self, paused: Callable[[], AbstractContextManager[None]]) -> list[dict[nn.Parameter, Tensor]]:
        if self.gradients is None or self.loss is None:
            raise RuntimeError(
                "modes 'double' and 'ggn' found no gradient: call loss.backward() first, in that spelling: it is what "
                "they differentiate twice"
            )
        triples = zip(self.parameters, self.gradients, self.directions, self.taking, strict=True)
        have = [(p, g, v) for p, g, v, taken in triples if g is not None and v is not None and taken]
        with torch.enable_grad(), paused():
            try:
                found = self._hessian(have) if self.model is None else self._gauss_newton(have)
            except RuntimeError as error:
                if "derivative for" not in str(error):
                    raise
                raise RuntimeError(
                    f"modes 'double' and 'ggn' differentiate twice, which an operation of this model does not support "
                    f"({error}). For fused attention run the closure under "
                    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use finite differences (mode 'forward', for "
                    "variant 'reng' mode 'finite')"
                ) from error
        self.gradients = self.loss = self.output = None
        self.directions, found = [], self._averaged(list(found))
        return [{p: h for p, h in zip(self.parameters, found, strict=True) if h is not None}]

    def _hessian(self, have: list[tuple[nn.Parameter, Tensor, Tensor]]) -> Sequence[Tensor | None]:
        along = [(g, v) for _, g, v in have if g.requires_grad]
        if not along:  # a loss that is linear in the parameters
            return (None,) * len(self.parameters)
        gradients, directions = zip(*along, strict=True)
        return derivatives(gradients, self.parameters, directions)

    def _gauss_newton(self, have: list[tuple[nn.Parameter, Tensor, Tensor]]) -> Sequence[Tensor | None]:
        r"""J^T H_f J g with f the model's output: J g is the derivative of the linear map v -> <J^T v, g> at any v."""
        if self.output is None or self.calls != 1:
            raise RuntimeError(
                f"mode 'ggn' reads the output of one forward pass of the model a step, but saw {self.calls}: call the "
                "model that the optimizer was given, once, or use mode 'forward'"
            )
        f, loss = origin(get_gradient_edge(self.output)), self.loss
        assert loss is not None
        v = torch.zeros_like(self.output, requires_grad=True)
        back = torch.autograd.grad(f, [p for p, _, _ in have], v, create_graph=True, allow_unused=True)
        inner = [(b * g).sum() for b, (_, _, g) in zip(back, have, strict=True) if b is not None]
        (Jg,) = torch.autograd.grad(torch.stack(inner).sum(), v, retain_graph=True)
        (df,) = torch.autograd.grad(loss, f, create_graph=True)
        if not df.requires_grad:  # a loss that is linear in the output
            return (None,) * len(self.parameters)
        (HJg,) = torch.autograd.grad(df, f, Jg.detach(), retain_graph=True)
        return derivatives(f, self.parameters, HJg)


def derivatives(
    outputs: Any, parameters: Sequence[Tensor], directions: Any = None, **settings: Any
) -> list[Tensor | None]:
    """torch.autograd.grad by parameter: None for one that is unused, or frozen.

    >>> w, frozen = torch.ones(1, requires_grad=True), torch.ones(1)
    >>> derivatives((2 * w * frozen).sum(), [w, frozen])
    [tensor([2.]), None]
    """
    moving = [p for p in parameters if p.requires_grad]
    found = iter(torch.autograd.grad(outputs, moving, directions, allow_unused=True, **settings))
    return [next(found) if p.requires_grad else None for p in parameters]


class _Context(TorchFunctionMode):
    def __init__(self, owner: ProductPass) -> None:
        super().__init__()
        self.owner = owner

    def __enter__(self) -> "_Context":
        owner = self.owner
        if owner.model is not None:

            def read(module: nn.Module, args: Any, output: Any) -> None:
                owner.calls, owner.output = owner.calls + 1, find_output(output)

            owner.hook = owner.model.register_forward_hook(read)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self.owner.hook is not None:
            self.owner.hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.backward:
            if self.owner.sync and self.owner.processes is None:  # inside a forward pass it can be told
                self.owner.processes = together()
            return func(*args, **(kwargs or {}))
        self.owner.backward(*args, **(kwargs or {}))
        return None
