"""One run, one file: written as the run ends, read back for the tables, the figures and a resumed job."""

import csv
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .names import file_name

CURVE_POINTS = 300


@dataclass
class RunRecord:
    """What one run was and what came of it. Times in seconds, memory in bytes; what is not finite is stored as null.

    status       finished, diverged (the training loss was no longer finite; stopped there) or failed (it raised)
    key          hash of everything that decides the run; a resumed job skips the runs whose key it finds
    curve        training loss of each step, averaged down to at most 300 points, with its step and time
    epochs       one row an epoch: seconds so far, mean training loss, test loss, and the test metric
    step_seconds median, mean and p99 of one step; the mean carries the amortised refreshes that the median hides
    scored_on    whether every test metric and loss is one of the "test" set or of a held-out "validation" set
    gradient_evaluations  forward and backward passes that the loop or the closure made; a product with the Hessian that
                          the optimizer reports counts as two
    """

    key: str
    optimizer: str
    seed: int
    config: dict[str, Any]
    given: dict[str, Any]
    environment: dict[str, Any]
    status: str = "finished"
    message: str = ""
    metric: str = "accuracy"
    scored_on: str = "test"
    test_metric: float | None = None
    test_loss: float | None = None
    train_loss: float | None = None
    seconds: float = 0.0
    steps: int = 0
    gradient_evaluations: int = 0
    step_seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    peak_memory: int | None = None
    state_bytes: int = 0
    init_hash: str = ""
    batch_hash: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    coverage: str = ""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.optimizer}-seed{self.seed}"

    @property
    def file_name(self) -> str:
        return f"{file_name(self.optimizer)}-seed{self.seed}.json"


def hash_of(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_of(*tensors: Tensor) -> str:
    """A short hash of the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def made_as(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the run of a file is there; raise InputError where it was made otherwise than is asked for."""
    if not path.exists():
        return False
    found = json.loads(path.read_text("utf-8"))
    for key, value in asked.items():
        if found.get(key, value) != value:
            raise InputError(
                f"{path} was made with {key}={found[key]!r}, not {value!r}: choose another folder with --out"
            )
    return True


def storable(value: Any) -> Any:
    """`value` in what strict JSON can hold: seven digits a number, null for NaN and infinity, text for the rest."""
    if isinstance(value, Mapping):
        return {str(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def make_folder(out: Path, part: str = "") -> None:
    """Make the folder of a result, and see that it can be written to."""
    try:
        (out / part).mkdir(parents=True, exist_ok=True)
        probe = out / part / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the folder {out} ({error}): give another --out") from error


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either the old content or all of the new, whatever happens meanwhile."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_run(out: Path, record: RunRecord) -> None:
    text = json.dumps(storable(asdict(record)), allow_nan=False)
    write_atomically(out / "runs" / record.file_name, text)


def read_runs(out: Path) -> list[RunRecord]:
    """Every readable run in the folder; a file that is none counts as a run that has not been made."""
    names = {f.name for f in fields(RunRecord)}
    records = []
    for path in sorted((out / "runs").glob("*.json")):
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and names == content.keys():
            records.append(RunRecord(**content))
    return records


def downsample(values: Sequence[float], points: int = CURVE_POINTS) -> list[float]:
    """Average consecutive values into at most `points` groups of (almost) equal size."""
    groups = min(points, len(values))
    edges = [round(i * len(values) / groups) for i in range(groups + 1)] if groups else []
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def epochs_to(record: RunRecord, target: float) -> int | None:
    """The first epoch after which the test accuracy was `target` or better; None if it never was."""
    if record.metric != "accuracy":
        return None
    reached = (row["epoch"] for row in record.epochs if (row["test_metric"] or 0.0) >= target)
    return next(reached, None)


def flat_row(record: RunRecord, target: float) -> dict[str, Any]:
    """The run as one row of results.csv."""
    plain = {name: value for name, value in vars(record).items() if not isinstance(value, dict | list)}
    plain.pop("coverage")
    timing = {f"step_seconds_{name}": record.step_seconds.get(name) for name in ("median", "mean", "p99")}
    return {**plain, **timing, "epochs_to_target": epochs_to(record, target)}


def write_results(out: Path, head: Mapping[str, Any], records: Sequence[RunRecord], target: float) -> None:
    """Rebuild results.json and results.csv from the runs."""
    content = storable({**head, "runs": [asdict(record) for record in records]})
    write_atomically(out / "results.json", json.dumps(content, allow_nan=False))
    rows = [storable(flat_row(record, target)) for record in records]
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_atomically(out / "results.csv", table.getvalue())
