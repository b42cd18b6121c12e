"""The command `grng check`: a model of your own, one by name, or the whole grid."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from grng import Curvature, check
from grng.checkup import Checkup
from grng.invariance import Loss, put_back

from ..errors import InputError, choose
from ..workloads.named import build_named, is_language, is_named

if TYPE_CHECKING:
    import typer

SIDE, WINDOWS, TOKENS = "4,3,32,32", "4,17", 65
Checked = tuple[nn.Module, Any, Loss | None]


def add_check(app: "typer.Typer") -> None:
    """Add the command."""
    import typer

    model_help = "MODULE:CALLABLE, FILE.py:CALLABLE, timm:NAME, transformers:NAME, or a row of the grid."
    input_help = "Shape of a random batch, as 8,3,32,32, where the callable returns the model alone."

    @app.command("check")
    def check_command(
        model: Annotated[str | None, typer.Argument(metavar="MODEL", help=model_help)] = None,
        input: Annotated[str | None, typer.Option("--input", help=input_help)] = None,
        variants: Annotated[str, typer.Option(help="Comma-separated.")] = "ring,kalman",
        capture: Annotated[str, typer.Option(help="auto, hooks or backpack.")] = "auto",
        grid: Annotated[bool, typer.Option("--grid", help="Every architecture of the grid, by brute force.")] = False,
        out: Annotated[Path | None, typer.Option(help="With --grid: folder that the results are written to.")] = None,
        page: Annotated[Path | None, typer.Option(help="With --grid: the Markdown page to write.")] = None,
    ) -> None:
        """What GRNG makes of a model: two steps of each variant, a verdict for every parameter, and what must not
        change. MODEL's callable takes no arguments and returns (model, inputs, loss), of which loss(model, inputs) is
        minimised, or the model alone.
        """
        torch.set_num_threads(1)
        try:
            if grid:
                from .page import grid_command

                raise typer.Exit(int(not grid_command(out, page, typer.echo)))
            if model is None:
                raise InputError("no MODEL: give MODULE:CALLABLE, FILE.py:CALLABLE or a name, or --grid")
            parts = tuple(name.strip() for name in variants.split(","))
            found = checked(model, input, parts, capture)
        except InputError as error:
            typer.echo(f"grng check: error: {error}", err=True)
            raise typer.Exit(2) from None
        show(found)
        raise typer.Exit(int(not found.ok))


def checked(name: str, shape: str | None, variants: tuple[str, ...], capture: str) -> Checkup:
    from grng.curvature.config import ENGINES
    from grng.variants import VARIANTS

    for variant in variants:
        choose("variant", variant, tuple(VARIANTS))
    curvature = Curvature(capture=choose("capture", capture, ENGINES))  # type: ignore[arg-type]
    model, inputs, loss = find(name, shape)
    try:
        plain_pass(model, inputs, loss)
    except Exception as error:
        call = "model(inputs)" if loss is None else "loss(model, inputs)"
        raise InputError(f"{name!r} fails without GRNG too: {call} raises {place_of(error)}") from error
    try:
        return check(model, inputs, loss, variants=variants, curvature=curvature)
    except ValueError as error:  # of the model, or of its inputs
        raise InputError(f"{name!r}: {error}") from error


def find(name: str, shape: str | None) -> Checked:
    """The model of that name, a batch for it, and its loss."""
    from . import ARCHITECTURES, available

    if name in ARCHITECTURES:
        row = ARCHITECTURES[name]
        if not available(row):
            raise InputError(f"{name!r} needs the package {row.needs}: pip install {row.needs}")
        model = row.make()
        return model, row.batch(model, 4), row.value
    if is_language(name):
        torch.manual_seed(0)
        return build_named(name, TOKENS), torch.randint(TOKENS, sizes_of(shape or WINDOWS)), next_token_loss
    if is_named(name):
        return build_named(name, 10), random_input(shape or SIDE), None
    if ":" not in name:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"no model {name!r}: give MODULE:CALLABLE, FILE.py:CALLABLE, timm:NAME, or one of {known}")
    try:
        made = callable_of(name)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name!r}, called without arguments, raises {place_of(error)}") from error
    if isinstance(made, nn.Module):
        if shape is None:
            raise InputError(f"{name!r} returns a model alone: add --input SHAPE, as --input 8,3,32,32")
        return made, random_input(shape), None
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[2])):
        raise InputError(
            f"{name!r} returns {type(made).__name__}: give a model, or (model, inputs, loss(model, inputs))"
        )
    return made


def plain_pass(model: nn.Module, inputs: Any, loss: Loss | None) -> None:
    """What a training loop does with them, as far as the loss."""
    with put_back(model), torch.enable_grad():
        if loss is None:
            model(inputs)
        elif not isinstance(value := loss(model, inputs), torch.Tensor) or not value.requires_grad or value.numel() > 1:
            raise TypeError(f"the loss must be a scalar tensor with a graph, but is: {value!r}")


def place_of(error: Exception) -> str:
    """An error in words, and the last line of the user's own that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "site-packages" not in frame.filename]
    where = f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}: {error}"


def callable_of(name: str) -> Callable[[], Any]:
    where, _, what = name.rpartition(":")
    try:
        module = from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        found = getattr(module, what)
    except (ImportError, AttributeError) as error:
        raise InputError(f"no model {name!r}: {error}") from error
    if not callable(found):
        raise InputError(f"{name!r} is {found!r}, which cannot be called: give a function that returns the model")
    return found


def from_file(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def next_token_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def random_input(shape: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(sizes_of(shape))


def sizes_of(shape: str) -> list[int]:
    try:
        sizes = [int(n) for n in shape.replace("x", ",").split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--input {shape!r} is no shape: write sizes, samples first, as 8,3,32,32")
    return sizes


STYLES = {"verified": "green", "approximation": "cyan", "fallback": "yellow", "unused": "dim", "wrong": "bold red"}


def show(found: Checkup) -> None:
    """Print the verdicts as a table, then the properties, the warnings and the counts."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    sheet = Table(box=SIMPLE_HEAD)
    variants = list(found.reports)
    rows = {variant: {row.parameter: row for row in found.reports[variant]} for variant in variants}
    for heading in ("parameter", "shape", "engine", *variants, "reason"):
        sheet.add_column(heading, overflow="fold")
    for name in dict.fromkeys(verdict.parameter for verdict in found.verdicts):
        own = {v.variant: v for v in found.verdicts if v.parameter == name}
        row = rows[variants[0]].get(name)
        treatments = [f"[{STYLES[own[v].treatment]}]{own[v].treatment}[/]" for v in variants]
        reason = "; ".join(dict.fromkeys(own[v].reason for v in variants))
        sheet.add_row(name, row.shape if row else "", row.engine if row else "", *treatments, reason)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(sheet)
    for variant in variants:
        console.print(f"{variant}: {'; '.join(found.reports[variant].notes)}", soft_wrap=True)
    said = {True: "holds", False: "[bold red]BROKEN[/]", None: "no occasion"}
    for p in found.properties:
        console.print(f"{p.name}: {said[p.holds]}{': ' * bool(p.reason)}{p.reason}", soft_wrap=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    console.print(found.summary, soft_wrap=True)
