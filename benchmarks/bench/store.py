"""Where results lie: a folder a run in AlgoPerf's shape, and tables of all of them.

    OUT/tune/OPTIMIZER/study_I/WORKLOAD_pytorch/trial_J/    hparams.json, flags_0.json, meta_data_0.json,
    OUT/run/OPTIMIZER/study_SEED/WORKLOAD_pytorch/trial_1/  measurements.csv, eval_measurements.csv, outcome.json
    OUT/results.csv        one row a run, with settings and environment
    OUT/outcomes.json.xz   everything, to be committed or sent; what a folder without the runs is read from

Every file is written whole or not at all.
"""

import csv
import io
import json
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..names import file_name, flat
from ..records import make_folder, storable, write_atomically
from .targets import Target, read_targets
from .trial import Outcome, Trial

ARCHIVE = "outcomes.json.xz"
TABLE = "results.csv"
CLOCKS = {"steps": "step", "seconds": "seconds", "cpu_seconds": "cpu_seconds", "gradient_evaluations": "evaluations"}
PHASES = ("tune", "run", "target")
NAMES = {f.name for f in fields(Outcome)}
NEEDED = {f.name for f in fields(Outcome) if f.default is f.default_factory is MISSING}


class Store:
    """The results in one folder."""

    def __init__(self, out: Path) -> None:
        self.out = Path(out).expanduser()

    def prepare(self) -> None:
        """Make the folder; raise InputError where that cannot be, or where another command's results lie in it."""
        make_folder(self.out)
        own = (ARCHIVE, *PHASES)
        if (self.out / TABLE).exists() and not any((self.out / name).exists() for name in own):
            raise InputError(
                f"{self.out} holds the {TABLE} of another command, which would be lost: give another folder to --out"
            )

    def folder(self, trial: Trial) -> Path:
        study, number = (trial.study, trial.number + 1) if trial.phase == "tune" else (trial.seed, 1)
        name = file_name(trial.optimizer)
        workload = f"{file_name(trial.workload)}_pytorch"
        return self.out / trial.phase / name / f"study_{study}" / workload / f"trial_{number}"

    def checkpoint(self, trial: Trial) -> Path:
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "checkpoint.pt"

    def found(self, trial: Trial) -> Outcome | None:
        """What came of this very trial, if it has ended: in its folder, or in the archive."""
        outcome = read_outcome(self.folder(trial) / "outcome.json")
        if outcome is None:
            outcome = self._archived.get(trial.key)
        return outcome if outcome is not None and outcome.key == trial.key else None

    def holds_another(self, trial: Trial) -> bool:
        """Whether another run lies where this one is to be written."""
        outcome = read_outcome(self.folder(trial) / "outcome.json")
        return outcome is not None and outcome.key != trial.key

    @cached_property
    def _archived(self) -> dict[str, Outcome]:
        """The runs of the archive, by key."""
        archive = self.out / ARCHIVE
        if not archive.exists():
            return {}
        try:
            rows = json.loads(lzma.decompress(archive.read_bytes()))
        except (OSError, ValueError, lzma.LZMAError) as error:
            raise InputError(f"{archive} cannot be read ({error}): remove it or fetch it again") from error
        found = [made(row) for row in rows]
        if None in found:
            raise InputError(
                f"{archive} holds a run that this version cannot read: read it with the version that wrote it, or give "
                "another folder"
            )
        return {outcome.key: outcome for outcome in found if outcome is not None}

    def write_rows(self, trial: Trial, outcome: Outcome) -> None:
        """What is known while the run goes on."""
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [algoperf_row(row, outcome.test if row is outcome.rows[-1] else {}) for row in outcome.rows]
        write_atomically(folder / "eval_measurements.csv", as_csv(rows))

    def write(self, trial: Trial, outcome: Outcome) -> None:
        """All files of a run that has ended; the outcome last, since it says that the run is there."""
        self.write_rows(trial, outcome)
        folder = self.folder(trial)
        flags = {**outcome.trial, "status": outcome.status, "message": outcome.message}
        for name, content in (
            ("hparams.json", dict(trial.settings)),
            ("flags_0.json", flags),
            ("meta_data_0.json", outcome.environment),
        ):
            write_atomically(folder / name, json.dumps(storable(content), indent=1))
        curve = [{"global_step": step, "loss": loss} for step, loss in zip(*curve_of(outcome), strict=True)]
        write_atomically(folder / "measurements.csv", as_csv(curve))
        write_atomically(folder / "outcome.json", json.dumps(storable(asdict(outcome)), allow_nan=False))

    def outcomes(self) -> list[Outcome]:
        """Every run in the folder, those of its archive included."""
        found = {place(outcome): outcome for outcome in self._archived.values()}
        for phase in PHASES:
            for path in sorted((self.out / phase).glob("*/study_*/*/trial_*/outcome.json")):
                outcome = read_outcome(path)
                if outcome is not None:
                    found[place(outcome)] = outcome
        return list(found.values())

    def write_tables(self, outcomes: Sequence[Outcome], targets: Mapping[str, Target] | None = None) -> None:
        """The archive of all runs, without the training curves of the search, and the table with times to `targets`,
        None: the frozen ones."""
        rows = [asdict(o) | ({"curve": {}} if o.trial["phase"] == "tune" else {}) for o in outcomes]
        packed = lzma.compress(json.dumps(storable(rows), allow_nan=False).encode(), preset=9)
        partial = self.out / f".{ARCHIVE}"
        partial.write_bytes(packed)
        partial.replace(self.out / ARCHIVE)
        known = read_targets() if targets is None else targets
        write_atomically(self.out / TABLE, as_csv([flat_row(o, known.get(o.workload)) for o in outcomes]))


