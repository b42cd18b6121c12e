"""What GRNG makes of a model before it is trained: a step of each variant, and what must not change."""

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_leaves, tree_map

from grng.curvature import Coverage, Curvature, Layer, Statistics
from grng.curvature.likelihood import Gaussian
from grng.curvature.passes import find_output
from grng.errors import invalid
from grng.optimizer import GRNG

Loss = Callable[[nn.Module, Any], Tensor]
Gradients = dict[str, Tensor]
TREATMENTS = ("verified", "approximation", "fallback", "unused", "wrong")
STEPS = 2
# Relative errors of an update that rounding explains, through factors that are nearly singular.
PRECISION = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class Verdict:
    """What becomes of one parameter under one variant.

    `treatment` is "verified" (factors, from a captured pair that reproduced its gradient), "approximation" (a
    diagonal), "fallback" (AdamW's rule, for the reason given), "unused" (it got no gradient), or "wrong".
    """

    parameter: str
    variant: str
    treatment: Literal["verified", "approximation", "fallback", "unused", "wrong"]
    reason: str


@dataclass(frozen=True)
class Property:
    """Something that must not change: `holds`, or None where the model gives no occasion, for the reason given."""

    name: str
    holds: bool | None
    reason: str


class Checkup:
    """Verdicts and properties, printable.

    Attributes:
        verdicts: one a parameter and variant.
        properties: what must not change, and whether it did.
        reports: the coverage by variant, as the optimizer itself gives it.
        warnings: what GRNG warned of on the way.
    """

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.properties: list[Property] = []
        self.reports: dict[str, Coverage] = {}
        self.warnings: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether every parameter is trained as it is said to be, and every property holds that has an occasion."""
        wrong = any(verdict.treatment == "wrong" for verdict in self.verdicts)
        return not wrong and all(p.holds is not False for p in self.properties)

    def counts(self) -> dict[str, int]:
        """How many parameters of each treatment, over all variants."""
        return {t: sum(verdict.treatment == t for verdict in self.verdicts) for t in TREATMENTS}

    @property
    def summary(self) -> str:
        """The last line: counts."""
        counts = ", ".join(f"{n} {treatment}" for treatment, n in self.counts().items())
        held = [p.holds for p in self.properties]
        return (
            f"{'ok' if self.ok else 'NOT OK'}: {counts}; properties: {held.count(True)} hold, "
            f"{held.count(False)} broken, {held.count(None)} without occasion"
        )

    def __str__(self) -> str:
        names = {verdict.parameter for verdict in self.verdicts}
        width = max((len(name) for name in names), default=0)
        lines = [
            f"{v.variant:<7} {v.parameter:<{width}}  {v.treatment:<13}  {v.reason}".rstrip() for v in self.verdicts
        ]
        said = {True: "holds", False: "BROKEN", None: "no occasion"}
        lines += [f"{p.name}: {said[p.holds]}{': ' * bool(p.reason)}{p.reason}" for p in self.properties]
        return "\n".join([*lines, *self.warnings, self.summary])


def check(
    model: nn.Module,
    inputs: Any,
    loss: Loss | None = None,
    *,
    variants: Sequence[str] = ("ring", "kalman"),
    curvature: Curvature | None = None,
) -> Checkup:
    """Take two steps of every variant on a model of your own, look at every parameter, and put the model back.

    Args:
        model: in the mode that it is trained in.
        inputs: a batch: what `loss` takes; a tensor, or tensors in tuples, lists and dicts, samples first.
        loss: of (model, inputs). None: cross-entropy of the model's last dimension against random labels, the model
            called with the tensor, or with a dict as keywords.
        variants: which.
        curvature: the settings; None: the defaults.

    Returns:
        what was found; `print` it, or ask whether it is `ok`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
        >>> print(check(model, torch.randn(8, 3), variants=["ring"]))
        ring    0.weight  verified       Linear
        ring    0.bias    verified       Linear
        ring    1.weight  fallback       no factors for PReLU
        ring    2.weight  verified       Linear
        ring    2.bias    verified       Linear
        attaching changes nothing: holds
        closing leaves nothing behind: holds
        duplicated batch, ring: holds
        micro-batches, ring: holds
        ok: 4 verified, 0 approximation, 1 fallback, 0 unused, 0 wrong; properties: 4 hold, 0 broken, 0 without occasion
    """
    if loss is None:
        inputs, loss = random_labels(model, inputs)
    curvature = Curvature() if curvature is None else curvature
    found = Checkup()
    with put_back(model), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with put_back(model):
            loss(model, inputs).backward()  # what is wrong with the model itself shows here
        for variant in variants:
            with put_back(model):
                steps(found, model, inputs, loss, variant, curvature)
        if found.ok:
            found.properties += attaching(model, inputs, loss, variants[0], curvature)
            apart = {v.parameter for v in found.verdicts if v.reason.endswith("called once for all samples")}
            for variant in variants:
                found.properties += invariances(model, inputs, loss, variant, curvature, apart)
    found.warnings = list(dict.fromkeys(str(w.message) for w in heard if "GRNG" in str(w.message)))
    return found


def random_labels(model: nn.Module, inputs: Any) -> tuple[Any, Loss]:
    """A batch with labels, and the loss that is made of them."""

    def output(model: nn.Module, x: Any) -> Tensor:
        f = find_output(model(**x) if isinstance(x, Mapping) else model(x))
        if f is None:
            raise invalid("loss", None, "given for a model that returns no tensor with a graph")
        return f

    with put_back(model), torch.enable_grad():
        f = output(model, inputs)
    if f.ndim < 2:
        return (inputs, torch.randn_like(f)), lambda model, batch: mse_loss(output(model, batch[0]), batch[1])
    labels = torch.randint(f.shape[-1], f.shape[:-1], device=f.device)
    return (inputs, labels), lambda model, batch: cross_entropy(
        output(model, batch[0]).flatten(0, -2), batch[1].flatten()
    )


# The steps.


def steps(found: Checkup, model: nn.Module, inputs: Any, loss: Loss, variant: str, curvature: Curvature) -> None:
    """Two steps, and a verdict for every trainable parameter."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    gradients: Gradients = {}
    values: list[Tensor] = []
    with GRNG(model, variant, curvature=curvature) as optimizer:
        uses = listen(optimizer)
        try:
            for _ in range(STEPS):
                optimizer.zero_grad()
                values.append(_backward(optimizer, model, [(1.0, inputs)], loss))
                gradients |= {n: p.grad.detach().clone() for n, p in trainable.items() if p.grad is not None}
                optimizer.step()
        except Exception as error:  # a pass without the optimizer went well
            reason = f"a step fails with {type(error).__name__}: {error}".splitlines()[0]
            found.verdicts += [Verdict(n, variant, "wrong", reason) for n in trainable]
            return
        finally:
            report = found.reports[variant] = optimizer.coverage()
        seen = optimizer._capture.entered
    together = {p for layer, statistics in uses if not statistics.aligned for p in layer.parameters}
    finite = all(map(torch.isfinite, values))
    scale = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    rows = {row.parameter: row for row in report}
    for n, p in trainable.items():
        treatment: Any = "verified"
        if n not in rows:
            treatment, reason = "wrong", "it is not in the coverage"
        elif not finite:
            treatment, reason = "wrong", f"the loss is not finite: {', '.join(f'{float(v):.3g}' for v in values)}"
        elif not torch.isfinite(p).all():
            treatment, reason = "wrong", "it is not finite after the step"
        elif not seen:
            treatment, reason = "wrong", "the loss does not call the model that is checked, but a part or a copy of it"
        elif n not in gradients:
            treatment, reason = "unused", "it got no gradient"
        elif not _moved(p, before[n], gradients[n], scale):
            treatment, reason = "wrong", "it has a gradient and was not moved"
        else:
            reason = rows[n].reason
            if rows[n].treatment == "adamw":
                treatment = "fallback"
            elif rows[n].verified != "yes":
                treatment, reason = "wrong", f"its capture was not verified ({rows[n].verified})"
            elif reason.startswith("diagonal: "):
                treatment = "approximation"
            elif p in together:
                treatment, reason = "approximation", f"{reason}, called once for all samples"
        found.verdicts.append(Verdict(n, variant, treatment, reason))


