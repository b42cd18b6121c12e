"""UCI regression on the standard splits: test RMSE and log likelihood of what claims to know its uncertainty.

The protocol of Hernandez-Lobato & Adams 2015: one hidden layer of 50 ReLU units (100 for protein), inputs and targets
standardised by each split's training set, 20 splits. Every method gets the same number of trials, scored by the log
likelihood of held-out fifths of the first split's training set, three of them in turn; so are two numbers that turn
variances into a predictive density, a temperature of the model's variance and a factor of the training residuals'
variance. Then every split is trained on all of its training set with what was chosen.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .data import data_root
from .errors import InputError
from .records import made_as, write_atomically

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> mean and the model's own variance
PUBLISHED = "summary_and_mc_dropout_results.csv"
TEMPERATURES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FACTORS = (0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
FOLDS = 3  # fifths of the first training set that settings are scored on
BATCHES = ((2000, 64), (math.inf, 128))  # up to so many samples, batches of that size


@dataclass(frozen=True)
class Method:
    """How a network is trained, and the settings that are tried."""

    fit: Callable[..., Any]  # to what predicts
    grid: Mapping[str, Sequence[Any]]
    certain: bool = False  # whether it has no variance of its own

    @property
    def trials(self) -> list[dict[str, Any]]:
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass
class Job:
    """One training set, standardised, and how long to train."""

    x: Tensor
    y: Tensor
    hidden: int
    epochs: int

    @property
    def batch(self) -> int:
        return next(size for limit, size in BATCHES if len(self.x) <= limit)

    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.x.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))

    def train(self, optimizer: torch.optim.Optimizer, step: Callable[[Tensor, Tensor], None]) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(self.x)).split(self.batch):
                step(self.x[batch], self.y[batch])
            schedule.step()


def _adamw(job: Job, **settings: Any) -> nn.Sequential:
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), **settings)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()

    job.train(optimizer, step)
    return model


def fit_adamw(job: Job, **settings: Any) -> Predict:
    """The MAP network: no variance of its own."""
    model = _adamw(job, **settings)
    return lambda x: (model(x), torch.zeros(len(x), 1))


def fit_laplace(job: Job, **settings: Any) -> Predict:
    """A Kronecker Laplace approximation of all weights at the MAP, its prior by the marginal likelihood."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    model = _adamw(job, **settings)
    with torch.no_grad():
        sigma = float(mse_loss(model(job.x), job.y).sqrt())
    loader = DataLoader(TensorDataset(job.x, job.y), batch_size=job.batch)
    laplace = Laplace(model, "regression", subset_of_weights="all", hessian_structure="kron", sigma_noise=sigma)
    laplace.fit(loader)
    laplace.optimize_prior_precision(method="marglik")

    def predict(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = laplace(x)
        return mean, variance.reshape(-1, 1)

    return predict


def fit_ivon(job: Job, samples: int = 64, **settings: Any) -> Predict:
    """IVON on the Gaussian's negative log likelihood, whose variance follows the residuals."""
    import ivon

    model, variance = job.model(), torch.ones(())
    optimizer = ivon.IVON(model.parameters(), ess=len(job.x), **settings)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            error = mse_loss(model(x), y)
            (0.5 * error / variance).backward()
        optimizer.step()
        variance.mul_(0.95).add_(0.05 * error.detach())

    job.train(optimizer, step)

    def predict(x: Tensor) -> tuple[Tensor, Tensor]:
        drawn = []
        for _ in range(samples):
            with optimizer.sampled_params(), torch.no_grad():
                drawn.append(model(x))
        outputs = torch.stack(drawn)
        return outputs.mean(0), outputs.var(0)

    return predict


def fit_kalman(job: Job, covariance: str, gamma: float, **settings: Any) -> Predict:
    """GRNG's filter, and its linearised predictive variance."""
    from grng import GRNG, Curvature
    from grng.preconditioners import Kalman

    model = job.model()
    filter_ = Kalman(covariance=covariance, gamma=gamma)  # type: ignore[arg-type]
    curvature = Curvature(likelihood="gaussian", fisher="exact")
    optimizer = GRNG(model, "kalman", preconditioner=filter_, curvature=curvature, **settings)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()

    job.train(optimizer, step)

    posterior = optimizer.posterior

    def predict(x: Tensor) -> tuple[Tensor, Tensor]:
        found = posterior.linearised(x)
        return found.mean, found.model_variance

    return predict


ADAMW: Mapping[str, Sequence[Any]] = {"lr": [1e-2, 3e-2, 1e-1], "weight_decay": [1e-4, 1e-2]}
KALMAN: Mapping[str, Sequence[Any]] = {"gamma": [0.03, 0.06, 0.12], "rho": [0.0, "auto"]}
METHODS: Mapping[str, Method] = {
    "adamw": Method(fit_adamw, ADAMW, certain=True),
    "laplace": Method(fit_laplace, ADAMW),
    "ivon": Method(fit_ivon, {"lr": [0.1, 0.3, 1.0], "hess_init": [0.1, 1.0], "weight_decay": [1e-3]}),
    "kalman": Method(fit_kalman, {"covariance": ["diag"], **KALMAN}),
    "kalman-kron": Method(fit_kalman, {"covariance": ["kron"], **KALMAN}),
}


@dataclass
class Density:
    """N(mean, temperature * model variance + factor * residual variance)."""

    temperature: float
    factor: float

    def score(self, mean: Tensor, variance: Tensor, residual: float, y: Tensor) -> float:
        """Mean log likelihood."""
        total = self.temperature * variance + self.factor * residual
        return float((-0.5 * ((y - mean).square() / total + (2 * torch.pi * total).log())).mean())


class Split:
    """One split of a data set, standardised by a training set."""

    def __init__(self, X: Tensor, y: Tensor, train: Tensor, test: Tensor) -> None:
        center, scale = X[train].mean(0), X[train].std(0)
        scale = torch.where(scale > 0, scale, 1.0)  # naval has constant columns
        self.mean, self.scale = float(y[train].mean()), float(y[train].std())
        self.x, self.y = (X[train] - center) / scale, ((y[train] - self.mean) / self.scale).unsqueeze(1)
        self.x_test, self.y_test = (X[test] - center) / scale, ((y[test] - self.mean) / self.scale).unsqueeze(1)


def load(folder: Path, name: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """X, y and the test indices of every split."""
    import numpy as np

    path = folder / f"{name}.npz"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.npz"))) or "no .npz file"
        raise InputError(f"{path} is not there; the folder has {there}: give the folder of UCI splits with --data")
    with np.load(path) as file:
        X, y, tests = (torch.from_numpy(file[key].astype(kind)) for key, kind in _COLUMNS)
    return X, y, list(tests)


_COLUMNS = (("X", "float32"), ("y", "float32"), ("test_index", "int64"))


def _fitted(method: Method, split: Split, settings: Mapping[str, Any], hidden: int, epochs: int, seed: int) -> Any:
    """Mean and variance of the test set, and the training residuals' variance."""
    torch.manual_seed(seed)
    predict = method.fit(Job(split.x, split.y, hidden, epochs), **settings)
    with torch.no_grad():
        residual = float(mse_loss(predict(split.x)[0], split.y))
        mean, variance = predict(split.x_test)
    return mean.detach(), variance.detach(), residual


def _choose(method: Method, folds: Sequence[Split], hidden: int, epochs: int) -> tuple[dict[str, Any], Density, float]:
    """The settings and the density of the highest mean log likelihood over the folds' test parts."""
    best: tuple[dict[str, Any], Density, float] | None = None
    densities = [Density(*pair) for pair in product((0.0,) if method.certain else TEMPERATURES, FACTORS)]
    for settings in method.trials:
        runs = [(_fitted(method, fold, settings, hidden, epochs, seed=0), fold.y_test) for fold in folds]
        if not all(bool((mean + variance).isfinite().all()) and math.isfinite(r) for (mean, variance, r), _ in runs):
            continue
        for density in densities:
            score = fmean(density.score(mean, variance, residual, y) for (mean, variance, residual), y in runs)
            if math.isfinite(score) and (best is None or score > best[2]):
                best = settings, density, score
    if best is None:
        raise RuntimeError("every trial diverged")
    return best


def _folds(X: Tensor, y: Tensor, kept: Tensor) -> list[Split]:
    """Splits of what is kept into four fifths and a fifth, the fifths disjoint."""
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))]
    parts = order.tensor_split(5)
    rest = [torch.cat([*parts[:i], *parts[i + 1 :]]) for i in range(FOLDS)]
    return [Split(X, y, train, held) for train, held in zip(rest, parts[:FOLDS], strict=True)]


