"""The same training on the CPU and on the stand-in device. Called in a process of its own: a device, once registered,
is there for all that a process does."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from grng.benchmarks.bench import Trial, run_trial
from grng.benchmarks.workloads import find_workload
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from grng import GRNG, Curvature

from ..benchmarks.bench_tools import untimed
from ..contract.cases import ALL, Run
from ..optimizer.cases import METHODS, Transformer, cnn, mixed, relative, train, vector
from ..optimizer.test_mixed_precision import SCALES, Loop
from .accelerator import NAME, extension, waits

STEPS = 9

Batch = tuple[Tensor, Tensor]


def start() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="An output with one or more elements was resized")  # its reductions do
    extension()


def points(B: int) -> Batch:
    return torch.randn(B, 4).double(), torch.randint(3, (B,))


def images(B: int) -> Batch:
    return torch.randn(B, 1, 8, 8).double(), torch.randint(3, (B,))


def tokens(B: int) -> Batch:
    return torch.randint(7, (B, 6)), torch.randint(7, (B,))


def transformer(dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer().to(dtype)


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[int], Batch]]] = {
    "mixed": (mixed, points),
    "cnn": (cnn, images),
    "transformer": (transformer, tokens),
}
OPTIMIZERS = {info.name: info for info in ALL}


def trained(device: str, name: str, model: str, B: int) -> tuple[Tensor, list[dict[str, int]]]:
    """Weights after some steps, and for what the host waited in each of them."""
    build, data = MODELS[model]
    run = Run(OPTIMIZERS[name], build=lambda dtype, seed: build(dtype=dtype, seed=seed).to(device))
    torch.manual_seed(2)
    x, y = (part.to(device) for part in data(B))

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel for attention is not the device's
            loss = cross_entropy(run.model(x), y)
            loss.backward()
        return loss.detach()

    waited = []
    waits()
    for _ in range(STEPS):
        if OPTIMIZERS[name].step_requires_closure:
            run.optimizer.step(closure)
        else:
            closure()
            run.optimizer.step()
        waited.append(waits())
    return vector(run.model).cpu(), waited


def compare(name: str, model: str, B: int) -> tuple[float, list[dict[str, int]]]:
    """The largest difference between the weights of both devices, and for what the host waited."""
    (expected, nothing), (found, waited) = (trained(device, name, model, B) for device in ("cpu", NAME))
    assert not any(nothing)
    return (found - expected).abs().max().item(), waited


def wide() -> list[dict[str, int]]:
    """For what the host waits where layers are so wide that part of their spectrum may be left out."""
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 3)).to(NAME)
    x, y = torch.randn(8, 4).to(NAME), torch.randint(3, (8,)).to(NAME)
    waited = []
    with GRNG(model, "ring", curvature=Curvature(stats_every=2, inverse_every=4, burn_in=1)) as optimizer:
        for _ in range(STEPS):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            waited.append(waits())
    return waited


def engines(method: str, capture: str) -> tuple[float, set[str]]:
    """As `compare`, by an engine of choice, and what the self-check says."""
    found = []
    for device in ("cpu", NAME):
        model = cnn(torch.float64).to(device)
        torch.manual_seed(2)
        x, y = (part.to(device) for part in images(5))
        with METHODS[method](model, curvature=Curvature(capture=capture)) as optimizer:
            for _ in range(4):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            verified = {row.verified for row in optimizer.coverage()}
        found.append(vector(model).cpu())
    return (found[1] - found[0]).abs().max().item(), verified


def autocast(method: str, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether an autocast around backward pass and step changes nothing, by the device's own thread; and how far the
    first step is from that in full precision on the CPU."""
    moved = [Loop(METHODS[method], mixed(torch.float32).to(NAME), dtype, inside=inside).train(3) for inside in (0, 1)]
    scale = SCALES.get(method, 256.0) if dtype == torch.float16 else None
    exact = Loop(METHODS[method], mixed(torch.float32)).train(1)
    low = Loop(METHODS[method], mixed(torch.float32).to(NAME), dtype, scale).train(1)
    return torch.equal(*moved), relative(low.cpu(), exact)


