"""The report: one HTML file with its figures inside, to be sent to a colleague as it is."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from .config import CompareConfig
from .plots import colour, draw_figures
from .records import RunRecord, write_atomically
from .summary import Summary, names_of, summarise, table

FIGURES = {
    "loss": (
        "Training loss",
        "Line: median over the seeds; band: lowest to highest. Loss of the batches, smoothed over neighbouring points.",
    ),
    "accuracy": (
        "Test accuracy",
        "Line: median over the seeds; band: lowest to highest. The axis shows the upper end only.",
    ),
    "rmse": ("Test error", "Line: median over the seeds; band: lowest to highest. In the units of the targets."),
    "cost": (
        "Time of a step",
        "Forward, backward and optimizer, as the loop sees them; median over the seeds. The mean holds the steps that "
        "refresh curvature, which the median hides.",
    ),
}


def write_report(config: CompareConfig, records: Sequence[RunRecord]) -> None:
    """Write the figures as PNG files and report.html, which holds them, into the folder."""
    figures = {name: png(figure) for name, figure in draw_figures(records, config.target).items()}
    for name, content in figures.items():
        (config.out / f"{name}.png").write_bytes(content)
    write_atomically(config.out / "report.html", render(config, records, figures))


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def render(config: CompareConfig, records: Sequence[RunRecord], figures: dict[str, bytes]) -> str:
    from jinja2 import Environment

    template = (files(__package__) / "report.html").read_text("utf-8")
    rows = summarise(records, config.target)
    headings, cells = table(rows, config.target)
    first = {name: next(r for r in records if r.optimizer == name) for name in names_of(records)}
    context = {
        "title": f"{len(rows)} optimizers on {first[rows[0].optimizer].config['data']}" if rows else "No runs",
        "lead": lead(config, records),
        "troubles": [f"{r.optimizer}, seed {r.seed}, {r.status}: {r.message}" for r in records if r.message],
        "headings": headings,
        "rows": [{**row_context(s, first[s.optimizer]), "cells": c} for s, c in zip(rows, cells, strict=True)],
        "memory": "process peak, MB" if not records or records[0].config["device"] == "cpu" else "GPU peak, MB",
        "given": any(record.given for record in records),
        "caveat": caveat(config, records),
        "figures": [
            {"title": FIGURES[name][0], "caption": FIGURES[name][1], "data": base64.b64encode(content).decode()}
            for name, content in figures.items()
        ],
        "coverage": [(name, record.coverage) for name, record in first.items() if record.coverage],
        "job": job_rows(config, records),
    }
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(context)


def lead(config: CompareConfig, records: Sequence[RunRecord]) -> str:
    seeds = len({record.seed for record in records})
    return (
        f"The same {config.model}, from the same initial weights and on the same batches, trained for {config.epochs} "
        f"epochs by each optimizer; {seeds} seed{'s' * (seeds != 1)}."
    )


def caveat(config: CompareConfig, records: Sequence[RunRecord]) -> str:
    settings = "Some settings were given by hand (bold below), the others are defaults that were not tuned in this job"
    if not any(record.given for record in records):
        settings = "All settings are defaults, not tuned in this job"
    parts = [
        f"How to read this. {settings}, and a tuned comparison may rank them otherwise. Seconds are those of the "
        "machine named below and hold no evaluation or logging. A gradient is one forward and backward pass that the "
        "loop or closure made; further passes inside an optimizer show in its seconds only."
    ]
    if records and records[0].config["data"] == "digits":
        parts.append("The defaults were tried on these digits while they were chosen: this is no independent test.")
    if records and records[0].metric == "accuracy":
        tests = records[0].config["samples"][1]
        parts.append(
            f"One of the {tests} test samples is {100 / tests:.2g} points of accuracy; ± is the standard deviation "
            "over the seeds."
        )
    return " ".join(parts)


def row_context(summary: Summary, record: RunRecord) -> dict[str, Any]:
    built = {key: value for key, value in (record.settings or record.given).items() if value is not False}
    return {
        "name": summary.optimizer,
        "colour": colour(summary.optimizer),
        "settings": [(key, value, key in record.given) for key, value in built.items()],
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
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    dates = sorted(record.environment["date"] for record in records)
    return [
        ("data", f"{job['data']}: {train} samples to train on, {test} to test; each of shape {tuple(job['shape'])}"),
        ("model", f"{job['model']}, {records[0].parameters} parameters"),
        ("training", f"{job['epochs']} epochs, batches of {job['batch_size']}, learning rate {job['lr_schedule']}"),
        ("order", "seed by seed, and within a seed one optimizer after the other"),
        ("machine", f"{machine['processor']}, {threads}, {machine['system']}"),
        ("device", f"{machine['device']}; TF32 {machine['tf32']}, cuDNN benchmark {machine['cudnn_benchmark']}"),
        ("versions", f"grng {machine['grng']}, torch {machine['torch']}, Python {machine['python']}"),
        ("date", f"{dates[0]} to {dates[-1]}"),
    ]
