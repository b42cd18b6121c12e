"""The sections of a report: what is said, and the tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..names import flat
from .analysis import Analysis, Comparison, Line, iqm_of, is_ours
from .budget import budget_section
from .figures import CLOCKS
from .protocol import TARGET_STUDY
from .section import Section
from .spaces import OURS
from .targets import Target


def sections(analysis: Analysis, drawn: Sequence[str]) -> list[Section]:
    """Everything that is to be shown."""
    found: list[Section | None] = [
        score_section(analysis, drawn),
        ours_section(analysis),
        rivals_section(analysis),
        ends_section(analysis),
        twins_section(analysis),
        overview_section(analysis),
    ]
    for workload in analysis.workloads:
        found.append(workload_section(analysis, workload, drawn))
    found += [
        budget_section(analysis, drawn),
        cost_section(analysis),
        settings_section(analysis),
        diagnosis_section(analysis),
        targets_section(analysis),
    ]
    return [part for part in found if part is not None and (part.rows or part.figures)]


def score_section(analysis: Analysis, drawn: Sequence[str]) -> Section:
    runs, tuned = analysis.run_scores(), analysis.tuned_scores()
    times = analysis.times()
    fastest = {w: min(row.values()) for w, row in times.items() if any(t < math.inf for t in row.values())}
    promised, kept = selection(analysis)
    rows = []
    for name in dict.fromkeys((*runs, *tuned)):
        lines = [line for line in analysis.lines if line.optimizer == name]
        own = [line for line in lines if line.workload in fastest and name in runs]
        reached = [line for line in own if line.time < math.inf]
        rows.append(
            [
                name,
                number(runs.get(name), ".3f"),
                number(tuned.get(name), ".3f"),
                number(iqm_of(own, fastest) if own else None, ".2f"),
                f"{len(reached)}/{len(times)}" if own else "–",
                str(sum(sum(line.trouble.values()) for line in lines)),
            ]
        )
    text = (
        "The score is AlgoPerf's: the area under the performance profile from 1 to 4 times the fastest, so that 1 is "
        "the fastest everywhere and 0 never within four times of it. Once of the median times of the seeds at the best "
        "setting, once of the search itself (median over the studies of each one's fastest trial). The best setting is "
        "that of the best single run of the search, and luck has a part in it: "
        f"{promised} of them reached the target there, and {kept} of these with at least half of the seeds. IQM: "
        "interquartile mean, over workloads and seeds, of the time over the workload's fastest median; a miss counts "
        "as 4, and each workload as much as another. A workload whose target nobody reached, with half of the seeds or "
        f"of the studies ({missed(times)} in the runs, {missed(analysis.tuned)} in the search), is 0 for everybody in "
        "the score and left out of the IQM."
    )
    headings = ("optimizer", "score, runs", "score, search", "IQM of times", "targets reached", "diverged or failed")
    return Section("Scores", text, headings, rows, [f for f in ("profile", "times") if f in drawn])


def missed(times: Mapping[str, Mapping[str, float]]) -> int:
    """Workloads whose target nobody reached."""
    return sum(min(row.values(), default=math.inf) == math.inf for row in times.values())


def selection(analysis: Analysis) -> tuple[int, int]:
    """How many best settings reached the target in the search, and how many of them with half of the seeds."""
    found = {
        (o.workload, o.optimizer)
        for o in analysis.outcomes
        if o.trial["phase"] == "tune"
        and o.trial["study"] != TARGET_STUDY
        and o.workload in analysis.targets
        and o.time_to(analysis.targets[o.workload].value, "step") < math.inf
    }
    promised = [line for line in analysis.lines if (line.workload, line.optimizer) in found]
    return len(promised), sum(2 * line.reached >= len(line.times) for line in promised)


def ours_section(analysis: Analysis) -> Section:
    pairs = analysis.against_rivals()
    known = [c.ratio.median for c in pairs if c.ratio]
    faster = sum(r <= 0.6 for r in known)
    slower = sum(r > 1 for r in known)
    shown = sum(c.ratio.differs for c in pairs if c.ratio)
    text = (
        f"The fastest of {', '.join(OURS)} against the fastest rival, paired by seed: the median ratio of times to "
        f"target with its 95 % bootstrap interval; below 1 ours is faster. At most 0.6 on {faster} of {len(pairs)} "
        f"workloads, above 1 on {slower}; a difference is shown on {shown}."
    )
    return Section("Ours against the best rival", text, PAIR_HEADINGS, [pair_row(c) for c in pairs])


def rivals_section(analysis: Analysis) -> Section:
    text = (
        "On how many workloads ours is ahead of each rival: by the median time to the target, and where both missed it "
        "by the mean best value. A count, without a test of significance. OPTIMIZER/target is the rival that set the "
        "target, at the setting it set it with: found by more trials at the full length, so that it is in no score."
    )
    rows = []
    for own in (name for name in analysis.optimizers if is_ours(name)):
        counts = [analysis.ahead(own, rival) for rival in analysis.rivals]
        if any(of for _, of in counts):
            rows.append([own, *(f"{won}/{of}" if of else "–" for won, of in counts)])
    return Section("Ours against each rival", text, ("ahead on", *analysis.rivals), rows)


def ends_section(analysis: Analysis) -> Section | None:
    if all(end == -math.inf for line in analysis.lines for end in line.ends.values()):
        return None
    text = (
        "On how many workloads ours ends ahead of each rival: by the median over the seeds of the paired difference of "
        "the test's value, at the settings and lengths that were chosen, for speed or for the best value. +: on how "
        "many of them that is shown by a 95 % bootstrap interval over at least six seeds; −: on how many it is shown "
        "to be behind. A run that came to no value is behind all that did."
    )
    rows = []
    for own in (name for name in analysis.optimizers if is_ours(name)):
        counts = [analysis.in_the_end(own, rival) for rival in analysis.rivals]
        shown = (f"{won}/{of} (+{more} −{less})" if of else "–" for won, of, more, less in counts)
        rows.append([own, *shown])
    return Section("Who is ahead in the end", text, ("ahead on", *analysis.rivals), rows)


def twins_section(analysis: Analysis) -> Section:
    text = (
        "Every variant against its own case without regularization, which searched the same points: above 1 the "
        "regularization cost time. Behind it, by the median time to the target, and where both missed it by the mean "
        "best value: "
        + "; ".join(
            f"{own} on {len(lost)}" + f" ({', '.join(lost)})" * bool(lost)
            for own, lost in analysis.behind_twins().items()
        )
        + "."
    )
    rows = [pair_row(c) for c in analysis.against_twins()]
    return Section("What the regularization does", text, PAIR_HEADINGS, rows)


PAIR_HEADINGS = ("workload", "ours", "other", "ratio of times", "pairs", "both missed")


def pair_row(pair: Comparison) -> list[str]:
    if pair.ratio is None:
        return [pair.workload, pair.own, pair.other, "both missed with every seed", "0", "all"]
    ratio = pair.ratio
    return [pair.workload, pair.own, pair.other, str(ratio), str(ratio.pairs), str(ratio.undecided)]


def overview_section(analysis: Analysis) -> Section:
    """The workloads in a table, and how to read theirs."""
    text = (
        "One table each follows: medians, or means ± deviations, over the seeds; the fastest first, and those that "
        "missed the target by their best value. ≤: at the target when first evaluated. Equal time and steps: when the "
        "first run had ended; who trains longer is read before its rate has decayed. Gradients are those of the loss: "
        "the passes of a sampled Fisher, of K-FAC and of Sophia-G, are in the time alone. ECE: calibration error of 15 "
        "bins, and after temperature scaling on the validation set where that is not the test set."
    )
    rows = []
    for workload in analysis.workloads:
        lines, target = analysis.lines_of(workload), analysis.targets.get(workload)
        runs = [o for o in analysis.outcomes if o.workload == workload]
        reached = sum(line.time < math.inf for line in lines)
        rows.append(
            [
                workload,
                f"{max(o.parameters for o in runs):,}",
                goal_of(target, runs[0].metric),
                str(seeds_of(lines)),
                f"{reached}/{len(lines)}" if target else "–",
            ]
        )
    return Section("Workloads", text, ("workload", "parameters", "goal", "seeds", "at the target"), rows)


def workload_section(analysis: Analysis, workload: str, drawn: Sequence[str]) -> Section:
    lines = analysis.lines_of(workload)
    target = analysis.targets.get(workload)
    metric = next(o.metric for o in analysis.outcomes if o.workload == workload)
    unit = {"seconds": "s", "cpu_seconds": "CPU s"}.get(analysis.clock, "")
    first = f"time to target{f', {unit}' * bool(unit)}"
    headings = (
        *(
            "optimizer",
            first,
            "steps",
            "gradients",
            "reached",
            f"best {metric}",
            f"test {metric}",
            "test loss, median",
            "Brier",
            "ECE → scaled",
        ),
        *("at equal time", "at equal steps", "ms/step", "× adamw"),
    )
    rows = [
        [
            line.optimizer,
            *(time(t, line.at_once) if target else "–" for t in (line.time, line.steps_to, line.evaluations_to)),
            f"{line.reached}/{len(line.times)}" if target else "–",
            pair(line.best, line.scored, len(line.times)),
            pair(line.test, line.tested, len(line.times)),
            number(line.test_loss, ".4g"),
            number(line.brier, ".4f"),
            calibrated(line),
            number(line.equal_time, ".4g"),
            number(line.equal_steps, ".4g"),
            number(1000 * line.step["mean"] if line.step else None, ".2f"),
            number(line.step_ratio, ".1f"),
        ]
        for line in lines
    ]
    text = f"{seeds_of(lines)} seeds, {goal_of(target, metric)}."
    figures = [f for f in (f"curves-{workload}", f"sensitivity-{workload}") if f in drawn]
    return Section(workload, text, *without_empty(headings, rows), figures)


def goal_of(target: Target | None, metric: str) -> str:
    return f"target {metric} {'≥' if target.goal == 'max' else '≤'} {target.value:g}" if target else "no target"


def seeds_of(lines: Sequence[Line]) -> int:
    return max(len(line.times) for line in lines)


def without_empty(headings: Sequence[str], rows: Sequence[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that nobody has a value in.

    >>> without_empty(["name", "a", "b"], [["x", "1", "–"], ["y", "–", "–"]])
    (['name', 'a'], [['x', '1'], ['y', '–']])
    """
    kept = [i for i in range(len(headings)) if any(row[i] != "–" for row in rows)]
    return [headings[i] for i in kept], [[row[i] for i in kept] for row in rows]


