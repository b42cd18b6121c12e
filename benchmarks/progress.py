"""How a comparison tells how far it is: not at all, one line a run, or bars on a terminal."""

import sys
from types import TracebackType
from typing import Self

from .records import RunRecord
from .summary import score


class Reporter:
    """Hears of every run; this one keeps quiet."""

    def begin(self, runs: int, skipped: int, epochs: int) -> None:
        """`runs` are planned, of which `skipped` were finished before."""

    def run_begins(self, record: RunRecord) -> None: ...

    def epoch_ended(self, epoch: int) -> None: ...

    def run_ended(self, record: RunRecord) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Lines(Reporter):
    """One plain line a run."""

    def begin(self, runs: int, skipped: int, epochs: int) -> None:
        self.runs, self.done = runs, skipped
        if skipped:
            self.say(f"skipping {skipped} of {runs} runs, finished before")

    def run_ended(self, record: RunRecord) -> None:
        self.done += 1
        self.say(f"[{self.done:{len(str(self.runs))}}/{self.runs}] {describe(record)}")

    def say(self, line: str) -> None:
        print(line, flush=True)


class Bars(Lines):
    """Two bars, runs and epochs, under the lines of the runs that ended."""

    def begin(self, runs: int, skipped: int, epochs: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description:24}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, transient=True)
        self.progress.start()
        self.all = self.progress.add_task("runs", total=runs, completed=skipped)
        self.one = self.progress.add_task("", total=epochs)
        super().begin(runs, skipped, epochs)

    def run_begins(self, record: RunRecord) -> None:
        self.progress.reset(self.one, description=f"{record.optimizer}, seed {record.seed}")

    def epoch_ended(self, epoch: int) -> None:
        self.progress.update(self.one, completed=epoch)

    def run_ended(self, record: RunRecord) -> None:
        super().run_ended(record)
        self.progress.advance(self.all)

    def say(self, line: str) -> None:
        self.progress.console.print(line, markup=False, highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


def describe(record: RunRecord) -> str:
    """One run in one line."""
    head = f"{record.optimizer}, seed {record.seed}: "
    if record.status == "failed":
        return f"{head}failed, {record.message}"
    trouble = f"; {record.status}, {record.message}" if record.status == "diverged" else ""
    reached = f"{record.scored_on} {record.metric} {score(record.test_metric, record.metric)}"
    return (
        f"{head}{reached}, train loss {record.train_loss:.3g}, "
        f"{1000 * record.step_seconds['mean']:.2f} ms/step, {record.seconds:.1f} s{trouble}"
    )


def default_reporter() -> Reporter:
    return Bars() if sys.stdout.isatty() else Lines()
