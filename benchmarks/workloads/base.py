"""What a workload is: a training problem with its data, model, loss, metric and budget."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..calibration import Scores, calibration
from ..errors import InputError
from ..loop import Order, epoch_batches, shuffled

Split = Literal["validation", "test"]
EVALUATION_BATCH = 2048


class Task(ABC):
    """A workload whose data lies on the device: what the timed loop and the evaluation beside it need.

    Everything that is random is drawn from torch's global generators, which the loop seeds.
    """

    @abstractmethod
    def model(self) -> nn.Module:
        """A model with fresh weights."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Endless batches, as `loss` takes them; the same ones for the same seed. Their making is on the clock."""

    def batches_from(self, seed: int, start: int) -> Iterator[Any]:
        """`batches` without the first ones: made and thrown away, for the sake of the random numbers they take."""
        batches = self.batches(seed)
        for _ in islice(batches, start):
            pass
        return batches

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar to differentiate."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The workload's metric, "loss", and what else is to be known, in evaluation mode and without gradients."""

    def scores(self, model: nn.Module, split: Split) -> Scores | None:
        """A classification's scores (n, C) and classes (n,), in evaluation mode and without gradients."""
        return None

    def fresh_validation(self) -> bool:
        """Whether validation and test are different samples, so that one may be tuned on."""
        return True

    def final(self, model: nn.Module) -> dict[str, float]:
        """What is measured once, after the test: of a classification, how well it is calibrated."""
        test = self.scores(model, "test")
        if test is None:
            return {}
        return calibration(test, self.scores(model, "validation") if self.fresh_validation() else None)

    fingerprint: str = ""  # of the data


@dataclass(frozen=True)
class Workload:
    """A training problem, and how long it may take.

    Attributes:
        name, about: of it, in a word and in a line.
        tier: "fast" runs on two cores in seconds a run, "full" wants a GPU.
        load: makes the task from the folder of all data sets (None: there is none) and the device.
        batch_size: samples a step.
        steps: the budget; a run may be given a part of it, over which its learning rate then decays.
        evaluate_every: steps between two evaluations.
        metric: what the target is set in: a key of `Task.evaluate`.
        goal: whether the metric is to become small or large.
        data: the folders or files that `load` looks for under the folder of all data sets.
        needs: packages beyond the extra "bench".
        also: what else is needed, by name: looks for it, and raises InputError where it is not.
        schedule: of the learning rate: "cosine", after a linear warm-up, or "constant".
    """

    name: str
    about: str
    tier: Literal["fast", "full"]
    load: Callable[[Path | None, torch.device], Task]
    batch_size: int
    steps: int
    evaluate_every: int
    metric: str
    goal: Literal["min", "max"]
    data: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    also: Mapping[str, Callable[[Path | None], object]] = field(default_factory=dict)
    schedule: Literal["cosine", "constant"] = "cosine"

    def lacks(self, root: Path | None) -> dict[str, str]:
        """What `load` would miss, by name, and a message with the remedy; nothing is read for it."""
        looks: dict[str, Callable[[Path | None], object]] = {}
        looks |= {part: partial(folder_of, name=part, workload=self.name) for part in self.data}
        missing = {}
        for name, look in (looks | dict(self.also)).items():
            try:
                look(root)
            except InputError as error:
                missing[name] = str(error)
        if packages := [name for name in self.needs if find_spec(name) is None]:
            what = packages[0] if ":" in self.name else "'grng[bench,integrations]'"  # as in timm:NAME
            message = f"workload {self.name!r} needs {', '.join(packages)}: pip install {what}"
            missing |= dict.fromkeys(packages, message)
        return missing


