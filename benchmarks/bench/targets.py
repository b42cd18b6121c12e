"""The frozen targets: set by tuned rivals before any of our own methods has run, and then left alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import InputError
from ..records import storable, write_atomically
from ..statistics import DIGITS
from .trial import Outcome

FILE = "targets.json"


@dataclass(frozen=True)
class Target:
    """A workload's target and where it comes from.

    Attributes:
        value, metric, goal: what is to be reached.
        optimizer, settings: of the best of the rivals' trials.
        trials: of each rival.
        seeds: of the winner's reruns; the value is the median over them of the best value of each.
        source: in words.
    """

    workload: str
    value: float
    metric: str
    goal: str
    optimizer: str
    settings: dict[str, Any]
    trials: int
    seeds: int
    source: str


def read_targets(path: Path | None = None) -> dict[str, Target]:
    """The targets in a file; None: those of the package."""
    try:
        text = path.read_text("utf-8") if path else (files(__package__) / FILE).read_text("utf-8")
        return {name: Target(**content) for name, content in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path or FILE} holds no targets ({error}): make them with grng bench targets") from error


def all_targets(path: Path | None) -> dict[str, Target]:
    """Those of the package, and before them those in a file of one's own."""
    return read_targets() | (read_targets(path) if path else {})


def write_targets(path: Path, targets: dict[str, Target]) -> None:
    """Write the targets, in the order of their names."""
    content = {name: asdict(targets[name]) for name in sorted(targets)}
    write_atomically(path, json.dumps(storable(content), indent=1) + "\n")


def best_trial(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The trial with the best value of the metric."""
    scored = [(value, o) for o in outcomes if o.status != "failed" and (value := o.best()) is not None]
    if not scored:
        return None
    return (max if scored[0][1].goal == "max" else min)(scored, key=lambda pair: pair[0])[1]


def target_of(winner: Outcome, reruns: Sequence[Outcome], trials: int) -> Target:
    """The median of the reruns' best values; a rerun without any counts as the worst."""
    worst = float("-inf") if winner.goal == "max" else float("inf")
    values = [worst if (value := o.best()) is None else value for o in reruns]
    return Target(
        winner.workload,
        float(f"{median(values):.{DIGITS}g}"),
        winner.metric,
        winner.goal,
        winner.optimizer,
        dict(winner.trial["settings"]),
        trials,
        len(reruns),
        "median over the seeds of the best validation value of the best of the tuned rivals",
    )
