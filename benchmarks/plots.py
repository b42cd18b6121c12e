"""The figures of a comparison, one colour a name, the same in all of them."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from .names import base_of
from .records import RunRecord
from .statistics import present
from .summary import names_of

# Okabe and Ito's palette, told apart by colour-blind readers too; baselines are dashed.
COLOURS = {
    "ring": "#D55E00",
    "reng": "#E69F00",
    "kalman": "#009E73",
    "kfac": "#0072B2",
    "ekfac": "#56B4E9",
    "sgd": "#B0B0B0",
    "sgd-momentum": "#7A7A7A",
    "adamw": "#222222",
    "nadamw": "#CC79A7",
    "rmsprop": "#8C6D31",
    "adan": "#5E4FA2",
    "sophia-g": "#1B7837",
    "sophia-h": "#7FBF7B",
    "soap": "#C51B7D",
    "muon": "#B35806",
}
# For names with regularizers or labels, in turn (after Tol's muted and bright palettes).
FURTHER = ("#882255", "#44AA99", "#CC6677", "#332288", "#999933", "#EE7733", "#117733", "#AA4499", "#33BBEE", "#A0522D")
BASELINES = ("sgd", "sgd-momentum", "adamw", "nadamw", "rmsprop", "adan", "sophia-g", "sophia-h", "soap", "muon")
STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}
Series = Callable[[RunRecord], Sequence[float | None]]


def draw_figures(records: Sequence[RunRecord], target: float) -> dict[str, Any]:
    """Every figure by name: loss, accuracy (or rmse) and cost; only of the runs that have something to show."""
    from matplotlib import rc_context

    usable = [r for r in records if r.status != "failed"]
    if not usable:
        return {}
    with rc_context(STYLE):
        return {
            "loss": loss_figure(usable),
            usable[0].metric: score_figure(usable, target),
            "cost": cost_figure(usable),
        }


def loss_figure(records: Sequence[RunRecord]) -> Any:
    """Training loss against steps and against seconds."""
    figure, (left, right) = panels(sharey=True)
    for name, hue, runs in groups(records):
        band(left, name, hue, runs, lambda r: r.curve["step"], lambda r: smooth(r.curve["loss"]))
        band(right, name, hue, runs, lambda r: r.curve["seconds"], lambda r: smooth(r.curve["loss"]))
    left.set(title="Training loss against steps", xlabel="step", ylabel="training loss, smoothed", yscale="log")
    right.set(title="Training loss against seconds", xlabel="seconds of training")
    limit_loss(left, records)
    legend(figure, records)
    return figure


def score_figure(records: Sequence[RunRecord], target: float) -> Any:
    """The metric against epochs, and at the end of every run."""
    accuracy = records[0].metric == "accuracy"
    scale = 100 if accuracy else 1
    label = f"{records[0].scored_on} {'accuracy (%)' if accuracy else 'RMSE'}"
    names = names_of(records)
    figure, (left, right) = panels(height=max(4.0, 1.6 + 0.3 * len(names)))
    for name, hue, runs in groups(records):
        band(left, name, hue, runs, lambda r: [e["epoch"] for e in r.epochs], lambda r: scaled(r.epochs, scale))
    left.set(title=f"{label.split(' (')[0].capitalize()} against epochs", xlabel="epoch", ylabel=label)
    for row, (_, hue, runs) in enumerate(groups(records)):
        ends = [scale * value for value in present(r.test_metric for r in runs)]
        heights = [row + (i - (len(ends) - 1) / 2) * min(0.5 / len(ends), 0.1) for i in range(len(ends))]
        right.scatter(ends, heights, s=24, color=hue, alpha=0.55, linewidths=0)
        right.plot([fmean(ends or [math.nan])] * 2, [row - 0.33, row + 0.33], color=hue, linewidth=2.5)
    right.set(title="At the end: each seed a dot, the mean a bar", xlabel=label, yticks=range(len(names)))
    right.set_yticklabels(names)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    if accuracy:
        limit_accuracy(left, right, records, target)
    legend(figure, records)
    return figure


def cost_figure(records: Sequence[RunRecord]) -> Any:
    """Time of one step: the mean as a bar, the median and p99 as marks."""
    names = names_of(records)
    figure, axes = panels(count=1, height=1.3 + 0.36 * len(names))
    for row, (_, hue, runs) in enumerate(groups(records)):
        mean, middle, p99 = (1000 * median(r.step_seconds[kind] for r in runs) for kind in ("mean", "median", "p99"))
        axes.barh(row, mean, height=0.62, color=hue, alpha=0.85)
        axes.plot([middle, middle], [row - 0.31, row + 0.31], color="white", linewidth=2)
        axes.plot([mean, max(p99, mean)], [row, row], color=hue, linewidth=1.2)
        axes.plot([p99], [row], "|", color=hue, markersize=9, markeredgewidth=1.6)
        axes.annotate(f"{mean:.2f}", (max(p99, mean), row), (7, 0), textcoords="offset points", va="center", size=9.5)
    axes.set(title="Milliseconds a step: mean (bar), median (white line), 99th percentile (tick)", xlabel="ms/step")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    return figure


def panels(count: int = 2, height: float = 4.0, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.6, height), layout="constrained")
    return figure, figure.subplots(1, count, **options)


def groups(records: Sequence[RunRecord]) -> list[tuple[str, str, list[RunRecord]]]:
    """Names with their colours and runs."""
    hues = colours(names_of(records))
    return [(name, hues[name], [r for r in records if r.optimizer == name]) for name in names_of(records)]


def band(axes: Any, name: str, hue: str, runs: Sequence[RunRecord], x: Series, y: Series) -> None:
    """The median over the seeds as a line in a band from the least to the greatest; a diverged run ends early."""
    columns = [present_columns([series(r) for r in runs]) for series in (x, y)]
    at = [median(values) for values in columns[0]]
    middle, low, high = ([pick(values) for values in columns[1]] for pick in (median, min, max))
    axes.fill_between(at[: len(low)], low, high, color=hue, alpha=0.13, linewidth=0)
    axes.plot(at[: len(middle)], middle, color=hue, linestyle=line_style(name))


def present_columns(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Values of the same index from rows of unequal length, without gaps; it ends where no row has a value."""
    columns = []
    for i in range(max(map(len, rows))):
        column = present(row[i] for row in rows if i < len(row))
        if not column:
            break
        columns.append(column)
    return columns


