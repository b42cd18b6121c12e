"""Budget curves: what a search of n trials comes to, for every n."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..names import ordered
from ..plots import colours, line_style, panels
from ..statistics import expected_best
from .analysis import Analysis, searched
from .section import Section
from .trial import Outcome

DRAWN = 9  # curves of one figure that can still be told apart
SHOWN = (1, 3, 5, 10)  # trials that a column tells of, and all of them
Curve = list[float]


def budget_curves(analysis: Analysis) -> dict[str, tuple[Curve, Curve]]:
    """Of everybody who searched every workload that somebody did, for n = 1, 2, ... trials: how likely one of them
    reaches the target; and the share of all trials of the workload, of anybody, that the best of them beats. Means over
    the workloads, in the order of the second."""
    trials = searched(analysis.outcomes)
    workloads = list(dict.fromkeys(o.workload for o in trials))
    beaten = {w: shares_beaten([o for o in trials if o.workload == w]) for w in workloads}
    found: dict[str, tuple[Curve, Curve]] = {}
    for name in ordered(o.optimizer for o in trials):
        own = {w: [(o, share) for o, share in beaten[w] if o.optimizer == name] for w in workloads}
        if all(own.values()):
            reached = [
                [float(o.time_to(analysis.targets[w].value, "step") < math.inf) for o, _ in pairs]
                for w, pairs in own.items()
                if w in analysis.targets
            ]
            found[name] = mean_curve(reached), mean_curve([[share for _, share in pairs] for pairs in own.values()])
    return dict(sorted(found.items(), key=lambda item: -fmean(item[1][1])))


def shares_beaten(trials: Sequence[Outcome]) -> list[tuple[Outcome, float]]:
    """The trials of one workload, each with the share of the others that it beats by its best value; a tie is a half,
    and what failed beats nobody."""
    sign = 1 if trials[0].goal == "max" else -1
    values = [-math.inf if (best := o.best()) is None else sign * best for o in trials]
    ascending, others = sorted(values), max(len(trials) - 1, 1)
    return [
        (o, (bisect_left(ascending, value) + bisect_right(ascending, value) - 1) / 2 / others)
        for o, value in zip(trials, values, strict=True)
    ]


def mean_curve(rows: Sequence[Sequence[float]]) -> Curve:
    """The mean of the rows' expected bests, as far as the shortest goes."""
    return [fmean(column) for column in zip(*map(expected_best, rows), strict=False)]


def budget_figure(analysis: Analysis) -> Any:
    """The curves of the best; None where there was no search."""
    curves = dict(list(budget_curves(analysis).items())[:DRAWN])
    if not curves:
        return None
    hues = colours(analysis.optimizers)
    figure, axes = panels()
    for name, pair in curves.items():
        for axis, curve in zip(axes, pair, strict=True):
            axis.plot(range(1, len(curve) + 1), curve, color=hues[name], linestyle=line_style(name), label=name)
    axes[0].set(title="One of n trials reaches the target", ylabel="share of workloads", ylim=(-0.02, 1.02))
    axes[1].set(title="The best of n trials beats", ylabel="share of everybody's trials")
    for axis in axes:
        axis.set(xlabel="trials of the search")
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), handlelength=2.2)
    return figure


def budget_section(analysis: Analysis, drawn: Sequence[str]) -> Section | None:
    curves = budget_curves(analysis)
    most = max((len(beats) for _, beats in curves.values()), default=0)
    if most < 2:
        return None
    counts = [*(n for n in SHOWN if n < most), most]
    text = (
        "What n trials of the search come to, drawn at random from those that were made: how likely one of them "
        "reaches the target, and the share of everybody's trials of the workload that the best of them beats in value; "
        "means over the workloads. It judges the search space as much as the optimizer: a narrow one around good "
        "settings needs few trials."
    )
    headings = ("optimizer", *(f"target, {n}" for n in counts), *(f"beats, {n}" for n in counts))
    rows = [
        [name, *(f"{curve[n - 1]:.2f}" if n <= len(curve) else "–" for curve in pair for n in counts)]
        for name, pair in curves.items()
    ]
    return Section("What fewer trials come to", text, headings, rows, [f for f in ("budget",) if f in drawn])
