"""How wide is the range of p0 in which the Kalman filter trains, with its regularisation and without."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .data import Dataset, load_data
from .models import build_model
from .records import write_atomically

P0 = tuple(10.0 ** (k / 2) for k in range(-12, 5))
GAMMAS = (0.03, 0.1, 0.3)
SUCCESS = 0.9


def accuracy(data: Dataset, covariance: str, p0: float, gamma: float, rho: float, seed: int, epochs: int) -> float:
    """Test accuracy of the digits' MLP; 0 where a parameter is no longer finite."""
    from grng import GRNG
    from grng.preconditioners import Kalman

    torch.manual_seed(seed)
    model = build_model("mlp", data.shape, data.outputs)
    filter_ = Kalman(p0=p0, gamma=gamma, covariance=covariance)  # type: ignore[arg-type]
    with GRNG(model, "kalman", rho=rho, preconditioner=filter_) as optimizer:
        for _ in range(epochs):
            for batch in torch.randperm(len(data.x_train)).split(64):
                optimizer.zero_grad()
                data.loss(model(data.x_train[batch]), data.y_train[batch]).backward()
                optimizer.step()
    with torch.no_grad():
        f = model(data.x_test)
    return float((f.argmax(1) == data.y_test).float().mean()) if bool(f.isfinite().all()) else 0.0


def fixed_rho(data: Dataset) -> float:
    """The rho that the default settles on for this problem: the same for the whole grid, whatever p0 is."""
    from grng import GRNG

    torch.manual_seed(0)
    model = build_model("mlp", data.shape, data.outputs)
    with GRNG(model, "kalman") as optimizer:
        data.loss(model(data.x_train[:64]), data.y_train[:64]).backward()
        optimizer.step()
        return float(f"{float(optimizer.diagnostics['rho']):.2g}")


def robustness(out: Path, seeds: int = 3, epochs: int = 8, say: Callable[[str], None] = print) -> str:
    """Run the grid, and write results.json, p0.png and table.md.

    Returns:
        the table, Markdown: in how much of the grid of p0 the filter reaches 90 %.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = load_data("digits")
    strength = fixed_rho(data)
    found: list[dict[str, Any]] = []
    for covariance in ("diag", "kron"):
        for gamma in GAMMAS:
            for rho in (0.0, strength):
                curve = [
                    fmean(accuracy(data, covariance, p0, gamma, rho, seed, epochs) for seed in range(seeds))
                    for p0 in P0
                ]
                found.append({"covariance": covariance, "gamma": gamma, "rho": rho, "accuracy": curve})
                say(f"{covariance}, gamma {gamma}, rho {rho}: {sum(a >= SUCCESS for a in curve)} of {len(P0)} p0 train")
    write_atomically(out / "results.json", json.dumps({"p0": P0, "seeds": seeds, "epochs": epochs, "runs": found}))
    draw(out / "p0.png", found)
    lines = ["| covariance | gamma | rho | p0 that reach 90 % | best accuracy |", "| --- | --- | --- | --- | --- |"]
    for run in found:
        good = [p for p, a in zip(P0, run["accuracy"], strict=True) if a >= SUCCESS]
        shown = f"{len(good)} of {len(P0)}" + (f" ({good[0]:.1g} to {good[-1]:.1g})" if good else "")
        best = 100 * max(run["accuracy"])
        lines.append(f"| {run['covariance']} | {run['gamma']} | {run['rho']} | {shown} | {best:.1f} % |")
    text = "\n".join(lines) + "\n"
    write_atomically(out / "table.md", text)
    return text


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """Accuracy over p0: one panel a covariance and gamma, with rho and without."""
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    from .plots import STYLE

    with rc_context(STYLE):
        figure, axes = plt.subplots(2, len(GAMMAS), figsize=(11, 6), sharex=True, sharey=True, layout="constrained")
        for run in found:
            ax = axes[("diag", "kron").index(run["covariance"])][GAMMAS.index(run["gamma"])]
            label, style = (f"rho = {run['rho']}", "-") if run["rho"] else ("rho = 0", "--")
            colour = "#009E73" if run["rho"] else "#D55E00"
            ax.plot(P0, [100 * a for a in run["accuracy"]], style, color=colour, marker="o", ms=3.5, label=label)
            ax.axhline(100 * SUCCESS, color="#AAAAAA", lw=0.8)
            ax.set(xscale="log", title=f"{run['covariance']}, gamma = {run['gamma']}")
        for ax in axes[-1]:
            ax.set_xlabel("p0")
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy, %")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        figure.savefig(path, dpi=110)
        plt.close(figure)
