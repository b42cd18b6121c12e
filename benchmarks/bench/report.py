"""The report: the same sections as one HTML file that can be sent, and as a page of Markdown."""

import base64
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import pages
from ..errors import InputError
from ..records import write_atomically
from .analysis import Analysis, analyse, searched
from .figures import CLOCKS, draw_figures
from .landing import Published, beside_section, landing_figure, landing_section
from .section import Section
from .sections import sections
from .store import Store
from .targets import Target, read_targets
from .trial import Outcome

PAGE = "results.md"


def write_report(
    store: Store,
    clock: str,
    page: Path | None = None,
    targets: dict[str, Target] | None = None,
    published: Published | None = None,
) -> list[Path]:
    """Write tables, figures, report.html and results.md into the folder; and the page elsewhere too, where asked for.
    `published` are DeepOBS's curves, to be compared with.

    Raises:
        InputError: the folder holds no runs.
    """
    outcomes = store.outcomes() if store.out.is_dir() else []
    if not outcomes:
        raise InputError(f"{store.out} holds no runs: make some with grng bench tune or grng bench run")
    if clock not in CLOCKS:
        raise InputError(f"unknown clock {clock!r}: choose one of {', '.join(CLOCKS)}")
    goals = read_targets() if targets is None else targets
    store.write_tables(outcomes, goals)
    analysis = analyse(outcomes, goals, clock)
    figures = draw_figures(analysis)
    known = published or {}
    deepobs = [part for part in (landing_section(analysis, known), beside_section(analysis, known)) if part]
    if deepobs:
        deepobs[-1].figures = ["landing"]
        figures["landing"] = landing_figure(analysis, known)
    drawn = {name: png(figure) for name, figure in figures.items()}
    folder = store.out / "figures"
    folder.mkdir(exist_ok=True)
    for name, content in drawn.items():
        (folder / f"{slug(name)}.png").write_bytes(content)
    parts, about = sections(analysis, list(drawn)), lead(analysis)
    parts[:0] = deepobs
    html = store.out / "report.html"
    write_atomically(html, render(parts, drawn, about))
    written = [html, store.out / PAGE]
    write_atomically(written[-1], markdown(parts, "figures", about))
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, markdown(parts, Path(os.path.relpath(folder, page.parent)).as_posix(), about))
        written.append(page)
    return written


def lead(analysis: Analysis) -> str:
    """What was run, on what; and what does not compare, because it was run on several machines or data."""
    runs = [o for o in analysis.outcomes if o.trial["phase"] == "run"]
    trials = searched(analysis.outcomes)
    seeds = len({o.seed for o in runs})
    made_on: dict[str, set[str]] = {}
    for o in analysis.outcomes:
        made_on.setdefault(machine(o.environment), set()).add(o.workload)
    places = list(made_on) if len(made_on) == 1 else [f"{m} ({', '.join(sorted(w))})" for m, w in made_on.items()]
    mixed = of_several(analysis.outcomes, lambda o: machine(o.environment))
    changed = of_several(analysis.outcomes, lambda o: o.data)
    uneven = of_several(analysis.outcomes, lambda o: (o.trial["budget"], o.trial["lr_warmup"]))
    budgets = {o.trial["budget"] for o in analysis.outcomes}
    trials_of = Counter((o.workload, o.optimizer) for o in trials)
    unequal = of_several(trials, lambda o: trials_of[o.workload, o.optimizer])
    sources = {source for o in analysis.outcomes if (source := o.environment.get("source"))}
    unknown = sum(not o.environment.get("source") for o in analysis.outcomes)
    files = {(o.optimizer, o.environment["own_source"]) for o in analysis.outcomes if "own_source" in o.environment}
    edited = sorted(name for name, count in Counter(name for name, _ in files).items() if count > 1)
    return (
        f"{len({o.workload for o in analysis.outcomes})} workloads, {len(analysis.optimizers)} optimizers: "
        f"{len(trials)} trials of the search and {len(runs)} runs on up to {seeds} paired seeds. "
        f"Time is measured in {CLOCKS[analysis.clock]}; {'; '.join(places)}."
        + f" Runs are of {' or '.join(f'{b:g}' for b in sorted(budgets))} times the full length." * (budgets != {1.0})
        + f" Made at different lengths, so that they do not compare: {', '.join(uneven)}." * bool(uneven)
        + f" Searched by different numbers of trials: {', '.join(unequal)}." * bool(unequal)
        + f" Made on several machines or with several versions, so that times do not compare: {', '.join(mixed)}."
        * bool(mixed)
        + f" Made with data that changed in between: {', '.join(changed)}." * bool(changed)
        + f" Made by {len(sources)} states of the code of optimizers and workloads." * (len(sources) > 1)
        + f" {unknown} do not say by which state of the code: they need not come out again." * bool(unknown)
        + f" Made by files that were edited in between: {', '.join(edited)}." * bool(edited)
    )


def of_several(outcomes: Iterable[Outcome], kind: Callable[[Outcome], Any]) -> list[str]:
    """The workloads whose outcomes are of several kinds."""
    kinds: dict[str, set[Any]] = {}
    for o in outcomes:
        kinds.setdefault(o.workload, set()).add(kind(o))
    return [workload for workload, found in kinds.items() if len(found) > 1]


def machine(about: Mapping[str, Any]) -> str:
    """What seconds depend on, of the environment of a run."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("grng", "torch") if name in about)
    return f"{versions}, {about.get('processor', '')}, {about.get('device')}, {about.get('threads')} thread(s)"


def slug(name: str) -> str:
    """A name as part of a file's name and of a link.

    >>> slug("curves-timm:a/b")
    'curves-timm-a-b'
    """
    return re.sub(r"[^\w.-]+", "-", name)


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def markdown(parts: Sequence[Section], folder: str, about: str) -> str:
    """The sections as a page."""
    lines = ["# Benchmark results", "", about, ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        if part.text:
            lines += [part.text, ""]
        if part.rows:
            lines += [f"| {' | '.join(row)} |" for row in (part.headings, ["---"] * len(part.headings), *part.rows)]
            lines += [""]
        for name in part.figures:
            lines += [f"![{name}]({folder}/{slug(name)}.png)", ""]
    return "\n".join(lines)


def render(parts: Sequence[Section], drawn: dict[str, bytes], about: str) -> str:
    pictures = {name: base64.b64encode(content).decode() for name, content in drawn.items()}
    return pages.render("bench", title="Benchmark results", lead=about, parts=parts, pictures=pictures)
