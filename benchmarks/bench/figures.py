"""The figures of a benchmark: profiles, times to target, curves, sensitivity."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..plots import STYLE, colours, line_style, panels
from ..statistics import profile
from .analysis import Analysis, Line, searched
from .budget import DRAWN, budget_figure
from .trial import Outcome

CLOCKS = {
    "seconds": "seconds of training",
    "cpu_seconds": "CPU seconds of training",
    "step": "steps",
    "evaluations": "gradient evaluations",
}


def draw_figures(analysis: Analysis) -> dict[str, Any]:
    """Every figure by name; only those that have something to show."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        found: dict[str, Any] = {}
        if any(t < math.inf for row in analysis.times().values() for t in row.values()):
            found["profile"] = profile_figure(analysis)
            found["times"] = times_figure(analysis)
        for workload in analysis.workloads:
            if any(o.rows for o in runs_of(analysis, workload)):
                found[f"curves-{workload}"] = curves_figure(analysis, workload)
        if searched(analysis.outcomes):
            found["budget"] = budget_figure(analysis)
            for workload in analysis.workloads or analysis.tuned:
                found[f"sensitivity-{workload}"] = sensitivity_figure(analysis, workload)
        return {name: figure for name, figure in found.items() if figure is not None}


def profile_figure(analysis: Analysis) -> Any:
    """Dolan and More's profiles of the median times of the runs, and of the search's studies."""
    tau = [1 + 3 * i / 300 for i in range(301)]
    hues = colours(analysis.optimizers)
    figure, axes = panels(sharey=True)
    for axis, times, title in (
        (axes[0], analysis.times(), "Runs at the best setting"),
        (axes[1], analysis.tuned, "Search: each study's fastest trial"),
    ):
        for name, share in profile(times, tau).items():
            axis.plot(tau, share, label=name, color=hues.get(name, "#888888"), linestyle=line_style(name))
        axis.set(title=title, xlabel=f"times the fastest's {CLOCKS[analysis.clock]}", ylim=(-0.02, 1.02))
    axes[0].set_ylabel("share of workloads at target")
    legend(figure, analysis.optimizers)
    return figure


def times_figure(analysis: Analysis) -> Any:
    """Times to target, each seed a dot, the median a bar; what missed lies at the right."""
    workloads = [w for w in analysis.workloads if w in analysis.targets]
    names = analysis.optimizers
    hues = colours(names)
    columns = min(3, len(workloads))
    rows = math.ceil(len(workloads) / columns)
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10.6, rows * (1.2 + 0.2 * len(names))), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in grid.flat[len(workloads) :]:
        axis.set_visible(False)
    for axis, workload in zip(grid.flat, workloads, strict=False):
        lines = {line.optimizer: line for line in analysis.lines if line.workload == workload}
        finite = [t for line in lines.values() for t in line.times if t < math.inf]
        edge = 1.35 * max(finite, default=1.0)
        for row, name in enumerate(names):
            if name in lines:
                dots(axis, row, lines[name], hues[name], edge)
        axis.axvline(edge / 1.15, color="#BBBBBB", linewidth=0.8)
        axis.set(title=workload, xlabel=CLOCKS[analysis.clock], xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="y", visible=False)
    grid[0][0].invert_yaxis()
    return figure


def dots(axis: Any, row: int, line: Line, hue: str, edge: float) -> None:
    times = [edge if t == math.inf else t for t in line.times]
    axis.scatter(times, [row] * len(times), s=16, color=hue, alpha=0.5, linewidths=0)
    if line.time < math.inf:
        axis.plot([line.time] * 2, [row - 0.35, row + 0.35], color=hue, linewidth=2.4)


