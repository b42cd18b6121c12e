"""What a comparison is made of, checked once before anything runs."""

import ast
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from grng.baselines import OPTIMIZERS

from .errors import InputError, choose
from .models import MODELS

DEFAULT_OPTIMIZERS = ("ring", "reng", "kalman", "kfac", "ekfac", "sgd-momentum", "adamw")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class CompareConfig:
    """One comparison: every optimizer trains `model` on `data` from the same weights and batches, seed by seed.

    One CPU thread by default: steps this small gain little from more, and on a busy machine lose tenfold now and then,
    as a thread waits for another that is not running.
    """

    data: str = "digits"
    model: str = "mlp"
    optimizers: tuple[str, ...] = DEFAULT_OPTIMIZERS
    epochs: int = 25
    seeds: int = 5
    batch_size: int = 64
    lr_schedule: str = "cosine"
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
        if not self.optimizers:
            raise InputError(f"no optimizer given: choose among {', '.join(OPTIMIZERS)}")
        for name in self.optimizers:
            choose("optimizer", name, tuple(OPTIMIZERS))
        for name in self.settings:
            if name not in self.optimizers:
                raise InputError(f"settings for {name!r}, which takes no part: choose {', '.join(self.optimizers)}")
        for name in ("epochs", "seeds", "batch_size", "threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name.replace('_', '-')} is {value!r}: give a whole number of 1 or more")
        if not 0 < self.target <= 1:
            raise InputError(f"target is {self.target!r}: give an accuracy between 0 and 1")


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


def parse_settings(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read "OPT.key=value" pairs; a value is a Python literal, or else a string.

    >>> parse_settings(["ring.rho=1e-3", "sgd.nesterov=True", "reng.mode=finite"])
    {'ring': {'rho': 0.001}, 'sgd': {'nesterov': True}, 'reng': {'mode': 'finite'}}
    """
    settings: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        target, equals, text = pair.partition("=")
        name, dot, key = target.partition(".")
        if not (equals and dot and key.isidentifier() and text):
            raise InputError(f"--set {pair!r} is malformed: write OPTIMIZER.key=value, as in ring.rho=1e-3")
        choose("optimizer", name, tuple(OPTIMIZERS))
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        settings.setdefault(name, {})[key] = value
    return settings


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a TOML recipe: the names of CompareConfig as keys, and the settings as tables such as [settings.ring]."""
    try:
        recipe = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read ({error}): give a TOML file") from error
    recipe = {key.replace("-", "_"): value for key, value in recipe.items()}
    kinds: dict[str, Any] = {"optimizers": list, "settings": dict, "target": (int, float), "resume": bool, "out": str}
    kinds |= dict.fromkeys(("epochs", "seeds", "batch_size", "threads"), int)
    for key, value in recipe.items():
        choose(f"key in {path}:", key, tuple(f.name for f in fields(CompareConfig)))
        if not isinstance(value, kinds.get(key, str)):
            raise InputError(f"recipe {path}: {key} is {value!r}, of the wrong type: see grng compare --help")
    for name, table in recipe.get("settings", {}).items():
        if not isinstance(table, dict):
            raise InputError(f"recipe {path}: settings.{name} is {table!r}: write a table [settings.{name}]")
    return recipe
