"""What must not change when GRNG trains a model: its passes, its hooks, and updates whose gradient is the same."""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from grng.curvature import Curvature
from grng.curvature.likelihood import Gaussian
from grng.optimizer import GRNG

Loss = Callable[[nn.Module, Any], Tensor]
# Relative errors of an update that rounding explains, through factors that are nearly singular.
PRECISION = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class Property:
    """Something that must not change: `holds`, or None where the model gives no occasion, for the reason given."""

    name: str
    holds: bool | None
    reason: str


def attaching(model: nn.Module, inputs: Any, loss: Loss, variant: str, curvature: Curvature) -> Iterator[Property]:
    """Loss, gradients, buffers and random numbers of a pass with the optimizer attached and without; hooks after it."""
    hooks = _hooks(model)
    with put_back(model):
        plain = _pass(model, inputs, loss)
    with put_back(model), GRNG(model, variant, curvature=curvature):
        attached = _pass(model, inputs, loss)
    with put_back(model):
        again = _pass(model, inputs, loss)
    changed = [name for name in plain if not torch.equal(plain[name], attached[name])]
    if any(not torch.equal(plain[name], again[name]) for name in plain):
        yield Property("attaching changes nothing", None, "two passes from one seed differ without it")
    else:
        yield Property("attaching changes nothing", not changed, ", ".join(changed))
    left = sorted(_hooks(model) - hooks)
    yield Property("closing leaves nothing behind", not left, ", ".join(left))


def _pass(model: nn.Module, inputs: Any, loss: Loss) -> dict[str, Tensor]:
    """Everything that a forward and backward pass leaves."""
    torch.manual_seed(0)
    model.zero_grad()
    value = loss(model, inputs)
    value.backward()
    found = {"the loss": value.detach(), "random numbers": torch.get_rng_state()}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return found | {f"the gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _hooks(model: nn.Module) -> set[str]:
    """Hooks and attributes of every module and parameter, by name."""
    found = set()
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = value if key.endswith("hooks") else None
            found |= {f"{name}.{key}[{i}]" for i in held or ()} if held is not None else {f"{name}.{key}"}
    for name, p in model.named_parameters():
        for key in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found |= {f"{name}.{key}[{i}]" for i in getattr(p, key, None) or ()}
    return found


def invariances(
    model: nn.Module, inputs: Any, loss: Loss, variant: str, curvature: Curvature, apart: Collection[str] = ()
) -> Iterator[Property]:
    """Twice every sample, and the batch in two halves: the same update, where the gradient is the same. Parameters that
    are used once for all samples are left `apart`: with the true labels, sums over samples are no scores."""
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n not in apart]
    curvature = replace(curvature, fisher="empirical", draws=1)  # labels drawn for other samples are others
    sizes = {t.shape[0] if t.ndim else 0 for t in tree_leaves(inputs) if isinstance(t, Tensor)}
    half = sizes.pop() // 2 if len(sizes) == 1 else 0

    def cut(start: int, stop: int) -> Any:
        return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, inputs)

    if not half:
        yield Property(f"batch, {variant}", None, "the inputs are not tensors with two or more samples first")
        return
    batch = cut(0, 2 * half)
    whole = _update(model, trained, [(1.0, batch)], loss, variant, curvature)
    if whole.gaussian and whole.weighs_sums:  # an estimate of the noise starts from the first part
        curvature = replace(curvature, noise=1.0)
        whole = _update(model, trained, [(1.0, batch)], loss, variant, curvature)
    tolerance = PRECISION.get(whole.dtype)
    if not whole.moved.any():
        yield Property(f"batch, {variant}", None, "no parameter with factors is moved")
        return
    if tolerance is None:
        yield Property(f"batch, {variant}", None, f"the update is lost in the precision of {whole.dtype}")
        return
    twice = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, batch)
    cases = [("duplicated batch", [(1.0, twice)], curvature)]
    if whole.weighs_sums:  # the filter counts samples as evidence: copies are more of it
        cases.clear()
    parts = [(0.5, cut(0, half)), (0.5, cut(half, 2 * half))]
    halved = curvature
    if whole.gaussian and not isinstance(curvature.loss_scale, str):  # a squared error does not show its scale
        halved = replace(curvature, loss_scale=(curvature.loss_scale or 1.0) / 2)
    for name, other, settings in [*cases, ("micro-batches", parts, halved)]:
        yield _compare(
            f"{name}, {variant}", whole, tolerance, partial(_update, model, trained, other, loss, variant, settings)
        )


def _compare(name: str, whole: "Update", tolerance: float, update: Callable[[], "Update"]) -> Property:
    try:
        other = update()
    except Exception as error:  # whatever a model raises for a batch of another size
        return Property(name, None, f"not with this model and variant: {error}".splitlines()[0])
    if _apart(other.gradient, whole.gradient) > tolerance:
        return Property(name, None, "the gradient itself changes: samples see each other, or random numbers")
    distance = _apart(other.moved, whole.moved)
    return Property(name, distance <= tolerance, "" if distance <= tolerance else f"relative error {distance:.1e}")


@dataclass
class Update:
    """What a step did to the parameters with factors."""

    gradient: Tensor
    moved: Tensor
    weighs_sums: bool
    gaussian: bool
    dtype: torch.dtype


def _update(
    model: nn.Module,
    trained: list[nn.Parameter],
    parts: list[tuple[float, Any]],
    loss: Loss,
    variant: str,
    curvature: Curvature,
) -> Update:
    with put_back(model), GRNG(model, variant, params=trained, curvature=curvature) as optimizer:
        torch.manual_seed(0)
        before = {p: p.detach().clone() for p in trained}
        model.zero_grad()
        backward(optimizer, model, parts, loss)
        optimizer.step()
        # AdamW's first step is the gradient's sign, which rounding turns round where the gradient is nothing.
        names = {row.parameter for row in optimizer.coverage() if row.treatment != "adamw"}
        covered = [p for n, p in model.named_parameters() if n in names and p.grad is not None]
        none = torch.zeros(0)
        gradient = torch.cat([none, *(p.grad.flatten().double() for p in covered)])  # type: ignore[union-attr]
        step = torch.cat([none, *((p.detach() - before[p]).flatten().double() for p in covered)])
        dtype = max((p.dtype for p in trained), key=lambda dtype: torch.finfo(dtype).eps)
        gaussian = isinstance(optimizer._capture.fisher.likelihood, Gaussian)
        return Update(gradient, step, optimizer._preconditioner.weighs_sums, gaussian, dtype)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers, gradients and the random numbers of the processor, as they were before."""
    if "torch._dynamo" in sys.modules:  # what is compiled does not see hooks that come later
        torch.compiler.reset()
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    gradients = {p: None if p.grad is None else p.grad.detach().clone() for p in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for t, value in zip(tensors, values, strict=True):
                    t.copy_(value)
            for p, gradient in gradients.items():
                p.grad = gradient


def backward(optimizer: GRNG, model: nn.Module, parts: list[tuple[float, Any]], loss: Loss) -> Tensor:
    """The passes of a step, as many as the variant asks for, each over parts of a batch with their shares."""
    value = torch.zeros(())
    for each in optimizer.passes() if optimizer.requires_closure else [nullcontext()]:
        with each:
            for share, part in parts:
                value = share * loss(model, part)
                value.backward()
    return value.detach()