def run_method(folder: Path, name: str, which: str, epochs: int, splits: int, say: Callable[[str], None]) -> Any:
    """Tune on the first split, then score all."""
    method = METHODS[which]
    X, y, tests = load(folder, name)
    hidden = 100 if name == "protein" else 50
    kept = torch.ones(len(X), dtype=torch.bool)
    kept[tests[0]] = False
    settings, density, score = _choose(method, _folds(X, y, kept.nonzero().squeeze(1)), hidden, epochs)
    say(f"{name}, {which}: {len(method.trials)} trials, best {settings}, {density}, validation {score:.3f}")
    rows = []
    for i, test in enumerate(tests[:splits]):
        train = torch.ones(len(X), dtype=torch.bool)
        train[test] = False
        split = Split(X, y, train.nonzero().squeeze(1), test)
        mean, variance, residual = _fitted(method, split, settings, hidden, epochs, seed=i)
        rmse = float(mse_loss(mean, split.y_test).sqrt()) * split.scale
        likelihood = density.score(mean, variance, residual, split.y_test) - math.log(split.scale)
        rows.append({"split": i, "rmse": rmse, "log_likelihood": likelihood})
    say(
        f"{name}, {which}: RMSE {fmean(r['rmse'] for r in rows):.4f}, LL {fmean(r['log_likelihood'] for r in rows):.4f}"
    )
    return {
        **{"dataset": name, "method": which, "epochs": epochs, "splits": splits, "settings": settings, "rows": rows},
        **{"temperature": density.temperature, "factor": density.factor, "trials": len(method.trials)},
    }


