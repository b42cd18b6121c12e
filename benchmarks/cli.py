"""The console command `grng`; its one job is `grng compare`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .architectures.cli import add_check
from .bench.cli import add_bench
from .compare import compare
from .config import CompareConfig, chosen_settings, parse_settings, read_recipe
from .data import VALID
from .errors import InputError, MissingExtra, check_extra
from .names import merge
from .progress import default_reporter
from .records import RunRecord
from .summary import summarise, table
from .tuning import BEST

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Entry point of the console script."""
    try:
        check_extra()
    except MissingExtra as error:
        sys.exit(f"grng: {error}")
    make_app()()


def make_app() -> "typer.Typer":
    """The command line, made when it is called, since typer is an extra."""
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"grng {version('grng')}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False,
    ) -> None:
        """Gradient-regularised natural gradients for PyTorch."""

    def option(name: str, text: str) -> Any:
        default = getattr(CompareConfig, name, None)
        shown = ",".join(default) if isinstance(default, tuple) else default
        text += f" [default: {shown}]" if shown else ""
        return typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False)

    names_help = "OPTIMIZER[+REGULARIZER...][/LABEL], as adamw or adamw+gnp/zero; comma-separated or repeated."
    set_help = "One setting, as ring.rho=1e-3 or adamw+gnp/zero.gnp.warmup=zero; repeatable."
    validation_help = "Score on a tenth of the training set, held out, and leave the test set alone: for tuning."
    recipe_help = "TOML file of these options, and of grids of settings; those given here win."

    @app.command("compare")
    def compare_command(
        data: Annotated[str | None, option("data", "digits, or a folder with a .npz or MNIST-style idx files.")] = None,
        model: Annotated[str | None, option("model", "mlp, cnn or transformer.")] = None,
        optimizers: Annotated[list[str] | None, option("optimizers", names_help)] = None,
        epochs: Annotated[int | None, option("epochs", "Passes over the data.")] = None,
        seeds: Annotated[int | None, option("seeds", "How many seeds.")] = None,
        batch_size: Annotated[int | None, option("batch_size", "Samples a step.")] = None,
        lr_schedule: Annotated[str | None, option("lr_schedule", "cosine or constant.")] = None,
        lr_warmup_epochs: Annotated[
            float | None, option("lr_warmup_epochs", "Over which the rate rises first.")
        ] = None,
        sets: Annotated[list[str] | None, option("set", set_help)] = None,
        target: Annotated[float | None, option("target", "The accuracy to reach.")] = None,
        validation: Annotated[bool, option("validation", validation_help)] = False,
        out: Annotated[Path | None, option("out", "Folder of the results.")] = None,
        device: Annotated[str | None, option("device", "cpu, cuda or auto.")] = None,
        threads: Annotated[int | None, option("threads", "CPU threads; one gives the steadiest times.")] = None,
        resume: Annotated[bool, option("resume", "Continue in a folder of results; skip finished runs.")] = False,
        recipe: Annotated[Path | None, option("recipe", recipe_help)] = None,
    ) -> None:
        """Train one model with several optimizers from the same weights and batches, and report."""
        given: dict[str, Any] = {
            "data": data,
            "model": model,
            "optimizers": names_in(optimizers) if optimizers else None,
            "epochs": epochs,
            "seeds": seeds,
            "batch_size": batch_size,
            "lr_schedule": lr_schedule,
            "lr_warmup_epochs": lr_warmup_epochs,
            "validation": validation or None,
            "target": target,
            "out": out,
            "device": device,
            "threads": threads,
            "resume": resume or None,
        }
        try:
            options = read_recipe(recipe) if recipe else {}
            if given["optimizers"] is not None:
                options["settings"] = chosen_settings(options, given["optimizers"])
            options |= {name: value for name, value in given.items() if value is not None}
            config = CompareConfig(**options)
            given_settings = parse_settings(sets or (), config.titles)
            config = replace(config, settings=merge(config.settings, given_settings))
            records = compare(config, default_reporter())
        except InputError as error:
            typer.echo(f"grng compare: error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo("grng compare: interrupted; the same command with --resume goes on", err=True)
            raise typer.Exit(130) from None
        show(config, records)
        raise typer.Exit(int(any(record.status == "failed" for record in records)))

    add_kalman(app)
    add_bench(app)
    add_check(app)
    return app


def add_kalman(app: "typer.Typer") -> None:
    """The commands behind the figures of docs/kalman.md."""
    import typer

    from . import robustness, shift, step_cost, stream, uci

    out_help = "The folder that results are written to; what is finished there is not run again."

    @app.command("uci")
    def uci_command(
        data: Annotated[Path | None, typer.Option(help="Folder of the UCI splits, .npz; or GRNG_DATA.")] = None,
        datasets: Annotated[str, typer.Option(help="Names of the files, comma-separated.")] = "energy,concrete,yacht",
        methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(uci.METHODS),
        epochs: Annotated[int, typer.Option(min=1)] = 150,
        splits: Annotated[int, typer.Option(min=1)] = 20,
        out: Annotated[Path, typer.Option(help=out_help)] = Path("results/kalman-uci"),
    ) -> None:
        """RMSE and log likelihood on the standard splits, beside AdamW, Laplace and IVON where they are installed."""
        with refusals("uci"):
            folder = uci.data_folder(data)
            typer.echo(uci.uci(folder, out, names_in([datasets]), names_in([methods]), epochs, splits, typer.echo))

    @app.command("shift")
    def shift_command(
        data: Annotated[str, typer.Option(help=f"What is learnt: {VALID}.")],
        other: Annotated[str, typer.Option(help="What is to be recognised as foreign, of the same shape.")],
        methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(shift.METHODS),
        epochs: Annotated[int, typer.Option(min=1)] = 5,
        seeds: Annotated[int, typer.Option(min=1)] = 3,
        out: Annotated[Path, typer.Option(help=out_help)] = Path("results/kalman-shift"),
    ) -> None:
        """Calibration on one data set, and whether another is recognised as foreign."""
        with refusals("shift"):
            typer.echo(shift.shift(data, other, out, names_in([methods]), epochs, seeds, typer.echo))

    @app.command("stream")
    def stream_command(
        seeds: Annotated[int, typer.Option(min=1)] = 5,
        out: Annotated[Path, typer.Option(help="The folder that results are written to.")] = Path(
            "results/kalman-stream"
        ),
    ) -> None:
        """Digits that come one by one while the picture wanders: accuracy before learning."""
        with refusals("stream"):
            typer.echo(stream.stream(out, seeds, typer.echo))

    @app.command("step-cost")
    def step_cost_command(
        parameters: Annotated[str, typer.Option(help="Sizes of the network, comma-separated.")] = "1e4,1e5,1e6,1e7",
        classes: Annotated[str, typer.Option(help="Numbers of outputs, comma-separated.")] = "2,10,100",
        memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process each.")] = True,
        out: Annotated[Path, typer.Option(help="The folder that results are written to.")] = Path(
            "results/kalman-cost"
        ),
    ) -> None:
        """What a step of the Kalman filter costs beside AdamW's, with every kind of V."""
        sizes = [int(float(size)) for size in names_in([parameters])]
        unknown = [size for size in sizes if size not in step_cost.WIDTHS]
        if unknown:
            typer.echo(f"grng step-cost: error: sizes {unknown}: choose from {list(step_cost.WIDTHS)}", err=True)
            raise typer.Exit(2)
        step_cost.step_cost(out, sizes, [int(C) for C in names_in([classes])], memory, typer.echo)

    @app.command("p0")
    def p0_command(
        seeds: Annotated[int, typer.Option(min=1)] = 3,
        out: Annotated[Path, typer.Option(help="The folder that results are written to.")] = Path("results/kalman-p0"),
    ) -> None:
        """In how wide a range of p0 the Kalman filter trains, with its regularisation and without."""
        typer.echo(robustness.robustness(out, seeds, say=typer.echo))


@contextmanager
def refusals(command: str) -> Iterator[None]:
    """Bad input ends the command with its message and status 2."""
    import typer

    try:
        yield
    except InputError as error:
        typer.echo(f"grng {command}: error: {error}", err=True)
        raise typer.Exit(2) from None


def names_in(lists: list[str]) -> list[str]:
    """The names in lists that separate them by commas."""
    return [name.strip() for names in lists for name in names.split(",") if name.strip()]


def show(config: CompareConfig, records: list[RunRecord]) -> None:
    """Print the summary, and where the rest is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    headings, rows = table(summarise(records, config.target), config.target)
    sheet = Table(box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        sheet.add_column(heading, justify="right" if i else "left", no_wrap=i < 2)
    for row in rows:
        sheet.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(sheet)
    untuned = f"Settings from {config.settings_from}" if config.settings_from else "Settings not tuned"
    notes = [f"Best settings: {config.out / BEST}" if config.grid else untuned]
    notes += ["scores of a validation set"] * config.validation + ["seconds of this machine"]
    console.print(f"{'; '.join(notes)}. Report: {config.out / 'report.html'}", soft_wrap=True)
