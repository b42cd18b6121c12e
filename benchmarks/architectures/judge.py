"""What becomes of every parameter of an architecture under GRNG, measured: two steps, held against brute force."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from grng import GRNG, Curvature, GRNGWarning
from grng.checkup import listen
from grng.curvature import Coverage, Layer, Statistics

from .base import Architecture, Batch
from .brute import Factors, diagonal, factors, is_norm

VARIANTS = ("ring", "kalman")
ENGINES = ("hooks", "backpack", "auto")
NOTHING = 1e-12  # a gradient that is rounding


class Finding(NamedTuple):
    """What was measured of a parameter.

    `exact`: the captured pair gives its gradient, and its factors are those of brute force. `verified`: the pair does;
    the factors are an approximation, or too large to be compared. `diagonal`: no layer's, kalman's own diagonal.
    `fallback`: the first-order rule, for the reason that the coverage states. `unused`: it got no gradient.
    """

    kind: Literal["exact", "verified", "diagonal", "fallback", "unused"]
    words: str = ""


@dataclass
class Outcome:
    """Findings by parameter, and everything that went wrong."""

    findings: dict[str, Finding] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    refused: str = ""
    warnings: list[str] = field(default_factory=list)
    engine: str = ""
    losses: list[float] = field(default_factory=list)


def expected(row: Architecture, parameter: str, variant: str, engine: str) -> Finding:
    """The finding that a row's claim amounts to."""
    kind, words = row.claim(parameter, engine)
    if kind == "exact":
        return Finding("exact" if row.brute and not (variant == "kalman" and row.coupled) else "verified")
    if kind == "uncovered":
        return Finding("diagonal" if variant == "kalman" else "fallback", words)
    return Finding({"approximation": "verified", "fallback": "fallback", "unused": "unused"}[kind], words)  # type: ignore[arg-type]


def fits(found: Finding, claim: Finding) -> bool:
    """Whether a finding is as claimed, or better than an approximation that was."""
    if claim.kind == "verified":
        return found.kind in ("verified", "exact")
    return found.kind == claim.kind and claim.words in found.words


def disagreements(row: Architecture, outcome: Outcome, variant: str, engine: str) -> list[str]:
    """Where the findings are not what the row claims."""
    claims = {n: expected(row, n, variant, engine) for n in outcome.findings}
    return [
        f"{n} is {found.kind} ({found.words}), claimed is {claims[n].kind} ({claims[n].words})"
        for n, found in outcome.findings.items()
        if not fits(found, claims[n])
    ]


def examine(row: Architecture, variant: str, engine: str, B: int) -> Outcome:
    """Build the model, take two steps, and look at everything that was measured in the first."""
    model = row.make()
    batch = row.batch(model, B)
    outcome = Outcome()
    start = deepcopy(model.state_dict())
    # The true labels for K-FAC's factors; for the filter the expectation over labels, which also sees what is no layer.
    fisher = "exact" if variant == "kalman" and row.brute else "mc" if variant == "kalman" else "empirical"
    curvature = Curvature(fisher=fisher, capture=engine)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            optimizer = GRNG(model, variant, curvature=curvature)
        except (RuntimeError, ValueError, TypeError) as error:
            outcome.refused = str(error)
            return outcome
        with closing(optimizer):
            uses = listen(optimizer)
            gradients: dict[str, Tensor] = {}
            try:
                for step in range(2):
                    optimizer.zero_grad()
                    loss = row.value(model, batch)
                    loss.backward()
                    outcome.losses.append(loss.item())
                    for n, p in model.named_parameters():
                        if p.grad is not None:
                            gradients.setdefault(n, p.grad.clone())
                    if step == 0:
                        seen, uses[:] = list(uses), []
                    optimizer.step()
                    if step == 0:
                        row.between(model, optimizer)
                        measured = factors_of(optimizer)
            except RuntimeError as error:
                outcome.refused = str(error)
                return outcome
            outcome.losses.append(row.value(model, batch).item())
            report = optimizer.coverage()
            layers = [layer for layer in optimizer._layers if not layer.plain and layer.status == "verified"]
            outcome.engine = optimizer._capture.engine.name
    outcome.warnings = [str(w.message) for w in heard if issubclass(w.category, GRNGWarning)]
    look(model, outcome, report, gradients, start)
    model.load_state_dict(start)
    if row.brute and variant == "ring":
        compare_factors(row, model, batch, outcome, layers, seen, measured, gradients)
    elif row.brute and not row.coupled:
        compare_diagonal(row, model, batch, outcome, layers, seen)
    return outcome