def smooth(values: Sequence[float | None], window: int = 9) -> list[float | None]:
    """Geometric mean over a few points to either side, since batches differ much; gaps stay gaps."""
    half, smoothed = window // 2, list[float | None]()
    for i, value in enumerate(values):
        near = [max(v, 1e-12) for v in present(values[max(0, i - half) : i + half + 1])]
        smoothed.append(None if value is None else math.exp(sum(map(math.log, near)) / len(near)))
    return smoothed


def scaled(epochs: Sequence[dict[str, Any]], scale: float) -> list[float | None]:
    return [None if e["test_metric"] is None else scale * e["test_metric"] for e in epochs]


def limit_loss(axes: Any, records: Sequence[RunRecord]) -> None:
    """Leave room for ten times the loss at the start, and no more for runs that diverge."""
    start = median(present(r.curve["loss"][0] for r in records) or [1.0])
    axes.set_ylim(top=min(axes.get_ylim()[1], 10 * start))


def limit_accuracy(left: Any, right: Any, records: Sequence[RunRecord], target: float) -> None:
    """Show the upper end, where the optimizers differ, and write beside the frame what lies far below."""
    late = [v for r in records for v in present(e["test_metric"] for e in r.epochs[len(r.epochs) // 8 :])]
    middle = median(present(r.test_metric for r in records))
    low = max(min(late), middle - 0.12)
    top = max(present(e["test_metric"] for r in records for e in r.epochs))
    room = 0.04 * max(top - low, 0.01)
    left.set_ylim(100 * (low - room), 100 * (top + room))
    left.axhline(100 * target, color="#999999", linewidth=0.9, linestyle=":", zorder=0)
    left.annotate(
        f"target {100 * target:g} %",
        (0, 100 * target),
        (5, 3),
        xycoords=left.get_yaxis_transform(),
        textcoords="offset points",
        annotation_clip=True,
        size=8.5,
        color="#777777",
    )
    shown = [100 * v for v in present(r.test_metric for r in records) if v >= low]
    width = max(max(shown) - min(shown), 0.5)
    right.set_xlim(min(shown) - 0.08 * width, max(shown) + 0.08 * width)
    for row, (_, hue, runs) in enumerate(groups(records)):
        below = [100 * v for v in present(r.test_metric for r in runs) if v < low]
        if below:
            text = f"◂ {len(below)} of {len(runs)} seeds, at {fmean(below):.3g} % in the mean"
            right.text(0.01, row, text, transform=right.get_yaxis_transform(), va="center", size=9, color=hue)


def legend(figure: Any, records: Sequence[RunRecord]) -> None:
    from matplotlib.lines import Line2D

    names = names_of(records)
    handles = [Line2D([], [], color=hue, linestyle=line_style(name)) for name, hue, _ in groups(records)]
    columns = max(1, min(len(names), 130 // (max(map(len, names)) + 6)))  # as many as the figure is wide
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.6)


def line_style(name: str) -> Any:
    return (0, (5, 2)) if base_of(name) in BASELINES else "solid"


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each of the names: its own where it has one, else the next of the further ones.

    >>> colours(["adamw", "adamw+gnp"])
    {'adamw': '#222222', 'adamw+gnp': '#882255'}
    """
    further = [name for name in names if name not in COLOURS]
    return {name: COLOURS.get(name) or FURTHER[further.index(name) % len(FURTHER)] for name in names}