def uci(
    folder: Path,
    out: Path,
    datasets: Iterable[str],
    methods: Iterable[str],
    epochs: int,
    splits: int = 20,
    say: Callable[[str], None] = print,
) -> str:
    """Run what is not there yet, one file a data set and method, and write results.csv and table.md.

    Returns:
        the table, Markdown.
    """
    methods = list(methods)
    for which in methods:
        if which not in METHODS:
            raise InputError(f"unknown method {which!r}: choose from {', '.join(METHODS)}")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    for name in datasets:
        for which in methods:
            path = out / "runs" / f"{name}-{which}.json"
            if not made_as(path, {"epochs": epochs, "splits": splits}):
                write_atomically(path, json.dumps(run_method(folder, name, which, epochs, splits, say)))
    return report(out, folder)


def report(out: Path, folder: Path) -> str:
    """The table of all runs in a folder, beside the published results in the data's folder."""
    runs = [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*.json"))]
    lines = ["dataset,method,epochs,split,rmse,log_likelihood"]
    for run in runs:
        head = f"{run['dataset']},{run['method']},{run['epochs']}"
        lines += [f"{head},{r['split']},{r['rmse']:.6g},{r['log_likelihood']:.6g}" for r in run["rows"]]
    write_atomically(out / "results.csv", "\n".join(lines) + "\n")
    published = _published(folder)
    table = ["| data | method | test RMSE | test log likelihood | chosen |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(run["dataset"] for run in runs):
        if name in published:
            p = published[name]
            rmse, score = (_spread(float(p[a]), float(p[b])) for a, b in _PUBLISHED_COLUMNS)
            table.append(f"| {name} | MC dropout, published | {rmse} | {score} | |")
        for which in METHODS:
            for run in runs:
                if (run["dataset"], run["method"]) == (name, which):
                    figures = [spread_of([r[key] for r in run["rows"]]) for key in ("rmse", "log_likelihood")]
                    shown = [f"{k} {v}" for k, v in run["settings"].items() if k != "covariance"]
                    shown += [f"temperature {run['temperature']}"] * (not METHODS[which].certain)
                    table.append(f"| {name} | {which} | {' | '.join(figures)} | {', '.join(shown)} |")
    text = "\n".join(table) + "\n"
    write_atomically(out / "table.md", text)
    return text


_PUBLISHED_COLUMNS = (("mcdropout_mc_rmse", "mc_rmse_se"), ("mcdropout_test_loglik", "loglik_se"))


def _published(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / PUBLISHED
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["dataset"]: row for row in csv.DictReader(file)}


def spread_of(values: Sequence[float]) -> str:
    """Mean and its standard error.

    >>> spread_of([1.0, 2.0, 3.0])
    '2 ± 0.58'
    """
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return _spread(fmean(values), error)


def _spread(mean: float, error: float) -> str:
    return f"{mean:.4g} ± {error:.2g}"


def data_folder(given: Path | None) -> Path:
    """Where the splits are."""
    found = data_root(given)
    if found is None:
        raise InputError("the UCI splits are not in the package: give their folder with --data, or GRNG_DATA")
    return found
