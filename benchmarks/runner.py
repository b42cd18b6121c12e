"""One run: the timed loop, and the measurements taken beside it.

On the clock: picking the batch, forward, backward, the optimizer and the schedule. Off the clock: evaluation, moving
losses to the host, logging, files. Before the clock starts every optimizer alike makes a few steps on copies that are
then thrown away, so that no method alone pays for first calls.
"""

import copy
import gc
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter
from typing import Any

import torch
from grng.baselines import make_optimizer, parts_of
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from grng.regularizers import Passes, make_regularizers

from .data import Dataset
from .models import build_model
from .names import optimizer_of
from .records import RunRecord, downsample

WARM_UP_STEPS = 3
EVALUATION_BATCH = 2048


class Stepper:
    """One training step, by closure for the optimizers that ask for one; counts the gradients evaluated."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.by_closure = getattr(optimizer, "requires_closure", False)
        self.evaluations = 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        def closure() -> Any:  # torch.optim types the closure's loss as a float, and passes on the tensor
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            self.evaluations += 1
            return loss

        if self.by_closure:
            return torch.as_tensor(self.optimizer.step(closure)).detach()
        loss = closure().detach()
        self.optimizer.step()
        return loss


class Clock:
    """Reads the time step by step; on a GPU by events in its queue, so that no reading makes the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: list[Any] = []

    def start(self) -> None:
        self.readings.clear()
        synchronise(self.device)
        self.begun = perf_counter()
        self.tick()

    def tick(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.readings.append(event)
        else:
            self.readings.append(perf_counter())

    def stop(self) -> tuple[float, list[float]]:
        """Seconds since the start, and the seconds of each step."""
        synchronise(self.device)
        total = perf_counter() - self.begun
        pairs = pairwise(self.readings)
        if self.device.type == "cuda":
            return total, [a.elapsed_time(b) / 1000 for a, b in pairs]
        return total, [b - a for a, b in pairs]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(record: RunRecord, data: Dataset, device: torch.device, on_epoch: Callable[[int], None]) -> None:
    """Train as `record` says, and fill in what came of it; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        train(record, data, device, on_epoch)


def train(record: RunRecord, data: Dataset, device: torch.device, on_epoch: Callable[[int], None]) -> None:
    config = record.config
    record.metric, record.scored_on = data.metric, data.scored_on
    torch.manual_seed(record.seed)
    model = build_model(config["model"], data.shape, data.outputs).to(device)
    record.parameters = sum(p.numel() for p in model.parameters())
    record.init_hash = hash_tensors(*model.state_dict().values())
    batch = min(config["batch_size"], len(data.x_train))
    batches = [epoch_batches(len(data.x_train), batch, record.seed, epoch) for epoch in range(config["epochs"])]
    record.batch_hash = hash_tensors(*batches)

    warm_up(record, model, data, batch)
    torch.manual_seed(record.seed)
    gc.collect()
    reset_peak_memory(device)
    given = completed(record.given, len(batches[0]))
    with closing(make_optimizer(optimizer_of(record.optimizer), model, **given)) as optimizer:
        record.settings = as_built(record.optimizer, optimizer.defaults, given)
        stepper = Stepper(model, optimizer, data.loss)
        rising = round(config["lr_warmup_epochs"] * len(batches[0]))
        schedule = make_schedule(config["lr_schedule"], optimizer, sum(map(len, batches)), rising)
        clock, losses, seconds = Clock(device), list[float](), list[float]()
        for epoch, indices in enumerate(batches, 1):
            indices = indices.to(device)
            epoch_losses = torch.empty(len(indices), device=device)
            clock.start()
            for i, chosen in enumerate(indices):
                epoch_losses[i] = stepper(data.x_train[chosen], data.y_train[chosen])
                if schedule:
                    schedule.step()
                clock.tick()
            total, per_step = clock.stop()
            record.seconds += total
            losses += epoch_losses.tolist()
            seconds += per_step
            add_epoch(record, model, data, epoch, losses[-len(indices) :])
            on_epoch(epoch)
            if not math.isfinite(record.epochs[-1]["train_loss"]):
                record.status, record.message = "diverged", f"the training loss is not finite in epoch {epoch}"
                break
        record.peak_memory = peak_memory(device)
        finish(record, stepper, losses, seconds)
        record.train_loss = evaluate(model, data, data.x_train, data.y_train)[0]


def epoch_batches(samples: int, batch: int, seed: int, epoch: int) -> Tensor:
    """Indices of the epoch's batches, one row each; the few samples of an incomplete batch wait for another epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(samples, generator=generator)
    return order[: samples // batch * batch].view(-1, batch)


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


def make_schedule(name: str, optimizer: Optimizer, steps: int, rising: int = 0) -> LRScheduler | None:
    """The learning rate's schedule, which begins with `rising` steps of a linear warm-up."""
    if rising and name == "constant":
        return LinearLR(optimizer, 1 / rising, total_iters=rising)
    if rising:
        parts = [LinearLR(optimizer, 1 / rising, total_iters=rising), CosineAnnealingLR(optimizer, steps - rising)]
        return SequentialLR(optimizer, parts, [rising])
    return CosineAnnealingLR(optimizer, T_max=steps) if name == "cosine" else None


def warm_up(record: RunRecord, model: nn.Module, data: Dataset, batch: int) -> None:
    """Make a few steps on copies, the schedule's included, and evaluate once."""
    model = copy.deepcopy(model)
    given = completed(record.given, len(data.x_train) // batch)
    with closing(make_optimizer(optimizer_of(record.optimizer), model, **given)) as optimizer:
        stepper = Stepper(model, optimizer, data.loss)
        schedule = make_schedule(record.config["lr_schedule"], optimizer, WARM_UP_STEPS)
        for _ in range(WARM_UP_STEPS):
            stepper(data.x_train[:batch], data.y_train[:batch])
            if schedule:
                schedule.step()
        evaluate(model, data, data.x_test[:batch], data.y_test[:batch])


@contextmanager
def closing(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Close the optimizer in the end, if it is one that can be closed."""
    try:
        yield optimizer
    finally:
        getattr(optimizer, "close", lambda: None)()


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
    products = getattr(stepper.optimizer, "hessian_products", 0)  # each a backward pass through a backward pass
    record.steps, record.gradient_evaluations = len(losses), stepper.evaluations + 2 * products
    elapsed = torch.tensor(seconds, dtype=torch.float64).cumsum(0).tolist()
    steps = [float(step) for step in range(1, len(losses) + 1)]
    record.curve = {"step": downsample(steps), "seconds": downsample(elapsed), "loss": downsample(losses)}
    p99 = quantiles(seconds, n=100, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    record.step_seconds = {"median": median(seconds), "mean": fmean(seconds), "p99": p99}
    optimizer = stepper.optimizer
    record.state_bytes = sum(t.nbytes for t in tensors_in(optimizer.state_dict()))
    if hasattr(optimizer, "coverage"):
        record.coverage = str(optimizer.coverage())
    if hasattr(optimizer, "diagnostics"):
        record.diagnostics = {
            name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for name, value in optimizer.diagnostics.items()
        }


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def hash_tensors(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux forgets the process's peak when asked to
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the GPU memory that tensors took at most, or the process's peak resident set where Linux tells it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError, ValueError):
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return None