def place(outcome: Outcome) -> tuple[str, int, int]:
    """What tells the run apart from the others in a folder."""
    trial = outcome.trial
    return f"{trial['phase']} {outcome.workload} {outcome.optimizer}", trial["study"], trial["number"]


def read_outcome(path: Path) -> Outcome | None:
    """The outcome in a file; None where there is none, or none that can be read."""
    try:
        return made(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError):
        return None


def made(content: Any) -> Outcome | None:
    """The outcome of a row; what an older version did not write has its default."""
    if not isinstance(content, dict) or not NEEDED <= content.keys() <= NAMES:
        return None
    return Outcome(**content)


def curve_of(outcome: Outcome) -> tuple[list[float], list[float]]:
    return outcome.curve.get("step", []), outcome.curve.get("loss", [])


def algoperf_row(row: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
    """One row of eval_measurements.csv, by the names that AlgoPerf's scoring reads."""
    own = {"step", "seconds", "cpu_seconds", "evaluations", "train_loss"}
    return {
        "global_step": row["step"],
        "score": row["seconds"],
        "accumulated_submission_time": row["seconds"],
        "cpu_seconds": row["cpu_seconds"],
        "gradient_evaluations": row["evaluations"],
        "train/loss": row["train_loss"],
        **{f"validation/{name}": value for name, value in row.items() if name not in own},
        **{f"test/{name}": value for name, value in test.items()},
    }


def flat_row(outcome: Outcome, target: Target | None = None) -> dict[str, Any]:
    """One row of results.csv; what was not reached is empty."""
    trial = outcome.trial
    plain = {key: trial[key] for key in ("workload", "optimizer", "phase", "study", "number", "seed")}
    plain |= {key: trial[key] for key in ("horizon", "budget", "lr_warmup")}
    settings = "; ".join(f"{key}={value}" for key, value in flat(trial["settings"]).items())
    last = outcome.rows[-1] if outcome.rows else {}
    return {
        **plain,
        "settings": settings,
        "status": outcome.status,
        "message": outcome.message,
        "metric": outcome.metric,
        "best": outcome.best(),
        "last": last.get(outcome.metric),
        "test": outcome.test.get(outcome.metric),
        "target": target.value if target else None,
        **{f"{name}_to_target": time_to(outcome, target, clock) for name, clock in CLOCKS.items()},
        **{f"test_{name}": outcome.test.get(name) for name in ("loss", "brier", "ece", "scaled_ece")},
        **{name.replace(" ", "_").replace("'", ""): value for name, value in outcome.diagnosis.items()},
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "gradient_evaluations": outcome.gradient_evaluations,
        **{f"step_{name}": value for name, value in outcome.step_seconds.items()},
        "peak_memory": outcome.peak_memory,
        "state_bytes": outcome.state_bytes,
        "parameters": outcome.parameters,
        "init_hash": outcome.init_hash,
        "data": outcome.data,
        **{f"environment_{name}": value for name, value in outcome.environment.items()},
    }


def time_to(outcome: Outcome, target: Target | None, clock: str) -> float | None:
    time = outcome.time_to(target.value, clock) if target else math.inf
    return time if time < math.inf else None


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV; a column for every key that any of them has."""
    rows = [storable(row) for row in rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()