def calibrated(line: Line) -> str:
    """The calibration error, and what temperature scaling makes of it."""
    known = [value for value in (line.ece, line.scaled_ece) if value is not None]
    return " → ".join(number(value, ".4f") for value in known) or "–"


def cost_section(analysis: Analysis) -> Section:
    headings = (
        "workload",
        "optimizer",
        "gradient, ms",
        "update, ms",
        "median",
        "p99",
        "state, MB",
        "peak, MB",
        "search",
    )
    rows = [
        [
            line.workload,
            line.optimizer,
            *(number(1000 * line.step[key], ".2f") for key in ("gradient", "update", "median", "p99")),
            number(line.state_bytes / 1e6, ".2f"),
            number(line.peak_memory / 1e6 if line.peak_memory else None, ".0f"),
            number(line.tuning, ".0f"),
        ]
        for line in analysis.lines
        if line.step
    ]
    text = (
        "A step in its parts: forward and backward with whatever is captured meanwhile, and the optimizer's update; "
        f"peak memory of the process or of the GPU; what the whole search took, in {CLOCKS[analysis.clock]}."
    )
    return Section("Cost", text, headings, rows)


def settings_section(analysis: Analysis) -> Section:
    rows = [
        [
            line.workload,
            line.optimizer,
            f"{line.horizon:.3g}",
            ", ".join(f"{k}={shown(v)}" for k, v in flat(line.settings).items()) or "defaults",
        ]
        for line in analysis.lines
    ]
    return Section(
        "Settings of the runs",
        "Of the search where there was one, else given or the defaults; OPTIMIZER/target: of that for the targets.",
        ("workload", "optimizer", "horizon", "settings"),
        rows,
    )


