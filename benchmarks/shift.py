"""Calibration on one data set and what is said of another: train on MNIST, look at Fashion-MNIST.

Every method has the same number of trials, scored by the log likelihood of a held-out tenth of the training set. So is
one number that every trained network leaves open: the temperature of AdamW's softmax, that of the filter's covariance;
the Laplace approximation's prior comes from its marginal likelihood, IVON's from its own settings.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from .calibration import calibration_error
from .data import Dataset, hold_out, load_data, load_shifted
from .errors import InputError
from .records import made_as, write_atomically
from .uci import Method, spread_of

Predict = Callable[[Tensor], Tensor]  # images -> probabilities
BATCH = 128
METRICS = ("accuracy", "NLL", "Brier", "ECE", "AUROC")
TEMPERATURES = {"softmax": (0.8, 1.0, 1.2, 1.5, 2.0), "covariance": (1e-6, 0.1, 1.0, 10.0, 100.0)}


@dataclass
class Job:
    """Inputs (n, features) and classes, and how long to train."""

    x: Tensor
    y: Tensor
    classes: int
    epochs: int

    def model(self) -> nn.Sequential:
        sizes = (self.x.shape[1], 256, 256, self.classes)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def train(self, optimizer: torch.optim.Optimizer, step: Callable[[Tensor, Tensor], None]) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * -(-len(self.x) // BATCH))
        for _ in range(self.epochs):
            for batch in torch.randperm(len(self.x)).split(BATCH):
                step(self.x[batch], self.y[batch])
                schedule.step()


def _trained(job: Job, make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[nn.Sequential, Any]:
    model = job.model()
    optimizer = make(model)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    job.train(optimizer, step)
    return model, optimizer


def fit_adamw(job: Job, **settings: Any) -> dict[str, Predict]:
    """One predictor for every temperature of the softmax."""
    model, _ = _trained(job, lambda m: torch.optim.AdamW(m.parameters(), **settings))

    def at(temperature: float) -> Predict:
        return lambda x: (model(x) / temperature).softmax(1)

    return {f"temperature {t:g}": at(t) for t in TEMPERATURES["softmax"]}


def fit_laplace(job: Job, **settings: Any) -> dict[str, Predict]:
    """A Kronecker Laplace approximation of the last layer at the MAP."""
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    model, _ = _trained(job, lambda m: torch.optim.AdamW(m.parameters(), **settings))
    laplace = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")
    laplace.fit(DataLoader(TensorDataset(job.x, job.y), batch_size=BATCH))
    laplace.optimize_prior_precision(method="marglik")
    return {"": lambda x: laplace(x, link_approx="probit")}


def fit_ivon(job: Job, samples: int = 32, **settings: Any) -> dict[str, Predict]:
    """The mean of the probabilities over draws."""
    import ivon

    model = job.model()
    optimizer = ivon.IVON(model.parameters(), ess=len(job.x), **settings)

    def step(x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
        optimizer.step()

    job.train(optimizer, step)

    def predict(x: Tensor) -> Tensor:
        total = torch.zeros(len(x), job.classes)
        for _ in range(samples):
            with optimizer.sampled_params():
                total += model(x).softmax(1)
        return total / samples

    return {"": predict}


def fit_kalman(job: Job, covariance: str, gamma: float, rho: Any) -> dict[str, Predict]:
    """One predictor for every temperature of the covariance."""
    from grng import GRNG
    from grng.preconditioners import Kalman

    filter_ = Kalman(covariance=covariance, gamma=gamma)  # type: ignore[arg-type]
    _, optimizer = _trained(job, lambda m: GRNG(m, "kalman", rho=rho, preconditioner=filter_))
    posterior = optimizer.posterior

    def at(temperature: float) -> Predict:
        return lambda x: posterior.linearised(x, temperature=temperature).mean

    return {f"temperature {t:g}": at(t) for t in TEMPERATURES["covariance"]}


ADAMW: Mapping[str, Sequence[Any]] = {"lr": [1e-3, 3e-3], "weight_decay": [1e-2, 1e-1]}
KALMAN: Mapping[str, Sequence[Any]] = {"gamma": [0.01, 0.03], "rho": [0.0, "auto"]}
METHODS: Mapping[str, Method] = {
    "adamw": Method(fit_adamw, ADAMW),
    "laplace": Method(fit_laplace, ADAMW),
    "ivon": Method(fit_ivon, {"lr": [0.1, 0.2], "hess_init": [0.1, 0.5], "weight_decay": [1e-4]}),
    "kalman": Method(fit_kalman, {"covariance": ["diag"], **KALMAN}),
    "kalman-kron": Method(fit_kalman, {"covariance": ["kron"], **KALMAN}),
}


def measures(p: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy, NLL, Brier score and calibration error of probabilities (n, C) for classes (n,)."""
    return {
        "accuracy": float((p.argmax(1) == y).float().mean()),
        "NLL": float(-p.gather(1, y.unsqueeze(1)).clamp(min=1e-12).log().mean()),
        "Brier": float((p - one_hot(y, p.shape[1])).square().sum(1).mean()),
        "ECE": calibration_error(p, y),
    }


