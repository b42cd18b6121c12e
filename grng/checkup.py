"""What GRNG makes of a model before it is trained: a step of each variant, and what must not change."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from grng.curvature import Coverage, Curvature, Layer, Statistics
from grng.curvature.passes import find_output
from grng.errors import invalid
from grng.invariance import Loss, Property, attaching, backward, invariances, put_back
from grng.optimizer import GRNG
from grng.variants import find_variant

Gradients = dict[str, Tensor]
TREATMENTS = ("verified", "approximation", "fallback", "unused", "wrong")
STEPS = 2


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
    variants: str | Sequence[str] = ("ring", "kalman"),
    curvature: Curvature | None = None,
) -> Checkup:
    """Take two steps of every variant on a model of your own, look at every parameter, and put the model back.

    Args:
        model: in the mode that it is trained in.
        inputs: a batch: what `loss` takes; a tensor, or tensors in tuples, lists and dicts, samples first.
        loss: of (model, inputs). None: cross-entropy of the model's last dimension against random labels, the model
            called with the tensor, or with a dict as keywords.
        variants: one, or several.
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
    variants = (variants,) if isinstance(variants, str) else tuple(variants)
    if not variants:
        raise invalid("variants", variants, "at least one variant")
    for variant in variants:
        find_variant(variant)
    if loss is None:
        inputs, loss = random_labels(model, inputs)
    curvature = Curvature() if curvature is None else curvature
    if curvature.adapts:  # later than in the steps that are taken here
        curvature = replace(curvature, damping=None)
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
                values.append(backward(optimizer, model, [(1.0, inputs)], loss))
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
        elif rows[n].verified == "pending" and not gradients[n].any():
            treatment, reason = "unused", "its gradient was zero, by which nothing is verified"
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


def _moved(p: Tensor, before: Tensor, gradient: Tensor, scale: float) -> bool:
    """Whether it moved, or had no reason to: its gradient is rounding beside the largest one of all, `scale`, or a step
    is less than half precision holds."""
    eps = torch.finfo(p.dtype).eps
    return eps > 1e-4 or float(gradient.abs().max()) <= 100 * eps * scale or not torch.equal(p, before)
