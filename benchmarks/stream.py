"""Online learning: handwritten digits that come one by one, once, while the picture wanders; every sample is first
predicted, then learnt from (prequential accuracy; the setting of LoKO's stream experiments)."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .errors import InputError
from .records import write_atomically
from .uci import spread_of

EVERY = 300  # samples until all columns of pixels have moved on by one


def drifting_digits(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The 1,797 digits in a random order, (1, 64) in [0, 1] and (1,); the pixels move one column every 300 samples."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for t, i in enumerate(order.tolist()):
        yield x[i].roll(t // EVERY, 1).view(1, 64), y[i : i + 1]


def _kalman(model: nn.Module, covariance: str, gamma: float) -> torch.optim.Optimizer:
    from grng import GRNG
    from grng.preconditioners import Kalman

    return GRNG(model, "kalman", preconditioner=Kalman(covariance=covariance, gamma=gamma))  # type: ignore[arg-type]


Make = Callable[[nn.Module], torch.optim.Optimizer]


def _plain(cls: Callable[..., torch.optim.Optimizer], lr: float) -> Make:
    return lambda model: cls(model.parameters(), lr=lr)


def _filter(covariance: str, gamma: float) -> Make:
    return lambda model: _kalman(model, covariance, gamma)


METHODS: Mapping[str, Make] = {
    **{f"sgd, lr {lr}": _plain(torch.optim.SGD, lr) for lr in (0.03, 0.1, 0.3)},
    **{f"adamw, lr {lr}": _plain(torch.optim.AdamW, lr) for lr in (1e-3, 3e-3, 1e-2, 3e-2)},
    **{f"kalman {c}, gamma {gamma}": _filter(c, gamma) for c in ("diag", "kron") for gamma in (0.0, 1e-4, 1e-3)},
}


def accuracies(make: Make, seed: int) -> list[float]:
    """Share of digits predicted right before they were learnt, of every 300 in turn, and of all."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer, hits = make(model), []
    for x, y in drifting_digits(seed):
        optimizer.zero_grad()
        f = model(x)
        hits.append(float(f.argmax(1) == y))
        cross_entropy(f, y).backward()
        optimizer.step()
    parts = [fmean(hits[i : i + EVERY]) for i in range(0, len(hits), EVERY)]
    return [*parts, fmean(hits)]


def stream(out: Path, seeds: int = 5, say: Callable[[str], None] = print) -> str:
    """Run every method that is not there yet, and write results.json and table.md.

    Returns:
        the table, Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    known: dict[str, Any] = {}
    if path.exists():
        before = json.loads(path.read_text())
        if before["seeds"] != seeds:
            raise InputError(f"{path} holds {before['seeds']} seeds, not {seeds}: choose another folder with --out")
        known = before["accuracies"]
    for name, make in METHODS.items():
        if name not in known:
            known[name] = [accuracies(make, seed) for seed in range(seeds)]
            write_atomically(path, json.dumps({"seeds": seeds, "accuracies": known}))
        say(f"{name}: {100 * fmean(run[-1] for run in known[name]):.1f} %")
    found = {name: known[name] for name in METHODS}
    lines = ["| optimizer | accuracy | first 300 | last 300 |", "| --- | --- | --- | --- |"]
    for name, runs in found.items():
        columns = ([100 * run[i] for run in runs] for i in (-1, 0, -2))
        lines.append(f"| {name} | " + " | ".join(f"{spread_of(values)} %" for values in columns) + " |")
    text = "\n".join(lines) + "\n"
    write_atomically(out / "table.md", text)
    return text