def listen(optimizer: GRNG) -> list[tuple[Layer, Statistics]]:
    """Everything that the preconditioner is handed from now on."""
    uses: list[tuple[Layer, Statistics]] = []
    method = optimizer._preconditioner
    known = method.observe

    def observe(layer: Layer, statistics: Statistics) -> None:
        uses.append((layer, statistics))
        known(layer, statistics)

    method.observe = observe  # type: ignore[method-assign]
    return uses


def _backward(optimizer: GRNG, model: nn.Module, parts: list[tuple[float, Any]], loss: Loss) -> Tensor:
    """The passes of a step, as many as the variant asks for, each over parts of a batch with their shares."""
    value = torch.zeros(())
    for each in optimizer.passes() if optimizer.requires_closure else [nullcontext()]:
        with each:
            for share, part in parts:
                value = share * loss(model, part)
                value.backward()
    return value.detach()


def _moved(p: Tensor, before: Tensor, gradient: Tensor, scale: float) -> bool:
    """Whether it moved, or had no reason to: its gradient is rounding beside the largest one of all, `scale`, or a step
    is less than half precision holds."""
    eps = torch.finfo(p.dtype).eps
    return eps > 1e-4 or float(gradient.abs().max()) <= 100 * eps * scale or not torch.equal(p, before)


# What must not change.


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
        _backward(optimizer, model, parts, loss)
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