@dataclass
class Supervised(Task):
    """Inputs and targets as tensors, a model of the inputs, a loss of its output: what most workloads are.

    Attributes:
        splits: inputs and targets of "train", "validation" and "test".
        build: makes the model.
        criterion: mean loss of output and targets.
        measure: metrics, other than the loss, of outputs and targets: means over samples.
        batch_size: samples a step; the few of an incomplete batch wait for another epoch.
        prepare: applied to the inputs of a training batch, as augmentation is.
        order: of the samples in an epoch.
    """

    splits: dict[str, tuple[Tensor, Tensor]]
    build: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], dict[str, Tensor]]
    batch_size: int
    prepare: Callable[[Tensor], Tensor] | None = None
    fingerprint: str = ""
    finish: Callable[[dict[str, float]], dict[str, float]] = field(default=lambda found: found)
    order: Order = field(default=shuffled)

    evaluation_batch: ClassVar[int] = EVALUATION_BATCH

    def model(self) -> nn.Module:
        return self.build()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.splits["train"]
        for chosen in index_batches(len(x), self.batch_size, seed, x.device, self.order):
            inputs = x[chosen]
            yield inputs if self.prepare is None else self.prepare(inputs), y[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for output, targets in self._outputs(model, split):
            found = {"loss": self.criterion(output, targets), **self.measure(output, targets)}
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=output.device))
                sums[name] += value.double() * len(targets)
        size = len(self.splits[split][1])
        return self.finish({name: (value / size).item() for name, value in sums.items()})

    @torch.no_grad()
    def scores(self, model: nn.Module, split: Split) -> Scores | None:
        """Where every sample has one target, a whole number."""
        y = self.splits[split][1]
        if y.ndim != 1 or y.is_floating_point():
            return None
        return torch.cat([output for output, _ in self._outputs(model, split)]), y

    def fresh_validation(self) -> bool:
        return self.splits["validation"][0] is not self.splits["test"][0]

    def _outputs(self, model: nn.Module, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and targets, in evaluation mode, part by part."""
        model.eval()
        x, y = self.splits[split]
        for inputs, targets in zip(x.split(self.evaluation_batch), y.split(self.evaluation_batch), strict=True):
            yield model(inputs), targets
        model.train()


def index_batches(
    samples: int, batch: int, seed: int, device: torch.device, order: Order = shuffled
) -> Iterator[Tensor]:
    """Indices of batches, epoch after epoch without end, by a generator of their own."""
    if samples < batch:
        raise InputError(f"a batch of {batch} samples out of {samples}: give more data")
    for epoch in count():
        yield from epoch_batches(samples, batch, seed, epoch, order).to(device)


def classification(output: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Accuracy, and the Brier score of the probabilities.

    >>> scores = classification(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1]))
    >>> {name: round(value.item(), 3) for name, value in scores.items()}
    {'accuracy': 0.5, 'brier': 1.0}
    """
    p = output.softmax(-1)
    brier = p.square().sum(-1) - 2 * p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) + 1
    return {"accuracy": (output.argmax(-1) == targets).double().mean(), "brier": brier.mean()}


def held_out(x: Tensor, y: Tensor, part: float = 0.1) -> dict[str, tuple[Tensor, Tensor]]:
    """ "train" and "validation" of one training set: the same samples whatever the seed of a run."""
    size = max(1, round(part * len(x)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    return {
        "train": (x[order[size:]], y[order[size:]]),
        "validation": (x[order[:size]], y[order[:size]]),
    }


def folder_of(root: Path | None, name: str, workload: str) -> Path:
    """The data set `name` in the folder of all of them; raise InputError where it is not."""
    if root is None:
        raise InputError(
            f"workload {workload!r} needs the data set {name!r}: give the folder it lies in with --data, or GRNG_DATA"
        )
    if not (root / name).exists():
        there = sorted(p.name for p in root.iterdir()) if root.is_dir() else None
        found = f"it has {', '.join(there) or 'nothing'}" if there is not None else "there is no such folder"
        raise InputError(
            f"workload {workload!r} needs {root / name}, which is not there ({found}): give the folder that "
            f"{name!r} lies in with --data, or GRNG_DATA"
        )
    return root / name
