"""The report: one HTML file with its figures inside, to be sent to a colleague as it is."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import pages
from .config import CompareConfig
from .names import flat
from .plots import colours, draw_figures
from .records import RunRecord, write_atomically
from .summary import Summary, names_of, summarise, table
from .tuning import BEST, best_of, describe_points

DRAWN = 12  # more curves cannot be told apart

FIGURES = {
    "loss": (
        "Training loss",
        "Line: median over the seeds; band: lowest to highest. Loss of the batches, smoothed over neighbouring points.",
    ),
    "accuracy": (
        "Accuracy",
        "Line: median over the seeds; band: lowest to highest. The axis shows the upper end only.",
    ),
    "rmse": ("Error", "Line: median over the seeds; band: lowest to highest. In the units of the targets."),
    "cost": (
        "Time of a step",
        "Forward, backward and optimizer, as the loop sees them; median over the seeds. The mean holds the steps that "
        "refresh curvature, which the median hides.",
    ),
}


def write_report(config: CompareConfig, records: Sequence[RunRecord]) -> None:
    """Write the figures as PNG files and report.html, which holds them, into the folder."""
    shown = drawn(summarise(records, config.target))
    of_shown = [record for record in records if record.optimizer in shown]
    figures = {name: png(figure) for name, figure in draw_figures(of_shown, config.target).items()}
    for name, content in figures.items():
        (config.out / f"{name}.png").write_bytes(content)
    write_atomically(config.out / "report.html", render(config, records, figures))


def drawn(rows: Sequence[Summary]) -> list[str]:
    """The names that the figures show: all, or the best where those are too many."""
    if len(rows) > DRAWN:
        scored = [(row.mean, i) for i, row in enumerate(rows) if row.mean is not None]
        best = sorted(scored, reverse=rows[0].metric == "accuracy")[:DRAWN]
        rows = [rows[i] for i in sorted(i for _, i in best)]
    return [row.optimizer for row in rows]


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def render(config: CompareConfig, records: Sequence[RunRecord], figures: dict[str, bytes]) -> str:
    rows = summarise(records, config.target)
    headings, cells = table(rows, config.target)
    shown = drawn(rows)
    hues, few = colours(shown), f" The {len(shown)} best of {len(rows)}." * (len(shown) < len(rows))
    first = {name: next(r for r in records if r.optimizer == name) for name in names_of(records)}
    context = {
        "title": title(rows, records),
        "lead": lead(config, records),
        "troubles": [f"{r.optimizer}, seed {r.seed}, {r.status}: {r.message}" for r in records if r.message],
        "headings": headings,
        "rows": [{**row_context(s, first[s.optimizer], hues), "cells": c} for s, c in zip(rows, cells, strict=True)],
        "memory": "process peak, MB" if not records or records[0].config["device"] == "cpu" else "GPU peak, MB",
        "given": any(record.given for record in records),
        "caveat": caveat(config, records),
        "figures": [
            {"title": FIGURES[name][0], "caption": FIGURES[name][1] + few, "data": base64.b64encode(content).decode()}
            for name, content in figures.items()
        ],
        "coverage": [(name, record.coverage) for name, record in first.items() if record.coverage],
        "job": job_rows(config, records),
    }
    return pages.render("compare", **context)


def title(rows: Sequence[Summary], records: Sequence[RunRecord]) -> str:
    if not rows:
        return "No runs"
    head = f"{len(rows)} optimizers on {records[0].config['data']}"
    return head + ", validation scores" * (records[0].scored_on == "validation")


def lead(config: CompareConfig, records: Sequence[RunRecord]) -> str:
    seeds = len({record.seed for record in records})
    scored = (
        " Validation scores: of a tenth of the training set that was held out. The test set was not looked at."
        if config.validation
        else ""
    )
    return (
        f"The same {config.model}, from the same initial weights and on the same batches, trained for {config.epochs} "
        f"epochs by each optimizer; {seeds} seed{'s' * (seeds != 1)}.{scored}"
    )


def caveat(config: CompareConfig, records: Sequence[RunRecord]) -> str:
    settings = "Some settings were given by hand (bold below), the others are defaults that were not tuned in this job"
    if not any(record.given for record in records):
        settings = "All settings are defaults, not tuned in this job"
    elif config.settings_from:
        source = "/".join(Path(config.settings_from).parts[-2:])  # the rest of the path is of this machine
        settings = f"Settings in bold were given by hand or by {source}, the others are defaults"
    elif config.grid:
        settings = "The settings in bold are the points of a grid or were given by hand, the others are defaults"
    parts = [
        f"How to read this. {settings}, and a tuned comparison may rank them otherwise. Seconds are those of the "
        "machine named below and hold no evaluation or logging. A gradient is one forward and backward pass that the "
        "loop or closure made; a product with the Hessian that an optimizer reports counts as two; further passes "
        "inside an optimizer show in its seconds only."
    ]
    if config.grid:
        parts.append(
            "The best point of a grid is ahead by luck too: score it anew, on the test set and more seeds."
            if config.validation
            else "The best point of a grid was chosen by the test scores shown, which flatter it: prefer --validation."
        )
    if records and records[0].config["data"] == "digits":
        parts.append("The defaults were tried on these digits while they were chosen: this is no independent test.")
    if records and records[0].metric == "accuracy":
        count, scored_on = records[0].config["samples"][1], records[0].scored_on
        parts.append(
            f"One of the {count} {scored_on} samples is {100 / count:.2g} points of accuracy; ± is the standard "
            "deviation over the seeds."
        )
    return " ".join(parts)


def row_context(summary: Summary, record: RunRecord, hues: dict[str, str]) -> dict[str, Any]:
    built, given = flat(record.settings or record.given), flat(record.given)
    return {
        "name": summary.optimizer,
        "colour": hues.get(summary.optimizer, "transparent"),
        "settings": [(key, value, key in given) for key, value in built.items() if value is not False or key in given],
        "state": megabytes(summary.state_bytes),
        "memory": megabytes(summary.peak_memory),
    }


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:.0f}"


def job_rows(config: CompareConfig, records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    if not records:
        return []
    job, machine = records[0].config, records[0].environment
    train, test = job["samples"]
    scored = "held out for validation, none of the test set" if config.validation else "to test"
    grids = [
        describe_points(name, points, best_of(points, records, config.seeds)) for name, points in config.points.items()
    ]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    rate = job["lr_schedule"]
    if job["lr_warmup_epochs"]:
        rate = f"rising for {job['lr_warmup_epochs']:g} epochs, then {rate}"
    dates = sorted(record.environment["date"] for record in records)
    return [
        ("data", f"{job['data']}: {train} samples to train on, {test} {scored}; each of shape {tuple(job['shape'])}"),
        ("model", f"{job['model']}, {records[0].parameters} parameters"),
        ("training", f"{job['epochs']} epochs, batches of {job['batch_size']}, learning rate {rate}"),
        *([("grid", f"{'; '.join(grids)} ({BEST})")] if grids else []),
        ("order", "seed by seed, and within a seed one optimizer after the other"),
        ("machine", f"{machine['processor']}, {threads}, {machine['system']}"),
        ("device", f"{machine['device']}; TF32 {machine['tf32']}, cuDNN benchmark {machine['cudnn_benchmark']}"),
        ("versions", f"grng {machine['grng']}, torch {machine['torch']}, Python {machine['python']}"),
        ("date", f"{dates[0]} to {dates[-1]}"),
    ]
