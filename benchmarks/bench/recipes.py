"""TOML recipes of benchmarks: the options of `grng bench` as keys, settings as tables."""

import tomllib
from pathlib import Path
from typing import Any

from ..errors import InputError, choose

KINDS: dict[str, Any] = {
    **dict.fromkeys(("workloads", "optimizers"), list),
    **dict.fromkeys(("tier", "device", "clock", "aim", "targets"), str),
    **dict.fromkeys(("studies", "trials", "seeds", "threads"), int),
    **dict.fromkeys(("budget", "lr_warmup"), (int, float)),
    "settings": dict,
}


def read_bench_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: `workloads`, `optimizers`, `tier`, `studies`, `trials`, `seeds`, `budget`, `lr_warmup`, `device`,
    `threads`, `clock`, `aim`, `targets` (a file, from the recipe's folder), and tables such as [settings.adamw], whose
    `horizon` is the part of the budget that is used.

    Raises:
        InputError: it cannot be read, has another key, or a value of another type.
    """
    try:
        recipe = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read ({error}): give a TOML file") from error
    for key, value in recipe.items():
        choose(f"key in {path}:", key, tuple(KINDS))
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            raise InputError(f"recipe {path}: {key} is {value!r}, of the wrong type: see grng bench run --help")
        if isinstance(value, int) and value < 1 and key in ("studies", "trials", "seeds", "threads"):
            raise InputError(f"recipe {path}: {key} is {value!r}: give a whole number of 1 or more")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise InputError(f"recipe {path}: {key} is {value!r}: give a list of names")
    for name, table in recipe.get("settings", {}).items():
        if not isinstance(table, dict):
            raise InputError(f"recipe {path}: settings.{name} is {table!r}: write a table [settings.{name}]")
    if "targets" in recipe:
        recipe["targets"] = path.parent / Path(recipe["targets"]).expanduser()
    return recipe
