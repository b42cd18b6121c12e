"""Our SGD, momentum and Adam on DeepOBS's problems beside its published curves: they have to land on them before
anything else is compared there."""

import math
from statistics import fmean, median
from typing import Any

from ..plots import STYLE
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
        epochs = [run.time_to(target, "step") / run.rows[0]["step"] for run in runs]  # evaluated once an epoch
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
                ", ".join("missed" if e == math.inf else f"{e:g}" for e in epochs),
                f"{sum(e < math.inf for e in epochs)}/{len(epochs)}",
                f"{median(epochs):g}" if median(epochs) < math.inf else "missed",
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
    return Section("Landing on DeepOBS's baselines", text, headings, rows, ["landing"])


def landing_figure(analysis: Analysis, published: Published) -> Any:
    """Their medians and the range of their seeds, and our runs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pairs = pairs_of(analysis, published)
    workloads = list(dict.fromkeys(workload for workload, *_ in pairs))
    with rc_context(STYLE):
        figure = Figure(figsize=(10.6, 3.1 * len(workloads)), layout="constrained")
        grid = figure.subplots(len(workloads), len(NAMES), squeeze=False, sharex="row", sharey="row")
        for axis in grid.flat:
            axis.set_visible(False)  # until there is something to show
        for workload, name, theirs, runs in pairs:
            axis = grid[workloads.index(workload)][list(NAMES).index(name)]
            axis.set_visible(True)
            shown = range(1, len(theirs["median"]))
            axis.fill_between(
                shown, theirs["lowest"][1:], theirs["highest"][1:], color="#DDDDDD", label="published, ten seeds"
            )
            axis.plot(shown, theirs["median"][1:], color="#999999", linewidth=1.0, label="published, median")
            for i, run in enumerate(runs):
                values = run.values(run.metric)
                axis.plot(range(1, len(values) + 1), values, color=OURS, linewidth=1.2, label="ours" if not i else None)
            axis.axhline(published[PROBLEMS[workload]]["target"], color="#BBBBBB", linewidth=0.8, linestyle=":")
            axis.set(title=f"{PROBLEMS[workload]}: {NAMES[name]}", xlabel="epochs", xlim=(0, len(shown)))
            low, high = min(theirs["lowest"][3:]), max(theirs["highest"])
            axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        for row in grid:
            row[0].set_ylabel("test accuracy")
        next(axis for axis in grid.flat if axis.get_visible()).legend(loc="lower right")
    return figure


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


def at(theirs: dict[str, Any], run: Outcome) -> bool:
    """Whether a run has the published settings and no others."""
    known = {"lr": theirs["learning_rate"]} | ({"momentum": theirs["momentum"]} if theirs["momentum"] else {})
    given = {key: value for key, value in run.trial["settings"].items() if (key, value) not in PLAIN}
    return given.keys() == known.keys() and all(math.isclose(given[key], known[key], rel_tol=1e-4) for key in known)
