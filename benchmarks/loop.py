"""The timed loop: what every comparison and every workload is trained by.

On the clock: making the batch, forward, backward, the optimizer and the schedule. Off the clock: evaluation, moving
losses to the host, logging, files. Before the clock starts every optimizer alike makes a few steps on copies that are
then thrown away, so that no method alone pays for first calls.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from grng.torch_optim import demands_closure

from .statistics import present

WARM_UP_STEPS = 12  # past the first of what is done every tenth step: estimates, decompositions

Loss = Callable[[nn.Module, Any], Tensor]  # of the model and a batch


class Stepper:
    """One training step, by closure for the optimizers that ask for one; counts the gradients evaluated."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.by_closure = demands_closure(optimizer)
        self.passes = 0
        self.before = 0  # evaluations of a run that is gone on with
        self.clock: Clock | None = None

    def __call__(self, batch: Any) -> Tensor:
        def closure() -> Any:  # torch.optim types the closure's loss as a float, and passes on the tensor
            if self.clock:
                self.clock.gradient()
            self.optimizer.zero_grad()
            loss = self.loss(self.model, batch)
            loss.backward()
            self.passes += 1
            if self.clock:
                self.clock.gradient()
            return loss

        if self.by_closure:
            return torch.as_tensor(self.optimizer.step(closure)).detach()
        loss = closure().detach()
        self.optimizer.step()
        return loss

    @property
    def evaluations(self) -> int:
        """Gradients so far; a product with the Hessian, a backward pass through a backward pass, counts as two."""
        return self.before + self.passes + 2 * getattr(self.optimizer, "hessian_products", 0)


class Clock:
    """Reads the time step by step; on a GPU by events in its queue, so that no reading makes the host wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ticks: list[Any] = []
        self.gradients: list[Any] = []  # begin and end of each

    def start(self) -> None:
        self.ticks.clear()
        self.gradients.clear()
        synchronise(self.device)
        self.worked = process_time()
        self.tick()

    def tick(self) -> None:
        """A step ends, or the first one begins."""
        self.ticks.append(self._reading())

    def gradient(self) -> None:
        """A forward and backward pass begins or ends."""
        self.gradients.append(self._reading())

    def _reading(self) -> Any:
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, trace: "Trace") -> None:
        """Add what has passed since the start to the trace."""
        synchronise(self.device)
        trace.seconds += self._between(self.ticks[0], self.ticks[-1])
        trace.cpu_seconds += process_time() - self.worked
        trace.step_seconds += [self._between(a, b) for a, b in pairwise(self.ticks)]
        passes = zip(self.gradients[::2], self.gradients[1::2], strict=True)
        trace.gradient_seconds += sum(self._between(a, b) for a, b in passes)

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Trace:
    """What the loop saw: losses and seconds of every step, and what the clock came to.

    Attributes:
        seconds, cpu_seconds: of the wall and of this process, all threads together.
        gradient_seconds: of the wall, in forward and backward passes.
        diverged: whether a training loss was not finite.
        peak_memory: bytes, while the clock ran; None where nothing tells.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    gradient_seconds: float = 0.0
    diverged: bool = False
    peak_memory: int | None = None


def fit(
    stepper: Stepper,
    schedule: LRScheduler | None,
    batches: Iterator[Any],
    steps: int,
    evaluate_every: int,
    device: torch.device,
    on_evaluation: Callable[[Trace], None],
    trace: Trace | None = None,
    before_last: Callable[[], None] | None = None,
) -> Trace:
    """Train until `steps` steps are made, handing the trace on every `evaluate_every` steps and in the end.

    A training loss that is not finite ends it. A trace that is given is gone on with. `before_last` is called off the
    clock, before each step that an evaluation follows.
    """
    trace, clock = trace or Trace(), Clock(device)
    stepper.clock = clock
    while len(trace.losses) < steps and not trace.diverged:
        count = min(evaluate_every, steps - len(trace.losses))
        losses = torch.empty(count, device=device)
        pieces = [range(count - 1), range(count - 1, count)] if before_last else [range(count)]
        for piece in pieces:
            if before_last and piece is pieces[-1]:
                before_last()
            reset_peak_memory(device)
            clock.start()
            for i in piece:
                losses[i] = stepper(next(batches))
                if schedule:
                    schedule.step()
                clock.tick()
            clock.stop(trace)
            trace.peak_memory = max(present((trace.peak_memory, peak_memory(device))), default=None)
        trace.losses += losses.tolist()
        trace.diverged = not math.isfinite(sum(trace.losses[-count:]))
        on_evaluation(trace)
    return trace


Order = Callable[[int, int, int], Tensor]  # of so many samples, by the seed and the epoch: a permutation


def generator_of(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def shuffled(samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(samples, generator=generator_of(seed, epoch))


def epoch_batches(samples: int, batch: int, seed: int, epoch: int, order: Order = shuffled) -> Tensor:
    """Indices of the epoch's batches, one row each; the few samples of an incomplete batch wait for another epoch."""
    return order(samples, seed, epoch)[: samples // batch * batch].view(-1, batch)


def make_schedule(name: str, optimizer: Optimizer, steps: int, rising: int = 0) -> LRScheduler | None:
    """The learning rate's schedule, which begins with `rising` steps of a linear warm-up."""
    if rising and name == "constant":
        return LinearLR(optimizer, 1 / rising, total_iters=rising)
    if rising:
        parts = [LinearLR(optimizer, 1 / rising, total_iters=rising), CosineAnnealingLR(optimizer, steps - rising)]
        return SequentialLR(optimizer, parts, [rising])
    return CosineAnnealingLR(optimizer, T_max=steps) if name == "cosine" else None


def warm_up(
    model: nn.Module,
    make: Callable[[nn.Module], Optimizer],
    loss: Loss,
    batch: Any,
    schedule: str,
    evaluate: Callable[[nn.Module], Any],
) -> None:
    """Make a few steps on copies, the schedule's included, and evaluate once."""
    model = copy.deepcopy(model)
    with closing(make(model)) as optimizer:
        stepper = Stepper(model, optimizer, loss)
        rate = make_schedule(schedule, optimizer, WARM_UP_STEPS)
        for _ in range(WARM_UP_STEPS):
            stepper(batch)
            if rate:
                rate.step()
        evaluate(model)


def forked(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves the global generators as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def closing(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Close the optimizer in the end, if it is one that can be closed."""
    try:
        yield optimizer
    finally:
        getattr(optimizer, "close", lambda: None)()


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    return sum(t.nbytes for t in tensors_in(optimizer.state_dict()))


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
