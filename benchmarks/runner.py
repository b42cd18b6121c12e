"""One run of `grng compare`: the timed loop over a data set's epochs, and the measurements taken beside it."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from statistics import fmean, median, quantiles
from typing import Any

import torch
from grng.baselines import make_optimizer, parts_of
from torch import Tensor, nn

from grng.regularizers import Passes, make_regularizers

from .data import Dataset
from .loop import (
    Stepper,
    Trace,
    closing,
    epoch_batches,
    fit,
    forked,
    make_schedule,
    state_bytes,
    warm_up,
)
from .models import build_model
from .names import optimizer_of
from .records import RunRecord, downsample, fingerprint_of

EVALUATION_BATCH = 2048


def run(record: RunRecord, data: Dataset, device: torch.device, on_epoch: Callable[[int], None]) -> None:
    """Train as `record` says, and fill in what came of it; the global generators are left as they were."""
    with forked(device):
        train(record, data, device, on_epoch)


def train(record: RunRecord, data: Dataset, device: torch.device, on_epoch: Callable[[int], None]) -> None:
    config = record.config
    record.metric, record.scored_on = data.metric, data.scored_on
    torch.manual_seed(record.seed)
    model = build_model(config["model"], data.shape, data.outputs).to(device)
    record.parameters = sum(p.numel() for p in model.parameters())
    record.init_hash = fingerprint_of(*model.state_dict().values())
    batch = min(config["batch_size"], len(data.x_train))
    epochs = [epoch_batches(len(data.x_train), batch, record.seed, epoch) for epoch in range(config["epochs"])]
    record.batch_hash = fingerprint_of(*epochs)

    given = completed(record.given, len(epochs[0]))
    make = lambda model: make_optimizer(optimizer_of(record.optimizer), model, **given)  # noqa: E731
    loss = lambda model, batch: data.loss(model(batch[0]), batch[1])  # noqa: E731
    first = data.x_train[:batch], data.y_train[:batch]
    some = data.x_test[:batch], data.y_test[:batch]
    warm_up(model, make, loss, first, config["lr_schedule"], lambda model: evaluate(model, data, *some))
    torch.manual_seed(record.seed)
    gc.collect()
    with closing(make(model)) as optimizer:
        record.settings = as_built(record.optimizer, optimizer.defaults, given)
        stepper = Stepper(model, optimizer, loss)
        per_epoch = len(epochs[0])
        rising = round(config["lr_warmup_epochs"] * per_epoch)
        schedule = make_schedule(config["lr_schedule"], optimizer, len(epochs) * per_epoch, rising)

        def epoch_ended(trace: Trace) -> None:
            epoch = len(trace.losses) // per_epoch
            record.seconds = trace.seconds
            add_epoch(record, model, data, epoch, trace.losses[-per_epoch:])
            on_epoch(epoch)
            if trace.diverged:
                record.status, record.message = "diverged", f"the training loss is not finite in epoch {epoch}"

        batches = in_order(epochs, data, device)
        trace = fit(stepper, schedule, batches, len(epochs) * per_epoch, per_epoch, device, epoch_ended)
        record.peak_memory = trace.peak_memory
        finish(record, stepper, trace.losses, trace.step_seconds)
        record.train_loss = evaluate(model, data, data.x_train, data.y_train)[0]


def in_order(epochs: list[Tensor], data: Dataset, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all epochs."""
    for indices in epochs:
        for chosen in indices.to(device):
            yield data.x_train[chosen], data.y_train[chosen]


def completed(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The settings of a run whose epochs have `steps` steps, told to the warm-ups that are counted in epochs.

    >>> completed({"lr": 0.1, "gnp": {"warmup": "zero", "warmup_epochs": 2}}, 20)["gnp"]
    {'steps_per_epoch': 20, 'warmup': 'zero', 'warmup_epochs': 2}
    """
    return {
        key: {"steps_per_epoch": steps, **value} if isinstance(value, Mapping) and "warmup_epochs" in value else value
        for key, value in given.items()
    }


def as_built(name: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, defaults included; of its regularizers those that say what they do, and what is given.

    >>> as_built("sgd+sam", {"lr": 0.1}, {"sam": {"r": 0.2}})
    {'lr': 0.1, 'sam': {'r': 0.2, 'alpha': 1.0, 'first': 'raw'}}
    """
    built = {**defaults, **given}
    shared = {f.name for f in fields(Passes)}
    for key in parts_of(optimizer_of(name))[1]:
        parts = make_regularizers(key, **given.get(key, {}))
        own = {k: v for part in parts for k, v in vars(part).items() if k not in shared}
        built[key] = {k: v for k, v in {**own, **given.get(key, {})}.items() if v is not None}
    return {k: v for k, v in built.items() if v is not None}


def add_epoch(record: RunRecord, model: nn.Module, data: Dataset, epoch: int, losses: list[float]) -> None:
    record.test_loss, record.test_metric = evaluate(model, data, data.x_test, data.y_test)
    record.epochs.append(
        {
            "epoch": epoch,
            "seconds": record.seconds,
            "train_loss": fmean(losses),
            "test_loss": record.test_loss,
            "test_metric": record.test_metric,
        }
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean loss and metric (accuracy, or RMSE in the targets' units) in evaluation mode."""
    model.eval()
    sums = torch.zeros(2, device=inputs.device, dtype=torch.float64)
    for x, y in zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True):
        output = model(x)
        if data.target_scale is None:
            score = (output.argmax(1) == y).double().mean()
        else:
            score = ((output - y) * data.target_scale).square().double().mean()
        sums += torch.stack([data.loss(output, y).double(), score]) * len(x)
    model.train()
    loss, score = (sums / len(inputs)).tolist()
    return loss, score if data.target_scale is None else math.sqrt(score)


def finish(record: RunRecord, stepper: Stepper, losses: list[float], seconds: list[float]) -> None:
    """Fill in the curve, the time of a step, and what the optimizer says of itself."""
    record.steps, record.gradient_evaluations = len(losses), stepper.evaluations
    elapsed = torch.tensor(seconds, dtype=torch.float64).cumsum(0).tolist()
    steps = [float(step) for step in range(1, len(losses) + 1)]
    record.curve = {"step": downsample(steps), "seconds": downsample(elapsed), "loss": downsample(losses)}
    p99 = quantiles(seconds, n=100, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    record.step_seconds = {"median": median(seconds), "mean": fmean(seconds), "p99": p99}
    optimizer = stepper.optimizer
    record.state_bytes = state_bytes(optimizer)
    if hasattr(optimizer, "coverage"):
        record.coverage = str(optimizer.coverage())
    if hasattr(optimizer, "diagnostics"):
        record.diagnostics = {
            name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for name, value in optimizer.diagnostics.items()
        }