def moved_on(name: str, first: str, then: str) -> float:
    """How far a run that goes on on another device, from its checkpoint, is from one that stays on the CPU."""
    half = STEPS // 2

    def go(run: Run, device: str, steps: int) -> None:
        torch.manual_seed(2)
        x, y = (part.to(device) for part in points(6))
        for _ in range(steps):
            train(run.optimizer, run.model, [(x, y)])

    def run_on(device: str) -> Run:
        return Run(OPTIMIZERS[name], build=lambda dtype, seed: mixed(dtype, seed).to(device))

    straight = run_on("cpu")
    go(straight, "cpu", STEPS)
    one, other = run_on(first), run_on(then)
    go(one, first, half)
    with tempfile.TemporaryDirectory() as folder:
        torch.save([one.model.state_dict(), one.optimizer.state_dict()], Path(folder) / "state.pt")
        model, optimizer = torch.load(Path(folder) / "state.pt", map_location=then, weights_only=True)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    go(other, then, STEPS - half)
    return (vector(other.model).cpu() - vector(straight.model)).abs().max().item()


def model_moved(method: str, when: int, first: str, then: str) -> float:
    """How far a run whose model is moved at step `when`, after the optimizer was made, is from one on the CPU."""
    found = []
    for devices in (("cpu", "cpu"), (first, then)):
        model = mixed().to(devices[0])
        torch.manual_seed(2)
        x, y = points(6)
        torch.__future__.set_swap_module_params_on_conversion(True)  # the parameters stay, as on their way to a GPU
        try:
            with METHODS[method](model) as optimizer:
                for step in range(STEPS):
                    if step == when:
                        model.to(devices[1])
                    device = next(model.parameters()).device
                    train(optimizer, model, [(x.to(device), y.to(device))])
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        found.append(vector(model).cpu())
    return (found[1] - found[0]).abs().max().item()


def posterior(method: str) -> dict[str, float]:
    """How far what the posterior says on the device is from what it says on the CPU."""
    said: list[dict[str, Tensor]] = []
    for device in ("cpu", NAME):
        model = mixed().to(device)
        torch.manual_seed(2)
        x, y = (part.to(device) for part in points(16))
        with METHODS[method](model) as optimizer:
            train(optimizer, model, [(x, y)] * 4)
            own = optimizer.posterior
            drawn = own.predict(x, samples=5, generator=torch.Generator(device).manual_seed(3))
            linear, variance = own.linearised(x), own.variance()
        said.append(
            {"mean": drawn.mean, "probabilities": linear.mean, "model": linear.model_variance}
            | {f"variance of {name}": value for name, value in variance.items()}
        )
    return {name: (said[1][name].cpu() - value).abs().max().item() for name, value in said[0].items()}


def benchmarked(name: str, workload: str) -> tuple[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """How a benchmark's run ends on the device, and what was measured on the CPU and there at each evaluation."""
    found = []
    for device in map(torch.device, ("cpu", NAME)):
        known = replace(find_workload(workload), evaluate_every=6)
        trial = Trial(workload, name, {}, budget=18 / known.steps, diagnose=True)
        found.append(run_trial(trial, known, known.load(None, device), device, {}))
    a, b = ([*untimed(outcome.rows), outcome.test] for outcome in found)
    return f"{found[1].status} {found[1].message}".strip(), list(zip(a, b, strict=True))


def mixing() -> list[bool]:
    """Whether adding a vector, reading a table at places on the CPU, and adding a number on the CPU are errors."""
    vector, table = torch.ones(3, device=NAME), torch.ones(4, 2, device=NAME)

    def fails(work: Callable[[], Any]) -> bool:
        try:
            work()
        except RuntimeError:
            return True
        return False

    return [
        fails(lambda: vector + torch.ones(3)),
        fails(lambda: nn.functional.embedding(torch.tensor([1, 2]), table)),
        fails(lambda: vector + torch.tensor(2.0)),
    ]