def diagnosis_section(analysis: Analysis) -> Section:
    names = ("gradient norm", "Pearson's r", "sharpness")
    rows = [
        [line.workload, line.optimizer, *(number(line.diagnosis.get(name), ".3g") for name in names)]
        for line in analysis.lines
        if line.diagnosis
    ]
    text = (
        "Diagnostics, no evidence of generalisation: the gradient's norm and the largest eigenvalue of the Hessian at "
        "the end, on one batch, and the correlation of its gradients before and after a step."
    )
    return Section("Diagnostics", text, ("workload", "optimizer", *names), rows)


def targets_section(analysis: Analysis) -> Section:
    rows = [
        [
            name,
            f"{t.metric} {t.value:g}",
            t.optimizer,
            ", ".join(f"{k}={shown(v)}" for k, v in flat(t.settings).items()),
            f"{t.trials} trials each, {t.seeds} seeds",
        ]
        for name, t in analysis.targets.items()
    ]
    text = (
        "Frozen before any of our methods ran: the best of tuned SGD with Nesterov momentum, AdamW and NAdamW, rerun; "
        "DeepOBS's are published."
    )
    return Section("Targets", text, ("workload", "target", "set by", "settings", "from"), rows)


def shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(shown, value))})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def time(value: float, bound: bool = False) -> str:
    return "missed" if value == math.inf else f"{'≤ ' * bound}{value:.4g}"


def pair(value: tuple[float, float] | None, known: int, seeds: int) -> str:
    """Mean and deviation, and of how many seeds, where some have no value."""
    return "–" if value is None else f"{value[0]:.4g} ± {value[1]:.2g}{f' ({known} of {seeds})' * (known < seeds)}"


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