def factors_of(optimizer: GRNG) -> dict[str, Factors]:
    """Copies of K-FAC's factors, layer by layer."""
    method = optimizer._preconditioner
    if not hasattr(method, "Lambda"):
        return {}
    return {
        layer.name: (method.Lambda.of(layer).clone(), method.Gamma.of(layer).clone())  # type: ignore[attr-defined]
        for layer in optimizer._layers
    }


def look(
    model: nn.Module,
    outcome: Outcome,
    report: Coverage,
    gradients: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> None:
    """The coverage against what happened: a row a trainable parameter, and everything that has a gradient moved."""
    rows = {row.parameter: row for row in report}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    outcome.faults += [f"{n} is not in the coverage" for n in trainable - rows.keys()]
    outcome.faults += [f"{n} is in the coverage, but not trained" for n in rows.keys() - trainable]
    for n in trainable & rows.keys():
        row, moved = rows[n], not torch.equal(before[n], model.get_parameter(n))
        used = n in gradients and float(gradients[n].abs().max()) > NOTHING
        if used and not moved:
            outcome.faults.append(f"{n} has a gradient and was not moved")
        if not torch.isfinite(model.get_parameter(n)).all():
            outcome.faults.append(f"{n} is not finite")
        if n not in gradients:
            outcome.findings[n] = Finding("unused")
        elif row.treatment == "adamw":
            outcome.findings[n] = Finding("fallback", row.reason)
        elif row.verified != "yes":
            outcome.faults.append(f"{n} is {row.verified}, not verified")
        elif row.reason.startswith("diagonal: "):
            outcome.findings[n] = Finding("diagonal", row.reason.removeprefix("diagonal: "))
        else:
            outcome.findings[n] = Finding("verified")
        if not row.reason:
            outcome.faults.append(f"{n} has no reason")


def compare_factors(
    row: Architecture,
    model: nn.Module,
    batch: Batch,
    outcome: Outcome,
    layers: Sequence[Layer],
    seen: Sequence[tuple[Layer, Statistics]],
    measured: Mapping[str, Factors],
    gradients: Mapping[str, Tensor],
) -> None:
    """K-FAC: the pair gives the gradient; Lambda and Gamma are those of brute force."""
    N = batch[1].numel()
    names = {p: n for n, p in model.named_parameters()}
    theirs = factors(row, model, batch, layers)
    for layer in layers:
        total = torch.stack([s.gradient() for other, s in seen if other is layer]).sum(0) / N
        own = [names[p] for p in layer.parameters]
        errors = [relative(mine, gradients[names[p]]) for p, mine in layer.views(total) if names[p] in gradients]
        if max(errors) > row.tolerance:
            outcome.faults.append(f"{layer.name}: the pair misses the gradient by {max(errors):.1e}")
            continue
        if layer.name not in theirs:
            outcome.faults.append(f"{layer.name}: brute force saw no use")
            continue
        Lambda, Gamma = measured[layer.name]
        Lambda = Lambda.diag_embed() if layer.indexed else Lambda
        error = max(relative(a, b) for a, b in zip(scaled(layer, Lambda, Gamma), theirs[layer.name], strict=True))
        aligned = len(batch[1]) == 1 or all(s.aligned for other, s in seen if other is layer)
        if error <= row.tolerance and aligned:
            outcome.findings.update(dict.fromkeys((n for n in own if n in outcome.findings), Finding("exact")))


def scaled(layer: Layer, Lambda: Tensor, Gamma: Tensor) -> Factors:
    """As brute force has them: of a normalisation only the product is told."""
    return (Lambda * Gamma, torch.ones_like(Gamma)) if is_norm(layer.module) else (Lambda, Gamma)


def compare_diagonal(
    row: Architecture,
    model: nn.Module,
    batch: Batch,
    outcome: Outcome,
    layers: Sequence[Layer],
    seen: Sequence[tuple[Layer, Statistics]],
) -> None:
    """The filter: squared, and summed over samples and labels, its columns are the Fisher's diagonal."""
    parameters = [p for layer in layers for p in layer.parameters]
    theirs = diagonal(row, model, batch, parameters)
    names = {p: n for n, p in model.named_parameters()}
    for layer in layers:
        uses = [s for other, s in seen if other is layer]
        columns: dict[int, Tensor] = {}
        for s in uses:
            V = s.columns(len(batch[1])).dense()
            columns[s.draw] = columns[s.draw] + V if s.draw in columns else V
        total = torch.stack(list(columns.values())).square().sum((0, 1))
        for p, mine in layer.views(total):
            if names[p] in outcome.findings and relative(mine, theirs[p]) <= row.tolerance:
                outcome.findings[names[p]] = Finding("exact")


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, absolute where b is next to nothing."""
    return float((a - b).norm() / b.norm().clamp(min=1e-6))