def curves_figure(analysis: Analysis, workload: str) -> Any:
    """The metric on the validation set against the clock and against steps: medians over the seeds, the best ones."""
    lines = analysis.lines_of(workload)[:DRAWN]
    hues = colours(analysis.optimizers)
    target = analysis.targets.get(workload)
    runs = runs_of(analysis, workload)
    figure, axes = panels(sharey=True)
    clock = analysis.clock if analysis.clock not in ("step", "evaluations") else "seconds"
    values = []
    for line in lines:
        own = [o for o in runs if o.optimizer == line.optimizer and o.rows]
        for axis, key in ((axes[0], clock), (axes[1], "step")):
            at, middle = median_curve(own, key)
            axis.plot(at, middle, color=hues[line.optimizer], linestyle=line_style(line.optimizer))
            values += [v for v in middle[len(middle) // 10 :] if math.isfinite(v)]
    for axis, key in ((axes[0], clock), (axes[1], "step")):
        if target:
            axis.axhline(target.value, color="#999999", linewidth=0.9, linestyle=":")
        axis.set(xlabel=CLOCKS[key], title=f"{workload}: {runs[0].metric} against {CLOCKS[key].partition(' of')[0]}")
    if runs[0].goal == "min" and values and min(values) > 0:
        axes[0].set_yscale("log")
    if values:
        low, high = min(values), max(values)
        bottom = sorted(values)[len(values) // 10] if runs[0].goal == "max" else low
        axes[0].set_ylim(bottom if runs[0].goal == "max" else 0.95 * low, high if runs[0].goal == "min" else None)
    legend(figure, [line.optimizer for line in lines], analysis.optimizers)
    return figure


def median_curve(runs: Sequence[Outcome], key: str) -> tuple[list[float], list[float]]:
    """Medians over runs, evaluation by evaluation, as far as all of them go."""
    count = min((len(o.rows) for o in runs), default=0)
    at = [median(float(o.rows[i][key]) for o in runs) for i in range(count)]
    values = [o.values(o.metric) for o in runs]
    middle = [median(v[i] for v in values) for i in range(count)]
    return at, middle


def sensitivity_figure(analysis: Analysis, workload: str) -> Any:
    """The best value of every trial of the search against its learning rate, one panel an optimizer."""
    trials = [o for o in searched(analysis.outcomes) if o.workload == workload]
    names = [name for name in analysis.optimizers if any(o.optimizer == name for o in trials)]
    found = {n: [(o.trial["settings"].get("lr"), o.best(), o) for o in trials if o.optimizer == n] for n in names}
    values = sorted(v for points in found.values() for _, v, _ in points if v is not None)
    if not values:
        return None
    hues = colours(analysis.optimizers)
    columns = min(6, len(names))
    rows = math.ceil(len(names) / columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, 0.6 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in grid.flat[len(names) :]:
        axis.set_visible(False)
    low, high = values[len(values) // 20], values[-1 - len(values) // 20]
    for axis, name in zip(grid.flat, names, strict=False):
        for rate, value, outcome in found[name]:
            if rate is None:
                continue
            shown = (low if outcome.goal == "max" else high) if value is None else min(max(value, low), high)
            marker = "o" if outcome.status == "finished" else "x"
            axis.scatter([rate], [shown], s=18, color=hues[name], marker=marker, alpha=0.8)
        target = analysis.targets.get(workload)
        if target:
            axis.axhline(target.value, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(name, size=9)
        axis.set_xscale("log")
        axis.tick_params(labelsize=7)
        if trials[0].goal == "min" and low > 0:
            axis.set_yscale("log")
    figure.supxlabel("learning rate (cross: diverged)", size=9)
    figure.supylabel(f"best {trials[0].metric}", size=9)
    figure.suptitle(f"{workload}: every trial of the search", size=11)
    return figure


def runs_of(analysis: Analysis, workload: str) -> list[Outcome]:
    return [
        o for o in analysis.outcomes if o.workload == workload and o.trial["phase"] == "run" and o.status != "failed"
    ]


def legend(figure: Any, names: Sequence[str], palette: Sequence[str] | None = None) -> None:
    from matplotlib.lines import Line2D

    hues = colours(palette or names)
    handles = [Line2D([], [], color=hues[name], linestyle=line_style(name)) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), handlelength=2.2)
