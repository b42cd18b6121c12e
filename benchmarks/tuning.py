"""Grids of settings: their points, and the best point of each."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .errors import InputError
from .names import flat, put
from .records import RunRecord, write_atomically

BEST = "best.toml"


def expand(name: str, axes: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """All combinations of the values of each setting, by the name of the run.

    >>> expand("adamw+gnp", {"lr": [1e-3, 3e-3], "gnp.r": [0.02]})["adamw+gnp/lr=0.003,gnp.r=0.02"]
    {'lr': 0.003, 'gnp': {'r': 0.02}}
    """
    if not axes:
        raise InputError(f"the grid of {name!r} is empty: give lists of values, as in lr = [1e-3, 3e-3]")
    for key, values in axes.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"grid of {name!r}: {key} is {values!r}: give a list of values, as in [1e-3, 3e-3]")
    points: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        settings: dict[str, Any] = {}
        for key, value in zip(axes, values, strict=True):
            put(settings, key, value)
        label = ",".join(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        points[f"{name}{',' if '/' in name else '/'}{label}"] = settings
    return points


def best_of(names: Iterable[str], records: Sequence[RunRecord], seeds: int) -> str | None:
    """The name with the highest mean accuracy, or the lowest mean RMSE; a tie goes to the lower mean loss.

    A name that was scored on fewer seeds than another comes after it: the mean of the seeds that went well is no mean.
    None where nothing was scored.
    """
    ranks = {}
    for name in names:
        runs = [r for r in records if r.optimizer == name and r.seed < seeds and r.status != "failed"]
        metrics = [r.test_metric for r in runs if r.test_metric is not None]
        losses = [math.inf if r.test_loss is None else r.test_loss for r in runs]
        if metrics:
            sign = -1 if runs[0].metric == "accuracy" else 1
            ranks[name] = (-len(metrics), sign * fmean(metrics), fmean(losses))
    return min(ranks, key=lambda name: ranks[name]) if ranks else None


def write_best(out: Path, best: Mapping[str, dict[str, Any] | None], head: str) -> None:
    """Write best.toml: the settings of the best point of every grid, as tables for a recipe."""
    lines = [f"# {head}"]
    for name, settings in best.items():
        if settings is None:
            lines += ["", f"# {name}: no point of the grid was scored"]
            continue
        inner = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
        own = {key: value for key, value in settings.items() if key not in inner}
        for path, table in (([name], own), *(([name, key], value) for key, value in inner.items())):
            lines += ["", f"[settings.{'.'.join(map(bare, path))}]"]
            lines += [f"{bare(key)} = {toml(value)}" for key, value in table.items()]
    write_atomically(out / BEST, "\n".join(lines) + "\n")


def bare(key: str) -> str:
    """`key` as TOML writes keys, in quotes where it must.

    >>> bare("gnp"), bare("adamw+gnp")
    ('gnp', '"adamw+gnp"')
    """
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key)


def toml(value: Any) -> str:
    """A setting as TOML writes it; raise InputError for what TOML cannot hold, such as None.

    >>> toml({"lr": 1e-3, "betas": (0.9, 0.99), "nesterov": True})
    '{ lr = 0.001, betas = [0.9, 0.99], nesterov = true }'
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{bare(key)} = {toml(item)}' for key, item in value.items())} }}"
    raise InputError(f"the setting {value!r} cannot be written to {BEST}: beside a grid, leave it out of the settings")


def describe_points(name: str, points: Mapping[str, Mapping[str, Any]], best: str | None) -> str:
    """One grid in one line of the report."""
    chosen = "none was scored" if best is None else ", ".join(f"{k}={v}" for k, v in flat(points[best]).items())
    return f"{name}: {len(points)} points, best {chosen}"
