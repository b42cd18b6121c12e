"""What a comparison is made of, checked once before anything runs."""

import ast
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from grng.baselines import OPTIMIZERS

from .errors import InputError, choose
from .models import MODELS
from .names import check_name, is_key, merge, put
from .tuning import expand, toml

DEFAULT_OPTIMIZERS = ("ring", "reng", "kalman", "kfac", "ekfac", "sgd-momentum", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class CompareConfig:
    """One comparison: every optimizer trains `model` on `data` from the same weights and batches, seed by seed.

    One CPU thread by default: steps this small gain little from more, and on a busy machine lose tenfold now and then,
    as a thread waits for another that is not running.

    optimizers      names of runs, OPTIMIZER[+REGULARIZER...][/LABEL]
    settings        by name; those of a grid's name hold for all of its points
    grid            by name, the values of each setting: all combinations run, beside `optimizers`
    validation      score on a tenth of the training set that is held out, and leave the test set alone
    settings_from   a TOML file of settings, as a grid's best.toml, that `settings` override; what it holds for names
                    that take no part is ignored
    """

    data: str = "digits"
    model: str = "mlp"
    optimizers: tuple[str, ...] = DEFAULT_OPTIMIZERS
    epochs: int = 25
    seeds: int = 5
    batch_size: int = 64
    lr_schedule: str = "cosine"
    lr_warmup_epochs: float = 0
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    settings_from: Path | None = None
    validation: bool = False
    target: float = 0.97
    out: Path = Path("compare-out")
    device: str = "auto"
    threads: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizers", tuple(dict.fromkeys(self.optimizers)))
        object.__setattr__(self, "out", Path(self.out).expanduser())
        choose("model", self.model, MODELS)
        choose("lr-schedule", self.lr_schedule, SCHEDULES)
        if not self.names:
            raise InputError(f"no optimizer given: choose among {', '.join(OPTIMIZERS)}")
        for name in (*self.optimizers, *self.grid):
            check_name(name)
        for name in self.optimizers:
            if any(name in points for points in self.points.values()):
                raise InputError(f"{name!r} is a point of the grid too: leave it out of the optimizers")
        if self.settings_from is not None:
            found = read_recipe(Path(self.settings_from)).get("settings", {})
            found = {name: table for name, table in found.items() if name in self.titles}
            object.__setattr__(self, "settings", merge(found, self.settings))
        for name in self.settings:
            if name not in self.titles:
                raise InputError(f"settings for {name!r}, which takes no part: choose {', '.join(self.titles)}")
        for points in self.points.values():
            for name in points:
                toml(self.given(name))  # what best.toml cannot hold is better known before the runs
        for name in ("epochs", "seeds", "batch_size", "threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name.replace('_', '-')} is {value!r}: give a whole number of 1 or more")
        warmup = self.lr_warmup_epochs
        if type(warmup) not in (int, float) or not 0 <= warmup < self.epochs:
            raise InputError(
                f"lr-warmup-epochs is {warmup!r}: give a number of 0 or more, below the {self.epochs} epochs"
            )
        if not 0 < self.target <= 1:
            raise InputError(f"target is {self.target!r}: give an accuracy between 0 and 1")

    @cached_property
    def points(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Of every grid, the settings by the name of the point."""
        return {name: expand(name, axes) for name, axes in self.grid.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all runs."""
        return (*self.optimizers, *(name for points in self.points.values() for name in points))

    @property
    def titles(self) -> tuple[str, ...]:
        """The names that settings can be given for."""
        return tuple(dict.fromkeys((*self.optimizers, *self.grid)))

    def given(self, name: str) -> dict[str, Any]:
        """The settings that a run is given; what it is not given are defaults."""
        for title, points in self.points.items():
            if name in points:
                return merge(self.settings.get(title, {}), points[name])
        return dict(self.settings.get(name, {}))


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: choose one of cpu, cuda, auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there ({torch.cuda.device_count()} GPUs found): use cpu or auto")
    return device


def parse_settings(pairs: Iterable[str], names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Read "NAME.key=value" and "NAME.regularizer.key=value"; a value is a Python literal, or else a string.

    A label may hold dots and equals signs. So NAME is the longest of `names` that the pair begins with; where it begins
    with none, NAME ends at the first dot.

    >>> parse_settings(["ring.rho=1e-3", "sgd.nesterov=True", "reng.mode=finite"])
    {'ring': {'rho': 0.001}, 'sgd': {'nesterov': True}, 'reng': {'mode': 'finite'}}
    >>> parse_settings(["adamw+gnp/lr=0.01.gnp.warmup=zero"], ["adamw+gnp", "adamw+gnp/lr=0.01"])
    {'adamw+gnp/lr=0.01': {'gnp': {'warmup': 'zero'}}}
    """
    settings: dict[str, dict[str, Any]] = {}
    names = list(names)
    for pair in pairs:
        begun = [name for name in names if pair.startswith(f"{name}.")]
        name = max(begun, key=len, default=pair.partition("=")[0].partition(".")[0])
        key, equals, text = pair.removeprefix(name).partition("=")
        if not (equals and key.startswith(".") and is_key(key[1:]) and text):
            form = "OPTIMIZER.key=value, as in ring.rho=1e-3 or adamw+gnp.gnp.r=0.05"
            raise InputError(f"--set {pair!r} is malformed: write {form}")
        if name not in names:
            check_name(name)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        put(settings.setdefault(name, {}), key[1:], value)
    return settings


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a TOML recipe: the names of CompareConfig as keys, and tables such as [settings.ring] and [grid.ring].

    With a grid, only what `optimizers` names runs beside it. The path settings_from is relative to the recipe.
    """
    try:
        recipe = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read ({error}): give a TOML file") from error
    recipe = {key.replace("-", "_"): value for key, value in recipe.items()}
    kinds: dict[str, Any] = {"optimizers": list, "target": (int, float), "lr_warmup_epochs": (int, float)}
    kinds |= dict.fromkeys(("settings", "grid"), dict) | dict.fromkeys(("resume", "validation"), bool)
    kinds |= dict.fromkeys(("epochs", "seeds", "batch_size", "threads"), int)
    for key, value in recipe.items():
        choose(f"key in {path}:", key, tuple(f.name for f in fields(CompareConfig)))
        if not isinstance(value, kinds.get(key, str)):
            raise InputError(f"recipe {path}: {key} is {value!r}, of the wrong type: see grng compare --help")
    for kind in ("settings", "grid"):
        for name, table in recipe.get(kind, {}).items():
            if not isinstance(table, dict):
                raise InputError(f"recipe {path}: {kind}.{name} is {table!r}: write a table [{kind}.{name}]")
    if recipe.get("grid"):
        recipe.setdefault("optimizers", [])
    if "settings_from" in recipe:
        recipe["settings_from"] = path.parent / Path(recipe["settings_from"]).expanduser()
    return recipe


def chosen_settings(recipe: Mapping[str, Any], optimizers: Iterable[str]) -> dict[str, Any]:
    """A recipe's tables of settings without those of its optimizers that the command line leaves out.

    >>> chosen_settings({"optimizers": ["sgd", "adamw"], "settings": {"sgd": {}, "adamw": {"lr": 0.1}}}, ["adamw"])
    {'adamw': {'lr': 0.1}}
    """
    left_out = set(recipe.get("optimizers") or ()) - set(optimizers)
    return {name: table for name, table in (recipe.get("settings") or {}).items() if name not in left_out}
