"""How a benchmark tells how far it is: one line a run, bars on a terminal, and a log that others can plot."""

import sys
from pathlib import Path
from typing import Any

from ..errors import InputError, choose
from .protocol import Listener
from .trial import Outcome, Trial

LOGS = ("tensorboard", "wandb")


class Lines(Listener):
    """One plain line a run."""

    def begin(self, runs: int, skipped: int, outdated: int = 0, replaced: int = 0) -> None:
        self.runs, self.done = runs, skipped
        if skipped:
            older = f", {outdated} of them made by other code: give a new folder to make them anew" * bool(outdated)
            self.say(f"{skipped} of {runs} runs are there already{older}")
        if replaced:
            self.say(f"{replaced} runs of other settings or length are replaced: give a new folder to keep both")

    def run_ended(self, trial: Trial, outcome: Outcome) -> None:
        self.done += 1
        self.say(f"[{self.done:{len(str(self.runs))}}/{self.runs}] {describe(trial, outcome)}")

    def say(self, line: str) -> None:
        print(line, flush=True)


class Bars(Lines):
    """Two bars, runs and the present run, under the lines of the runs that ended."""

    def begin(self, runs: int, skipped: int, outdated: int = 0, replaced: int = 0) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description:40}"), BarColumn(30), TaskProgressColumn(), TimeRemainingColumn()
        self.bars = Progress(*columns, transient=True)
        self.bars.start()
        self.all = self.bars.add_task("runs", total=runs, completed=skipped)
        self.one = self.bars.add_task("", total=1.0)
        super().begin(runs, skipped, outdated, replaced)
        if skipped == runs:
            self.bars.stop()

    def run_begins(self, trial: Trial) -> None:
        self.bars.reset(self.one, description=trial.title)

    def progress(self, part: float) -> None:
        self.bars.update(self.one, completed=part)

    def run_ended(self, trial: Trial, outcome: Outcome) -> None:
        super().run_ended(trial, outcome)
        self.bars.advance(self.all)
        if self.done == self.runs:
            self.bars.stop()

    def say(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False)


class Logged(Listener):
    """Passes everything on, and writes each run's evaluations to TensorBoard or Weights & Biases."""

    def __init__(self, inner: Listener, out: Path, log: str) -> None:
        self.inner, self.out, self.log = inner, out, choose("log", log, LOGS)
        try:
            if log == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer: Any = SummaryWriter
            else:
                import wandb  # type: ignore[import-not-found, unused-ignore]

                self.writer = wandb
        except ImportError as error:
            raise InputError(f"--log {log} needs a package that is not installed: pip install {log}") from error

    def begin(self, runs: int, skipped: int, outdated: int = 0, replaced: int = 0) -> None:
        self.inner.begin(runs, skipped, outdated, replaced)

    def run_begins(self, trial: Trial) -> None:
        self.inner.run_begins(trial)

    def progress(self, part: float) -> None:
        self.inner.progress(part)

    def run_ended(self, trial: Trial, outcome: Outcome) -> None:
        rows = [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in outcome.rows]
        name = f"{trial.phase}/{trial.title}".replace(", ", "/")
        if self.log == "tensorboard":
            with self.writer(str(self.out / "tensorboard" / name)) as writer:
                for step, row in rows:
                    for key, value in row.items():
                        writer.add_scalar(key, value, step)
        else:
            run = self.writer.init(project="grng-bench", name=name, config=outcome.trial, reinit=True)
            for step, row in rows:
                run.log(row, step=step)
            run.finish()
        self.inner.run_ended(trial, outcome)


def describe(trial: Trial, outcome: Outcome) -> str:
    """One run in one line."""
    if outcome.status == "failed":
        return f"{trial.title}: failed, {outcome.message}"
    best = outcome.best()
    shown = "no value" if best is None else f"best {outcome.metric} {best:.4g}"
    trouble = f"; {outcome.status}, {outcome.message}" if outcome.status != "finished" else ""
    mean = 1000 * outcome.step_seconds["mean"]
    return f"{trial.title}: {shown}, {outcome.steps} steps of {mean:.2f} ms, {outcome.seconds:.1f} s{trouble}"


def default_listener(out: Path, log: str | None) -> Listener:
    listener: Listener = Bars() if sys.stdout.isatty() else Lines()
    return Logged(listener, out, log) if log else listener
