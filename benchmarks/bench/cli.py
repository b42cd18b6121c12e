"""The commands `grng bench run|tune|targets|report|status`."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..config import chosen_settings, parse_settings
from ..data import data_root
from ..errors import InputError
from ..names import merge
from .listener import default_listener
from .protocol import DEFAULT_OPTIMIZERS, Job, loadable, workloads_of
from .roster import own_name
from .spaces import TARGETS_BY
from .store import Store
from .targets import Target, all_targets, read_targets, write_targets
from .trial import Outcome

if TYPE_CHECKING:
    import typer


def add_bench(app: "typer.Typer") -> None:
    """Add the group of commands."""
    import typer

    bench = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Benchmark by a fixed protocol.")
    app.add_typer(bench, name="bench")

    listed = "comma-separated or repeated"
    Workloads = Annotated[
        list[str] | None,
        typer.Option("--workload", help=f"Names, {listed}; see grng bench status. [default: the fast tier]"),
    ]
    Optimizers = Annotated[
        list[str] | None,
        typer.Option("--optimizer", help=f"Names, {listed}; MODULE:CLASS or FILE.py. [default: all of the roster]"),
    ]
    Tier = Annotated[str | None, typer.Option(help="fast or full: all workloads of that tier.")]
    Out = Annotated[Path, typer.Option(help="Folder of the results; what is finished there is not run again.")]
    Data = Annotated[Path | None, typer.Option(help="Folder of the data sets; or GRNG_DATA.")]
    Device = Annotated[str | None, typer.Option(help="cpu, cuda or auto. [default: auto]")]
    Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: 1]")]
    Budget = Annotated[float | None, typer.Option(help="Times every workload's steps: 0.1 for a first look.")]
    Warmup = Annotated[
        float | None, typer.Option(help="Part of a run over which the rate rises; from 1 on, steps. [default: 0.05]")
    ]
    Sets = Annotated[list[str] | None, typer.Option("--set", help="A setting, as adamw.lr=1e-3; repeatable.")]
    Recipe = Annotated[Path | None, typer.Option(help="TOML file of these options; those given here win.")]
    Targets = Annotated[Path | None, typer.Option(help="File of targets of one's own, as grng bench targets writes.")]
    Aim = Annotated[
        str | None, typer.Option(help="time: first at the target; value: best at the full length. [default: time]")
    ]
    Clock = Annotated[str, typer.Option(help="seconds, cpu_seconds, step or evaluations.")]

    def job(
        recipe: Path | None,
        out: Path,
        workload: list[str] | None,
        optimizer: list[str] | None,
        tier: str | None,
        data: Path | None,
        sets: list[str] | None,
        **options: Any,
    ) -> tuple[Job, dict[str, Any]]:
        from .recipes import read_bench_recipe

        found = read_bench_recipe(recipe) if recipe else {}
        own = {key: found.pop(key, None) for key in ("optimizers", "workloads", "tier", "settings")}
        optimizers = tuple(names(optimizer) or own["optimizers"] or DEFAULT_OPTIMIZERS)
        workloads = names(workload) or ([] if tier else own["workloads"] or [])
        tier = tier or (None if workloads else own["tier"] or "fast")
        settings = merge(
            chosen_settings(own, optimizers), parse_settings(sets or (), {*optimizers, *map(own_name, optimizers)})
        )
        folder = data_root(data)
        chosen = workloads_of(tier, workloads)
        if not workloads:
            chosen, left_out = loadable(chosen, folder)
            for name, what in left_out.items():
                remedy = "see grng bench status" if folder else "give the folder of the data with --data, or GRNG_DATA"
                typer.echo(f"left out: {name}, for want of {', '.join(what)} ({remedy})", err=True)
        options = {key: value for key, value in options.items() if value is not None}
        options["targets"] = all_targets(options.pop("targets", None) or found.pop("targets", None))
        protocol: dict[str, Any] = {key: found.pop(key) for key in ("studies", "trials", "seeds") if key in found}
        made = Job(chosen, optimizers, out, folder, settings=settings, **(found | options))
        return made, protocol

    @bench.command("run")
    def run_command(
        workload: Workloads = None,
        optimizer: Optimizers = None,
        tier: Tier = None,
        seeds: Annotated[int | None, typer.Option(min=1, help="Paired seeds. [default: 10]")] = None,
        out: Out = Path("results/bench"),
        data: Data = None,
        device: Device = None,
        threads: Threads = None,
        budget: Budget = None,
        lr_warmup: Warmup = None,
        sets: Sets = None,
        recipe: Recipe = None,
        aim: Aim = None,
        clock: Annotated[
            str | None, typer.Option(help="What the best setting is chosen by. [default: seconds]")
        ] = None,
        targets: Targets = None,
        diagnose: Annotated[bool, typer.Option(help="Gradient norm, Pearson's r and sharpness, off the clock.")] = True,
        log: Annotated[str | None, typer.Option(help="tensorboard or wandb, where installed.")] = None,
    ) -> None:
        """Run seeds at given settings, at the best of a search in the same folder, or at the defaults."""
        with refusals("run"):
            options: dict[str, Any] = {"device": device, "threads": threads, "budget": budget, "aim": aim}
            options |= {"clock": clock, "targets": targets, "lr_warmup": lr_warmup}
            made, protocol = job(recipe, out, workload, optimizer, tier, data, sets, **options)
            with tables(made.store):
                outcomes = made.run(seeds or protocol.get("seeds", 10), diagnose, default_listener(out, log))
            conclude(made.store, outcomes)

    @bench.command("tune")
    def tune_command(
        workload: Workloads = None,
        optimizer: Optimizers = None,
        tier: Tier = None,
        studies: Annotated[int | None, typer.Option(min=1, help="Studies. [default: 3]")] = None,
        trials: Annotated[int | None, typer.Option(min=1, help="Trials of each study. [default: 5]")] = None,
        out: Out = Path("results/bench"),
        data: Data = None,
        device: Device = None,
        threads: Threads = None,
        budget: Budget = None,
        lr_warmup: Warmup = None,
        sets: Sets = None,
        recipe: Recipe = None,
        aim: Aim = None,
        log: Annotated[str | None, typer.Option(help="tensorboard or wandb, where installed.")] = None,
    ) -> None:
        """Search the published spaces: the same number of quasi-random trials for everybody, none of them pruned."""
        with refusals("tune"):
            options = {"device": device, "threads": threads, "budget": budget, "aim": aim, "lr_warmup": lr_warmup}
            made, protocol = job(recipe, out, workload, optimizer, tier, data, sets, **options)
            studies, trials = studies or protocol.get("studies", 3), trials or protocol.get("trials", 5)
            with tables(made.store):
                outcomes = made.tune(studies, trials, default_listener(out, log))
            conclude(made.store, outcomes)

    @bench.command("targets")
    def targets_command(
        workload: Workloads = None,
        tier: Tier = None,
        trials: Annotated[int, typer.Option(min=1, help="Trials of each rival.")] = 20,
        seeds: Annotated[int, typer.Option(min=1, help="Reruns of the best.")] = 10,
        out: Out = Path("results/targets"),
        data: Data = None,
        device: Device = None,
        threads: Threads = None,
        budget: Budget = None,
        freeze: Annotated[Path | None, typer.Option(help="File of targets; those it has are left alone.")] = None,
    ) -> None:
        """Set the targets: the best of tuned SGD with momentum, AdamW and NAdamW, rerun, the median of its best."""
        with refusals("targets"):
            options = {"device": device, "threads": threads, "budget": budget}
            made, _ = job(None, out, workload, list(TARGETS_BY), tier, data, None, **options)
            with tables(made.store):
                found = made.set_targets(trials, seeds, default_listener(out, None))
            path = freeze or out / "targets.json"
            kept = read_targets(path) if path.exists() else {}
            write_targets(path, {**found, **kept})
            for name, target in found.items():
                frozen = f", frozen before at {kept[name].value:g}" if name in kept else ""
                typer.echo(f"{name}: {target.metric} {target.value:g} by {target.optimizer}{frozen}")
            typer.echo(f"targets in {path}")

    @bench.command("report")
    def report_command(
        out: Out = Path("results/bench"),
        clock: Clock = "seconds",
        page: Annotated[Path | None, typer.Option(help="Write the Markdown page here, its figures beside it.")] = None,
        data: Data = None,
        targets: Targets = None,
    ) -> None:
        """Write report.html, results.md, the tables and the figures, from what is in the folder; beside DeepOBS's own
        curves where the data hold them (results_deepobs)."""
        from ..workloads.deepobs import published
        from .report import write_report

        with refusals("report"):
            folder = data_root(data)
            known = published(folder) if folder and (folder / "results_deepobs").is_dir() else None
            written = write_report(Store(out), clock, page, all_targets(targets), known)
            for path in written:
                typer.echo(str(path))

    @bench.command("status")
    def status_command(out: Out = Path("results/bench"), data: Data = None, targets: Targets = None) -> None:
        """Show the workloads, whether their data are there, and what is done in the folder."""
        with refusals("status"):
            show_status(Store(out), data_root(data), all_targets(targets))


def names(lists: list[str] | None) -> list[str]:
    """The names in lists that separate them by commas."""
    return [name.strip() for part in lists or () for name in part.split(",") if name.strip()]


def conclude(store: Store, outcomes: list[Outcome]) -> None:
    """Write the tables, say where they are; status 1 if a run failed."""
    import typer

    failed = [o for o in outcomes if o.status == "failed"]
    typer.echo(
        f"{len(outcomes)} runs, {len(failed)} failed. Tables: {store.out}; report: grng bench report --out {store.out}"
    )
    raise typer.Exit(int(bool(failed)))


def show_status(store: Store, data: Path | None, targets: Mapping[str, Target]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..workloads import all_workloads

    outcomes = store.outcomes() if store.out.is_dir() else []
    table = Table(box=SIMPLE_HEAD)
    for i, heading in enumerate(("workload", "tier", "steps", "metric", "target", "data", "trials", "runs", "trouble")):
        table.add_column(heading, justify="left" if i in (0, 1, 3, 5, 8) else "right", no_wrap=not i)
    for name, workload in all_workloads().items():
        own = [o for o in outcomes if o.workload == name]
        missing = workload.lacks(data)
        trouble = {kind: sum(o.status == kind for o in own) for kind in ("failed", "diverged")}
        table.add_row(
            name,
            workload.tier,
            str(workload.steps),
            workload.metric,
            f"{targets[name].value:g}" if name in targets else "–",
            f"missing {', '.join(missing)}" if missing else "there" if workload.data else "none needed",
            str(sum(o.trial["phase"] == "tune" for o in own)),
            str(sum(o.trial["phase"] == "run" for o in own)),
            ", ".join(f"{count} {kind}" for kind, count in trouble.items() if count) or "none",
        )
    Console(width=None if sys.stdout.isatty() else 130, highlight=False).print(table)


@contextmanager
def tables(store: Store) -> Iterator[None]:
    """The tables are written in the end, also of what was interrupted."""
    try:
        yield
    finally:
        if outcomes := store.outcomes():
            store.write_tables(outcomes)


@contextmanager
def refusals(command: str) -> Iterator[None]:
    """Bad input ends the command with its message and status 2; an interruption says how to go on."""
    import typer

    try:
        yield
    except InputError as error:
        typer.echo(f"grng bench {command}: error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"grng bench {command}: interrupted; the same command goes on where it was", err=True)
        raise typer.Exit(130) from None
