"""What a step of the Kalman filter costs beside AdamW's: time, memory, and operations counted by hand."""

import gc
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .records import write_atomically

BATCH = 128
DEPTH = 3  # hidden layers
SECONDS = 20.0  # a method whose first step takes longer is given up for this size; otherwise what it is given in all

# Widths whose networks have about 1e4, 1e5, 1e6, 1e7 parameters.
WIDTHS = {10**4: 32, 10**5: 128, 10**6: 560, 10**7: 2000}
INPUTS = 256


def network(width: int, classes: int) -> nn.Sequential:
    sizes = [INPUTS, *[width] * DEPTH, classes]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _kalman(model: nn.Module, fisher: str = "mc", **settings: Any) -> torch.optim.Optimizer:
    from grng import GRNG, Curvature
    from grng.preconditioners import Kalman

    return GRNG(model, "kalman", preconditioner=Kalman(**settings), curvature=Curvature(fisher=fisher))  # type: ignore[arg-type]


METHODS: Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters()),
    "grouped, m = 8": lambda m: _kalman(m, groups=8),
    "grouped, m = 16": lambda m: _kalman(m, groups=16),
    "kron": lambda m: _kalman(m, covariance="kron"),
    "sample": lambda m: _kalman(m, columns="sample"),
    "exact": lambda m: _kalman(m, fisher="exact"),
}


def operations(name: str, model: nn.Sequential, classes: int) -> float:
    """Floating-point operations of a step beyond forward and backward, leading terms: of V, its products, the step."""
    shapes = [m.weight.shape for m in model if isinstance(m, nn.Linear)]
    d, sides = sum(a * b for a, b in shapes), [(a, b) for a, b in shapes]
    B = BATCH
    if name == "adamw":
        return 12.0 * d
    drawn = 2 * B * d  # the nested pass
    if name.startswith("grouped"):
        m = int(name.split("= ")[1])
        return float(drawn + 2 * m * m * d + 3 * 2 * B * d)  # V, its squares by sample, the step
    if name == "kron":
        rows = sum(4 * B * (a * a + b * b) + 2 * B * B * (a + b) for a, b in sides)
        return float(drawn + rows + sum(2 * a * b * (a + b) for a, b in sides) + 4 * B * d)
    m = B * (classes if name == "exact" else 1)
    return float(drawn * (classes if name == "exact" else 1) + 2 * m * m * d + 4 * m * d)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


def times(size: int, classes: int, rounds: int = 9) -> dict[str, float | None]:
    """Median milliseconds of a step of every method, in turns within one run; None where it was given up."""
    x, y = torch.randn(BATCH, INPUTS), torch.randint(classes, (BATCH,))
    running: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for name, make in METHODS.items():
        torch.manual_seed(0)
        model = network(WIDTHS[size], classes)
        if operations(name, model, classes) > 2e12:  # tens of seconds, or no memory for the columns
            continue
        running[name] = model, make(model)
        start = time.perf_counter()
        _step(*running[name], x, y)
        if time.perf_counter() - start > SECONDS:
            del running[name]
    for _ in range(2):
        for pair in running.values():
            _step(*pair, x, y)
    for _ in range(rounds):
        for name, pair in running.items():
            if sum(found[name]) > 1e3 * SECONDS:
                continue
            start = time.perf_counter()
            _step(*pair, x, y)
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) if values else None for name, values in found.items()}


def peak_memory(name: str, size: int, classes: int) -> float:
    """Peak resident megabytes of a process of its own that makes two steps."""
    imports = "import grng.baselines; from grng.benchmarks.step_cost import resident"
    code = f"{imports}; print(resident({name!r}, {size}, {classes}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident(name: str, size: int, classes: int) -> float:
    """Megabytes that this process comes to by two steps, beyond what it had before there was a model."""
    before = _high_water()
    torch.manual_seed(0)
    model = network(WIDTHS[size], classes)
    optimizer = METHODS[name](model)
    x, y = torch.randn(BATCH, INPUTS), torch.randint(classes, (BATCH,))
    for _ in range(2):
        _step(model, optimizer, x, y)
    return _high_water() - before


def _high_water() -> float:
    """The most megabytes this process has held; Linux counts its parent's in ru_maxrss, but not here."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(float(line.split()[1]) / 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(sizes: list[int], classes: list[int], memory: bool) -> Iterator[dict[str, Any]]:
    for size in sizes:
        for C in classes:
            model = network(WIDTHS[size], C)
            parameters = sum(p.numel() for p in model.parameters())
            found = times(size, C)
            gc.collect()
            for name, ms in found.items():
                yield {
                    **{"parameters": parameters, "classes": C, "method": name, "ms": ms},
                    **{"ratio": None if ms is None else ms / found["adamw"]},  # type: ignore[operator]
                    **{"operations": operations(name, model, C), "pass": 6.0 * BATCH * parameters},
                    **{"megabytes": peak_memory(name, size, C) if memory and ms is not None else None},
                }


def step_cost(out: Path, sizes: list[int], classes: list[int], memory: bool, say: Callable[[str], None]) -> str:
    """Measure, and write results.json and table.md.

    Returns:
        the table, Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    head = "| parameters | classes | method | ms/step | × adamw | operations, × forward and backward | peak memory |"
    lines, found = [head, "| --- | --- | --- | --- | --- | --- | --- |"], []
    for row in rows(sizes, classes, memory):
        found.append(row)
        work = f"{row['operations'] / row['pass']:.2g}"
        if row["ms"] is None:
            shown = ["given up", "", work, ""]
        else:
            size = "" if row["megabytes"] is None else f"{row['megabytes']:.0f} MB"
            shown = [f"{row['ms']:.3g}", f"{row['ratio']:.1f}", work, size]
        lines.append(f"| {row['parameters']:,} | {row['classes']} | {row['method']} | " + " | ".join(shown) + " |")
        say(lines[-1])
    environment = {"threads": torch.get_num_threads(), "torch": torch.__version__, "batch": BATCH}
    write_atomically(out / "results.json", json.dumps({**environment, "rows": found}))
    text = "\n".join(lines) + "\n"
    write_atomically(out / "table.md", text)
    return text
