"""Our SGD, momentum and Adam on DeepOBS's problems beside its published curves: they have to land on them before
anything else is compared there; and everything else."""

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from ..plots import STYLE, colours
from .analysis import Analysis
from .figures import median_curve, runs_of
from .section import Section
from .trial import Outcome

PROBLEMS = {"deepobs-fmnist-2c2d": "fmnist_2c2d", "deepobs-cifar10-3c3d": "cifar10_3c3d"}
NAMES = {"sgd": "SGD", "sgd-momentum": "momentum", "adamw": "Adam"}  # without weight decay AdamW is Adam
PLAIN = (("weight_decay", 0.0), ("nesterov", False))  # said, where an optimizer would have something else
OURS = "#B2182B"  # unlike the greys of the published curves
Published = dict[str, dict[str, Any]]
Pair = tuple[str, str, dict[str, Any], list[Outcome]]  # workload, optimizer, the published curve, our runs


def landing_section(analysis: Analysis, published: Published) -> Section | None:
    """Epochs to the published target and accuracies, of ours and of theirs."""
    rows = []
    for workload, name, theirs, runs in pairs_of(analysis, published):
        target = published[PROBLEMS[workload]]["target"]
        runs = [run for run in runs if len(run.rows) > 1]
        if not runs:  # an epoch, or a part of one
            continue
        epochs = epochs_to(target, runs)
        curve = median_curve(runs, "step")[1]
        last = min(len(curve), len(theirs["median"]) - 1)
        apart = [100 * (curve[e - 1] - theirs["median"][e]) for e in range(last // 2 + 1, last + 1)]
        inside = [theirs["lowest"][e] <= curve[e - 1] <= theirs["highest"][e] for e in range(1, last + 1)]
        rows.append(
            [
                workload,
                name,
                f"{theirs['median_epochs']:g} ({theirs['first']:g} to {theirs['last']:g})",
                f"{theirs['reached']}/{theirs['seeds']}",
                *told(epochs),
                f"{100 * theirs['median'][last]:.2f}",
                f"{100 * curve[last - 1]:.2f}",
                f"{fmean(apart):+.2f}",
                f"{sum(inside)}/{last}",
            ]
        )
    if not rows:
        return None
    text = (
        "DeepOBS's own tuned SGD, momentum and Adam (ten seeds, constant rates), and ours at the same settings. Epochs "
        "to the published target; the test accuracy at the last epoch that both have, the medians; by how many points "
        "ours is apart from theirs, mean over the second half of those epochs; and in how many epochs our median "
        "lies between the lowest and the highest of their seeds."
    )
    headings = (
        *("workload", "optimizer", "published epochs", "seeds", "our epochs", "seeds", "median"),
        *("published %", "ours %", "apart", "epochs within"),
    )
    return Section("Landing on DeepOBS's baselines", text, headings, rows)


def beside_section(analysis: Analysis, published: Published) -> Section | None:
    """Everything else: epochs to the published target, beside those of the published baselines."""
    rows = []
    for workload, name, runs in others_of(analysis, published):
        problem = published[PROBLEMS[workload]]
        known = {given: theirs["median_epochs"] for given, theirs in problem["optimizers"].items()}
        epochs = epochs_to(problem["target"], runs)
        ratio = median(epochs) / min(known.values())
        rows.append(
            [
                *(workload, name, f"{100 * problem['target']:g}"),
                *(*told(epochs), f"{ratio:.2f}" if ratio < math.inf else "missed"),
                ", ".join(f"{name} {value:g}" for name, value in known.items()),
                f"{median(len(run.rows) for run in runs):g}",
                f"{100 * median(run.best() or 0.0 for run in runs):.2f}",
                f"{100 * median(run.values(run.metric)[-1] for run in runs):.2f}",
            ]
        )
    if not rows:
        return None
    text = (
        "Epochs to the published target of what DeepOBS has no curves of; the ratio is that of their median to the "
        "fewest epochs of the published medians. An epoch does not cost the same with all: a step's seconds are below."
    )
    headings = (
        *("workload", "optimizer", "target %", "epochs", "seeds", "median", "ratio"),
        *("published epochs", "of epochs", "best %", "last %"),
    )
    return Section("Beside DeepOBS's baselines", text, headings, rows)


def landing_figure(analysis: Analysis, published: Published) -> Any:
    """Their medians and the range of their seeds with our runs, a panel an optimizer; and one for everything else."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pairs, others = pairs_of(analysis, published), others_of(analysis, published)
    workloads = list(dict.fromkeys([*(pair[0] for pair in pairs), *(other[0] for other in others)]))
    hues = colours(analysis.optimizers)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.6, 3.1 * len(workloads)), layout="constrained")
        columns = len(NAMES) + bool(others)
        grid = figure.subplots(len(workloads), columns, squeeze=False, sharex="row", sharey="row")
        for axis in grid.flat:
            axis.set_visible(False)  # until there is something to show
        for row, workload in zip(grid, workloads, strict=True):
            problem, title = published[PROBLEMS[workload]], PROBLEMS[workload]
            for _, name, theirs, runs in (pair for pair in pairs if pair[0] == workload):
                axis = row[list(NAMES).index(name)]
                shown = range(1, len(theirs["median"]))
                low, high = theirs["lowest"], theirs["highest"]
                axis.fill_between(shown, low[1:], high[1:], color="#DDDDDD", label="published, ten seeds")
                axis.plot(shown, theirs["median"][1:], color="#999999", linewidth=1.0, label="published, median")
                draw_runs(axis, runs, "ours", OURS)
                margin = 0.1 * (max(high) - min(low[3:]))
                axis.set(xlim=(0, len(shown)), ylim=(min(low[3:]) - margin, max(high) + margin))
                finish(axis, problem, f"{title}: {NAMES[name]}")
            for _, name, runs in (other for other in others if other[0] == workload):
                axis = row[-1]
                if not axis.get_visible():
                    for theirs in problem["optimizers"].values():
                        axis.plot(range(1, len(theirs["median"])), theirs["median"][1:], color="#BBBBBB", linewidth=1.0)
                    finish(axis, problem, f"{title}: others")
                draw_runs(axis, runs, name, hues[name])
                axis.legend(loc="lower right")
            row[0].set_ylabel("test accuracy")
        next(axis for axis in grid.flat if axis.get_visible()).legend(loc="lower right")
    return figure


def draw_runs(axis: Any, runs: Sequence[Outcome], name: str, colour: str) -> None:
    for i, run in enumerate(runs):
        values = run.values(run.metric)
        label = name if i == 0 else None
        axis.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.2, label=label)


def finish(axis: Any, problem: dict[str, Any], title: str) -> None:
    axis.set_visible(True)
    axis.axhline(problem["target"], color="#BBBBBB", linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel="epochs")


def pairs_of(analysis: Analysis, published: Published) -> list[Pair]:
    """What can be compared: runs at the published setting."""
    found: list[Pair] = []
    for workload, problem in PROBLEMS.items():
        curves = published.get(problem, {}).get("optimizers", {})
        for own, theirs in ((own, curves[name]) for own, name in NAMES.items() if name in curves):
            runs = [o for o in runs_of(analysis, workload) if o.optimizer == own and o.rows and at(theirs, o)]
            if runs:
                found.append((workload, own, theirs, runs))
    return found


def others_of(analysis: Analysis, published: Published) -> list[tuple[str, str, list[Outcome]]]:
    """What is at no published setting, with more than an epoch."""
    landed = {(workload, name) for workload, name, *_ in pairs_of(analysis, published)}
    found = []
    for workload in (w for w, problem in PROBLEMS.items() if published.get(problem, {}).get("optimizers")):
        runs = [o for o in runs_of(analysis, workload) if len(o.rows) > 1]
        for name in (name for name in analysis.optimizers if (workload, name) not in landed):
            if own := [o for o in runs if o.optimizer == name]:
                found.append((workload, name, own))
    return found


def epochs_to(target: float, runs: Sequence[Outcome]) -> list[float]:
    return [run.time_to(target, "step") / run.rows[0]["step"] for run in runs]  # evaluated once an epoch


def told(epochs: Sequence[float]) -> list[str]:
    """Of each seed, how many reached it, and the median.

    >>> told([3.0, math.inf, 2.0])
    ['3, missed, 2', '2/3', '3']
    """
    names = ["missed" if e == math.inf else f"{e:g}" for e in [*epochs, median(epochs)]]
    return [", ".join(names[:-1]), f"{sum(e < math.inf for e in epochs)}/{len(epochs)}", names[-1]]


def at(theirs: dict[str, Any], run: Outcome) -> bool:
    """Whether a run has the published settings and no others."""
    known = {"lr": theirs["learning_rate"]} | ({"momentum": theirs["momentum"]} if theirs["momentum"] else {})
    given = {key: value for key, value in run.trial["settings"].items() if (key, value) not in PLAIN}
    return given.keys() == known.keys() and all(math.isclose(given[key], known[key], rel_tol=1e-4) for key in known)
