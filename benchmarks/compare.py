"""The comparison: every optimizer, seed by seed, from the same weights and batches, written as it goes."""

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from grng.baselines import make_optimizer

from .config import CompareConfig, resolve_device
from .data import Dataset, hold_out, load_data
from .errors import InputError, check_extra
from .models import build_model
from .names import flat, optimizer_of
from .progress import Reporter
from .records import RunRecord, hash_of, make_folder, read_runs, write_atomically, write_results, write_run
from .report import write_report
from .runner import completed, run
from .summary import markdown, names_of, summarise
from .tuning import best_of, write_best


def compare(config: CompareConfig, reporter: Reporter | None = None) -> list[RunRecord]:
    """Run what is missing, write each run as it ends and the report in the end; return all runs of this comparison.

    Seeds are the outer loop and optimizers the inner one, so that a machine that slows down slows all alike. A run
    that raises is recorded as failed and the others go on. Raises InputError before anything has run.
    """
    check_extra()
    with threads(config.threads), frozen_objects():
        device = resolve_device(config.device)
        data = load_data(config.data)
        data = hold_out(data) if config.validation else data
        check_buildable(config, data)
        job = Job(config, data, device)
        done = job.prepare_folder()
        data = data.to(device)
        planned = [(name, seed) for seed in range(config.seeds) for name in config.names]
        missing = [(name, seed) for name, seed in planned if job.key(name, seed) not in done]
        with reporter or Reporter() as reporter:
            reporter.begin(len(planned), len(planned) - len(missing), config.epochs)
            for name, seed in missing:
                record = job.record(name, seed)
                reporter.run_begins(record)
                try:
                    run(record, data, device, reporter.epoch_ended)
                except Exception as error:  # whatever an optimizer raises is a result of the comparison
                    record.status, record.message = "failed", f"{type(error).__name__}: {error}"
                write_run(config.out, record)
                job.write_results()
                reporter.run_ended(record)
        records = job.write_results()
        if config.grid:
            job.write_best(records)
        write_report(config, records)
        return records


class Job:
    """One comparison bound to its data and device: which runs belong to it, and where they lie."""

    def __init__(self, config: CompareConfig, data: Dataset, device: torch.device) -> None:
        self.config, self.metric, self.scored_on = config, data.metric, data.scored_on
        self.environment = environment(device)
        names = ("data", "model", "epochs", "batch_size", "lr_schedule", "lr_warmup_epochs")
        self.shared = {name: getattr(config, name) for name in names} | {
            "data": data.name,
            "fingerprint": data.fingerprint,
            "scored_on": data.scored_on,
            "samples": [len(data.x_train), len(data.x_test)],
            "shape": list(data.shape),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "versions": {name: self.environment[name] for name in ("grng", "torch")},
        }

    def key(self, optimizer: str, seed: int) -> str:
        """Hash of everything that decides a run; one with the same key need not be made again."""
        return hash_of([self.shared, optimizer, seed, self.config.given(optimizer)])

    def record(self, optimizer: str, seed: int) -> RunRecord:
        key, given = self.key(optimizer, seed), self.config.given(optimizer)
        record = RunRecord(key, optimizer, seed, self.shared, given, self.environment)
        record.metric, record.scored_on = self.metric, self.scored_on
        return record

    def records(self) -> list[RunRecord]:
        """The runs in the folder that belong to this comparison, those of further seeds and optimizers included."""
        found = [r for r in read_runs(self.config.out) if r.key == self.key(r.optimizer, r.seed)]
        order = names_of(found)
        return sorted(found, key=lambda r: (r.seed, order.index(r.optimizer)))

    def prepare_folder(self) -> set[str]:
        """Make the folder of the runs, and return the keys of those that need not be made again."""
        out = self.config.out
        make_folder(out, "runs")
        held = (out / "results.json").exists() or any((out / "runs").glob("*.json"))
        if held and not self.config.resume:
            raise InputError(f"{out} holds a previous result: give --resume to continue it, or another --out")
        return {record.key for record in self.records() if record.status != "failed"}

    def write_results(self) -> list[RunRecord]:
        records, target = self.records(), self.config.target
        rows = [asdict(row) for row in summarise(records, target)]
        head = {"scored_on": self.scored_on, "job": self.shared, "target": target, "environment": self.environment}
        head["summary"] = rows
        write_results(self.config.out, head, records, target)
        write_atomically(self.config.out / "table.md", markdown(summarise(records, target), target))
        return records

    def write_best(self, records: list[RunRecord]) -> None:
        """Write the settings of the best point of every grid."""
        config = self.config
        names = {title: best_of(points, records, config.seeds) for title, points in config.points.items()}
        best = {title: None if name is None else config.given(name) for title, name in names.items()}
        score = f"mean {self.scored_on} {self.metric} over {config.seeds} seed{'s' * (config.seeds != 1)}"
        write_best(config.out, best, f"The best point of each grid, by the {score}.")


def check_buildable(config: CompareConfig, data: Dataset) -> None:
    """Build the model and every optimizer once, so that a wrong setting is known before hours of runs."""
    steps = len(data.x_train) // min(config.batch_size, len(data.x_train))
    for name in config.names:
        with torch.random.fork_rng(devices=[]):
            model = build_model(config.model, data.shape, data.outputs)
        given = config.given(name)
        try:
            optimizer = make_optimizer(optimizer_of(name), model, **completed(given, steps))
        except (TypeError, ValueError, ImportError) as error:
            settings = ", ".join(f"{key}={value}" for key, value in flat(given).items()) or "its defaults"
            raise InputError(f"optimizer {name!r} cannot be built with {settings}: {error}") from error
        getattr(optimizer, "close", lambda: None)()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, and give it back those it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Spare the garbage collector what is loaded already: searching it takes longer than many steps of a run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def environment(device: torch.device) -> dict[str, Any]:
    """What the seconds of a run depend on besides its configuration."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "grng": version("grng"),
        "source": source_hash(),
        "torch": str(torch.__version__),  # a class of torch's own, which its safe loading refuses
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


@cache
def source_hash() -> str:
    """Hash of the code of the optimizers and the workloads, which one version number does not tell apart."""
    files: dict[tuple[str, ...], Path] = {}
    for part in ("grng", "grng.kernels", "grng.baselines", "grng.benchmarks.workloads", "grng.benchmarks.networks"):
        folder = Path(import_module(part).__path__[0])
        files |= {(part.replace(".", "/"), *file.relative_to(folder).parts): file for file in folder.rglob("*.py")}
    code = {"/".join(name): file.read_text("utf-8") for name, file in files.items() if "benchmarks" not in name}
    return hash_of(code)


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