def unlike(inside: Tensor, outside: Tensor) -> float:
    """The area under the ROC of the entropy of probabilities, as a sign of what is not from the data set."""
    from torchmetrics.functional.classification import binary_auroc

    entropy = torch.cat([-torch.special.xlogy(p, p).sum(1) for p in (inside, outside)])
    truth = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return float(binary_auroc(entropy / entropy.max().clamp(min=1e-12), truth))


@torch.no_grad()
def _probabilities(predict: Predict, x: Tensor) -> Tensor:
    return torch.cat([predict(part).detach() for part in x.split(1000)])


def _job(data: Dataset, epochs: int) -> Job:
    return Job(data.x_train.flatten(1), data.y_train, data.outputs, epochs)


def run_method(which: str, data: Dataset, foreign: Tensor, epochs: int, seeds: int, say: Callable[[str], None]) -> Any:
    """Tune with one seed on held-out data, then score with several."""
    method, held = METHODS[which], hold_out(data)
    best: tuple[float, dict[str, Any], str] | None = None
    for settings in method.trials:
        torch.manual_seed(0)
        for name, predict in method.fit(_job(held, epochs), **settings).items():
            score = -measures(_probabilities(predict, held.x_test.flatten(1)), held.y_test)["NLL"]
            if math.isfinite(score) and (best is None or score > best[0]):
                best = score, settings, name
    if best is None:
        raise RuntimeError("every trial diverged")
    say(f"{which}: {len(method.trials)} trials, best {best[1]} {best[2]}, validation {best[0]:.4f}")
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        predict = method.fit(_job(data, epochs), **best[1])[best[2]]
        inside, outside = (_probabilities(predict, x.flatten(1)) for x in (data.x_test, foreign))
        runs.append({**measures(inside, data.y_test), "AUROC": unlike(inside, outside)})
    return {"method": which, "settings": best[1], "predictor": best[2], "runs": runs}


def shift(
    data: str, other: str, out: Path, methods: Sequence[str], epochs: int, seeds: int, say: Callable[[str], None]
) -> str:
    """Run what is not there yet, one file a method, and write table.md.

    Returns:
        the table, Markdown.
    """
    for which in methods:
        if which not in METHODS:
            raise InputError(f"unknown method {which!r}: choose from {', '.join(METHODS)}")
    inside, foreign = load_data(data), load_shifted(data, other).x_test
    if inside.metric != "accuracy":
        raise InputError(f"{data} is regressed on: give a data set with classes")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    asked = {"data": data, "other": other, "epochs": epochs, "seeds": seeds}
    for which in methods:
        path = out / "runs" / f"{which}.json"
        if not made_as(path, asked):
            found = run_method(which, inside, foreign, epochs, seeds, say)
            write_atomically(path, json.dumps(asked | found))
    text = report(out)
    write_atomically(out / "table.md", text)
    return text


def report(out: Path) -> str:
    """The table of all runs in a folder."""
    lines = ["| method | " + " | ".join(METRICS) + " | chosen |", "| --- |" + " --- |" * (len(METRICS) + 1)]
    for which in METHODS:
        path = out / "runs" / f"{which}.json"
        if path.exists():
            run = json.loads(path.read_text())
            figures = [spread_of([r[metric] for r in run["runs"]]) for metric in METRICS]
            chosen = [f"{k} {v}" for k, v in run["settings"].items() if k != "covariance"]
            chosen += [run["predictor"]] * bool(run["predictor"])
            lines.append(f"| {which} | " + " | ".join(figures) + f" | {', '.join(chosen)} |")
    return "\n".join(lines) + "\n"
