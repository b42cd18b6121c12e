"""The runs of each optimizer in one row: what the terminal, the report and results.json show."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from .names import optimizer_of, ordered
from .records import RunRecord, epochs_to
from .statistics import present

REFERENCE = "adamw"


@dataclass
class Summary:
    """One optimizer over its seeds. A failed run enters no mean; a diverged one enters with what it had reached.

    worst             the lowest accuracy, or the highest RMSE
    step_seconds      median over the runs of the mean time of a step, which holds the amortised refreshes
    step_ratio        the same, relative to adamw; None without it
    epochs_to_target  median over the runs, a miss counting as infinite; None if that is the median
    """

    optimizer: str
    runs: int
    failed: int
    diverged: int
    metric: str
    scored_on: str = "test"
    mean: float | None = None
    deviation: float | None = None
    worst: float | None = None
    train_loss: float | None = None
    step_seconds: float | None = None
    step_ratio: float | None = None
    seconds: float | None = None
    gradient_evaluations: int | None = None
    gradients_per_step: float | None = None
    epochs_to_target: float | None = None
    reached: int = 0
    peak_memory: int | None = None
    state_bytes: int | None = None


def summarise(records: Sequence[RunRecord], target: float) -> list[Summary]:
    """One row a name, in the order of the table of optimizers."""
    rows = [summarise_one([r for r in records if r.optimizer == name], target) for name in names_of(records)]
    reference = next((row.step_seconds for row in rows if optimizer_of(row.optimizer) == REFERENCE), None)
    for row in rows:
        if reference and row.step_seconds:
            row.step_ratio = row.step_seconds / reference
    return rows


def names_of(records: Sequence[RunRecord]) -> list[str]:
    return ordered(record.optimizer for record in records)


def summarise_one(records: Sequence[RunRecord], target: float) -> Summary:
    usable = [r for r in records if r.status != "failed"]
    row = Summary(
        optimizer=records[0].optimizer,
        runs=len(records),
        failed=len(records) - len(usable),
        diverged=sum(r.status == "diverged" for r in records),
        metric=records[0].metric,
        scored_on=records[0].scored_on,
    )
    metrics = present(r.test_metric for r in usable)
    if metrics:
        row.mean, row.worst = fmean(metrics), (min if row.metric == "accuracy" else max)(metrics)
        row.deviation = stdev(metrics) if len(metrics) > 1 else None
    if usable:
        losses = present(r.train_loss for r in usable)
        row.train_loss = fmean(losses) if len(losses) == len(usable) else None
        row.step_seconds = median(r.step_seconds["mean"] for r in usable)
        row.seconds = median(r.seconds for r in usable)
        row.gradient_evaluations = round(median(r.gradient_evaluations for r in usable))
        row.gradients_per_step = median(r.gradient_evaluations / max(r.steps, 1) for r in usable)
        row.peak_memory = max(present(r.peak_memory for r in usable), default=None)
        row.state_bytes = max(r.state_bytes for r in usable)
        reached = [epochs_to(r, target) for r in usable]
        row.reached = len(present(reached))
        middle = median(float("inf") if epoch is None else epoch for epoch in reached)
        row.epochs_to_target = None if middle == float("inf") else middle
    return row


def score(value: float | None, metric: str) -> str:
    """A metric for people: percent for accuracy, four digits for an RMSE."""
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.4g}"


HEADINGS = (
    "optimizer",
    "{scored_on} {metric}",
    "worst seed",
    "train loss",
    "ms/step",
    "× adamw",
    "seconds",
    "gradients/step",
    "epochs to {target}",
    "trouble",
)


def table(rows: Sequence[Summary], target: float) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the summary as text."""
    what = {"metric": rows[0].metric, "scored_on": rows[0].scored_on} if rows else {"metric": "", "scored_on": "test"}
    headings = [heading.format(**what, target=f"{100 * target:g}%") for heading in HEADINGS]
    return headings, [cells(row) for row in rows]


def markdown(rows: Sequence[Summary], target: float) -> str:
    """The summary as a table for a page of documentation."""
    headings, body = table(rows, target)
    lines = [headings, ["---"] * len(headings), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Summary) -> list[str]:
    usable = row.runs - row.failed
    spread = "" if row.deviation is None else f" ± {score(row.deviation, row.metric)}"
    goal = "–"
    if row.metric == "accuracy" and usable:
        goal = "missed" if row.epochs_to_target is None else f"{row.epochs_to_target:g}"
        goal += "" if row.reached == usable else f" ({row.reached}/{usable})"
    trouble = [f"{row.failed} failed"] * bool(row.failed) + [f"{row.diverged} diverged"] * bool(row.diverged)
    return [
        row.optimizer,
        f"{score(row.mean, row.metric)}{spread}".replace(" % ± ", " ± "),
        score(row.worst, row.metric),
        number(row.train_loss, ".3g"),
        number(row.step_seconds and 1000 * row.step_seconds, ".2f"),
        number(row.step_ratio, ".1f"),
        number(row.seconds, ".1f"),
        number(row.gradients_per_step, ".3g"),
        goal,
        ", ".join(trouble) or "none",
    ]


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
