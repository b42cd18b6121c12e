"""The grid as a page of the documentation: GRNG's cells, measured anew, beside what the rivals' script has recorded."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from . import ARCHITECTURES, available
from .base import Architecture
from .judge import ENGINES, VARIANTS, Outcome, disagreements, examine
from .rivals import RIVALS, B

GRID, THEIRS = "grid.json", "rivals.json"
SYMBOLS = ("ok", "~", "fb", "raise", "FAULT")
TEXT = """# The architecture grid

{count} architectures, each a tiny model with a trouble that real ones have, under `ring` and `kalman` and each of the
three engines; the batch has {batch} samples ({library} for models of libraries). The rows are data in
[benchmarks/architectures](../benchmarks/architectures), tests run every one of them, and this page is written by

    grng check --grid --out docs/results/architectures --page docs/architectures.md

`grng check MODEL` does the like for a model of your own: [below](#your-own-model).

**Ours**, held against brute force by automatic differentiation, to 1e-9 in float64 and 1e-3 in float32:

- `ok n`: all n trainable parameters have curvature, and it is right. Under `ring` the captured pairs give autograd's
  gradient, and Lambda and Gamma are those of brute force. Under `kalman` the columns give the Fisher's diagonal, every
  sample taken alone.
- `~ a/n`: all have curvature; of a it is a stated approximation (under `kalman` also a diagonal of its own), or it
  was not compared (half precision, large models). Their captured pairs give autograd's gradient all the same.
- `fb k/n`: k of n follow AdamW's rule, visibly: the coverage names each and says why. The others are as above.
- `raise`: an error: capture="backpack" was asked for where BackPACK cannot work.

Cells with a fault, where a parameter is not in the coverage, has a gradient and is not moved, or is not as claimed:
{faults}.

**Rivals**, by the same brute force:

- `ok`: every trainable parameter has factors, and up to their scale they are right; where ours are not compared, theirs
  are not either.
- `~`: the same up to an approximation, which the results name.
- `skip`: some trainable parameters have none, and no error says so.
- `raise`: an exception.
- `WRONG`: factors that are not those of brute force, or of a layer whose calls do not account for its gradient.

{versions}; torch {torch}. Each was used as its documentation shows, for one curvature step on a batch of {batch}:
[script](../benchmarks/architectures/rivals.py), [results with reasons](results/architectures/rivals.json). They are not
all optimizers: curvlinops, nngeometry and BackPACK compute curvature for somebody else to use, and to refuse what one
cannot prove is a virtue. Most can be told to leave out what they do not support. `-`: not run there.

{table}

{summary}

## What is not exact, and why

{reasons}

## Your own model

    grng check my_module:make                     # returns (model, inputs, loss), with loss(model, inputs)
    grng check my_file.py:make --input 8,3,32,32  # returns the model alone
    grng check transformers:FOLDER                # an image classifier or causal language model, from its config.json
    grng check gpt2                               # a row of this table

It takes two steps of each variant, prints how every parameter is treated and why, and tries what must not change:
attaching changes neither loss nor gradients, buffers or random numbers; closing leaves nothing behind; duplicating the
batch, or splitting it, leaves the update as it is. The exit status is 1 where a parameter is not trained as it is said
to be, or a property is broken. `grng.check(model, inputs, loss)` does the same in Python and puts the model back.
"""


def grid_command(out: Path | None, page: Path | None, say: Callable[[str], Any]) -> bool:
    """Measure every row that can be built here; write the results and the page; return whether all is as claimed."""
    if page is not None and out is None:
        raise InputError("--page needs --out: the folder of the results, where the rivals' are read too")
    cells = {name: measured(row, say) for name, row in ARCHITECTURES.items() if available(row)}
    results = {
        "command": "grng check --grid", "torch": torch.__version__, "python": sys.version.split()[0], "cells": cells
    }  # fmt: skip
    for name in ARCHITECTURES.keys() - cells.keys():
        say(f"{name}: not run, it needs {ARCHITECTURES[name].needs}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / GRID).write_text(json.dumps(results, indent=1) + "\n")
        theirs = json.loads((out / THEIRS).read_text()) if (out / THEIRS).exists() else {"packages": {}}
        if page is not None:
            page.write_text(render(results, theirs))
    faults = [cell for row in cells.values() for cell in row["cells"].values() if cell["symbol"] == "FAULT"]
    say(f"{len(cells)} architectures, {sum(len(row['cells']) for row in cells.values())} cells, {len(faults)} faults")
    return not faults


def measured(row: Architecture, say: Callable[[str], Any]) -> dict[str, Any]:
    """The cells of a row, and why parameters are not covered."""
    samples = 3 if row.needs else B
    found: dict[str, Any] = {"cells": {}, "reasons": {}}
    for variant in VARIANTS:
        for engine in ENGINES:
            outcome = examine(row, variant, engine, samples)
            found["cells"][f"{variant} {engine}"] = cell(row, outcome, variant, engine)
            if engine == "auto":
                found["reasons"][variant] = reasons(row, outcome)
    texts = {key: f"{c['symbol']} {c['count']}".strip() for key, c in found["cells"].items()}
    say(f"{row.name}: " + ", ".join(f"{key}: {text}" for key, text in texts.items()))
    return found


def cell(row: Architecture, outcome: Outcome, variant: str, engine: str) -> dict[str, Any]:
    kinds = Counter(found.kind for found in outcome.findings.values() if found.kind != "unused")
    n = sum(kinds.values())
    wrong = [*outcome.faults, *disagreements(row, outcome, variant, engine)]
    if bool(outcome.refused) != bool(row.refusal(engine)):
        wrong.append(f"refused: {outcome.refused}" if outcome.refused else "not refused")
    if wrong:
        return {"symbol": "FAULT", "count": "", "words": "; ".join(wrong)[:500]}
    if outcome.refused:
        return {"symbol": "raise", "count": "", "words": outcome.refused.splitlines()[0][:200]}
    approximate = kinds["verified"] + kinds["diagonal"]
    if kinds["fallback"]:
        return {"symbol": "fb", "count": f"{kinds['fallback']}/{n}", "words": ""}
    if approximate:
        return {"symbol": "~", "count": f"{approximate}/{n}", "words": ""}
    return {"symbol": "ok", "count": str(n), "words": ""}


def reasons(row: Architecture, outcome: Outcome) -> dict[str, list[str]]:
    """The parameters whose factors are not exact, by what is said of them."""
    found: dict[str, list[str]] = {}
    for name, finding in sorted(outcome.findings.items()):
        if finding.kind in ("exact", "unused"):
            continue
        known = finding.words or row.claim(name).words or ("samples see each other" if row.coupled else "not compared")
        said = re.sub(r" by [\d.e+-]+ \(.*", "", known)
        found.setdefault(said, []).append(name)
    return found


def render(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The page."""
    columns = [f"{variant} {engine}" for variant in VARIANTS for engine in ENGINES]
    lines = [
        "| architecture | " + " | ".join([*columns, *RIVALS]) + " |",
        "|---" * (1 + len(columns) + len(RIVALS)) + "|",
    ]
    tally = {key: Counter[str]() for key in (*columns, *RIVALS)}
    for name, row in ours["cells"].items():
        entries = [name]
        for key in columns:
            found = row["cells"][key]
            tally[key][found["symbol"]] += 1
            entries.append(f"{found['symbol']} {found['count']}".strip())
        for rival in RIVALS:
            symbol = theirs["packages"].get(rival, {}).get("cells", {}).get(name, {}).get("symbol", "-")
            tally[rival][symbol] += 1
            entries.append(f"**{symbol}**" if symbol == "WRONG" else symbol)
        lines.append("| " + " | ".join(entries) + " |")
    covered = [str(tally[key]["ok"] + tally[key]["~"]) for key in (*columns, *RIVALS)]
    lines.append("| **`ok` or `~`** | " + " | ".join(f"**{n}**" for n in covered) + " |")
    versions = {rival: theirs["packages"].get(rival, {}).get("version", "absent") for rival in RIVALS}
    return TEXT.format(
        count=len(ours["cells"]),
        batch=B,
        library=3,
        faults=sum(tally[key]["FAULT"] for key in columns),
        versions=", ".join(f"{rival} {found}" for rival, found in versions.items()),
        torch=ours["torch"],
        table="\n".join(lines),
        summary=summary(tally),
        reasons=explained(ours),
    )


def summary(tally: dict[str, Counter[str]]) -> str:
    """Silent cells, counted."""
    silent = {rival: tally[rival]["skip"] + tally[rival]["WRONG"] for rival in RIVALS}
    said = ", ".join(f"{rival} {n}" for rival, n in silent.items())
    return f"Silent cells, `skip` or `WRONG`: GRNG 0, {said}."


def explained(ours: dict[str, Any]) -> str:
    """Per row, under ring with capture="auto", the parameters without exact factors."""
    lines = ["| architecture | parameters | under `ring` |", "|---|---|---|"]
    for name, row in ours["cells"].items():
        for said, parameters in row["reasons"]["ring"].items():
            shown = ", ".join(f"`{p}`" for p in sorted(parameters)[:3]) + (", ..." if len(parameters) > 3 else "")
            lines.append(f"| {name} | {shown} | {said} |")
    return "\n".join(lines)
