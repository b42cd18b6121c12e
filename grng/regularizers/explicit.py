"""Explicit gradient regularization: the gradient of L + rho/2 ||grad L||^2, which is g + rho H g."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grng.damping import squared_norm

Closure = Callable[[], Any]


class _BackwardWithGraph(TorchFunctionMode):
    """Inside, `loss.backward()` leaves gradients that can be differentiated once more, without the reference cycle of
    `backward(create_graph=True)`."""

    def __init__(self, parameters: list[nn.Parameter], note: Callable[[nn.Parameter, Tensor], None]) -> None:
        super().__init__()
        self.parameters, self.note = parameters, note
        self.gradients: list[Tensor | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.backward:
            return func(*args, **(kwargs or {}))
        if self.gradients is not None:
            raise RuntimeError(
                "mode 'double' takes one backward() a closure: the penalty of a gradient that is accumulated over "
                "several cannot be formed from its parts. Use mode 'finite', or one larger batch"
            )
        found = torch.autograd.grad(args[0], self.parameters, create_graph=True, allow_unused=True)
        self.gradients = list(found)
        for p, g in zip(self.parameters, found, strict=True):
            if g is not None:
                self.note(p, g)
                p.grad = g.detach().clone() if p.grad is None else p.grad + g.detach()
        return None


def double_backward_gradients(
    closure: Closure,
    parameters: list[nn.Parameter],
    rho: Callable[[], Tensor],
    paused: Callable[[], AbstractContextManager[None]],
    note: Callable[[nn.Parameter, Tensor], None],
) -> tuple[Any, dict[nn.Parameter, Tensor]]:
    """g + rho H g exactly, by differentiating rho/2 ||g||^2 once more: about 9 forward passes.

    Args:
        closure: calls zero_grad, forward and one backward, and returns the loss.
        parameters: whose gradients enter the norm.
        rho: the strength, asked for after the first pass.
        paused: a context in which no curvature is captured; the second backward pass runs in it.
        note: called with every parameter and its plain gradient.

    Returns:
        what the closure returned, and the penalised gradient of every parameter that has one; `.grad` holds g.
    """
    mode = _BackwardWithGraph(parameters, note)
    with torch.enable_grad(), mode:
        loss = closure()
    if mode.gradients is None:
        return loss, {}
    have = [(p, g) for p, g in zip(parameters, mode.gradients, strict=True) if g is not None]
    plain = {p: g.detach() for p, g in have}
    with torch.enable_grad(), paused():
        norm = torch.stack([g.square().sum() for _, g in have]).sum()
        if not norm.requires_grad:  # a loss that is linear in the parameters
            return loss, plain
        try:
            found = torch.autograd.grad(norm / 2, list(plain), allow_unused=True)
        except RuntimeError as error:
            if "derivative for" in str(error):
                raise RuntimeError(
                    f"mode 'double' differentiates twice, which an operation of this model does not support ({error}). "
                    "For fused attention run the closure under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use "
                    "mode 'finite' or 'ggn'"
                ) from error
            raise
    strength = rho()
    return loss, {p: g if h is None else g + strength * h for (p, g), h in zip(plain.items(), found, strict=True)}


def finite_difference_gradients(
    closure: Closure,
    parameters: list[nn.Parameter],
    rho: Callable[[], Tensor],
    paused: Callable[[], AbstractContextManager[None]],
    model: nn.Module,
    eps: float = 1e-2,
) -> tuple[Any, dict[nn.Parameter, Tensor]]:
    """g + rho ||g|| (grad L(theta + eps g/||g||) - g) / eps: the closure runs twice, about 6 forward passes.

    Both passes see the same random numbers; buffers (BatchNorm's running statistics) keep what the first pass left;
    parameters are restored from a copy, to the bit, also when the closure raises. The error is linear in eps.

    Returns:
        what the closure returned first, and the regularised gradients; `.grad` holds g again.
    """
    before = _random_state(parameters)
    with torch.enable_grad():
        loss = closure()
    after = _random_state(parameters)
    have = [p for p in parameters if p.grad is not None]
    plain = [p.grad.detach().clone() for p in have if p.grad is not None]
    if not have:
        return loss, {}
    norm = squared_norm(plain).sqrt()
    step = torch.where((norm > 0) & torch.isfinite(norm), eps / norm, 0.0)
    with _moved(have, plain, step, model), paused(), torch.enable_grad():
        _set_random_state(before)
        closure()
        moved = [torch.zeros_like(g) if p.grad is None else p.grad.detach() for p, g in zip(have, plain, strict=True)]
    _set_random_state(after)
    strength = rho() * norm / eps
    result = {p: g + strength.to(g.dtype) * (m - g) for p, g, m in zip(have, plain, moved, strict=True)}
    for p, g in zip(have, plain, strict=True):
        p.grad = g
    return loss, result


@contextmanager
def _moved(parameters: list[nn.Parameter], direction: list[Tensor], step: Tensor, model: nn.Module) -> Iterator[None]:
    saved = [p.detach().clone() for p in parameters]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p.add_((step * d).to(p.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, saved, strict=True):
                p.copy_(value)
            for b, value in buffers:
                b.copy_(value)


def _random_state(parameters: list[nn.Parameter]) -> dict[torch.device | None, Tensor]:
    states: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[torch.device | None, Tensor]) -> None:
    for device, state in states.items():
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
