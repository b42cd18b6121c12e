"""What a GPU asks and a CPU does not, without a GPU: every optimizer on a device whose arithmetic is the CPU's.

Its results have to be the CPU's. Tensors of both must not mix, hooks run in the device's own thread, and every wait of
the host for the device is counted.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from sysconfig import get_path
from typing import Any

import pytest
import torch

from ..optimizer.cases import METHODS, ONE_PASS
from . import runs
from .accelerator import NAME

On = Callable[..., Any]
WHERE = [("cpu", NAME), (NAME, "cpu")]
EIGH = "aten::_linalg_eigh"
ROWS = [(name, model) for name in runs.OPTIMIZERS for model in ("mixed", "cnn")]
# Several equal eigenvalues leave a basis open, which the last bit of a sum decides: so not those that depend on it.
ROWS += [(name, "transformer") for name in runs.OPTIMIZERS if name.startswith("GRNG") and name != "GRNG_ekfac"]


@pytest.fixture(scope="session")
def on() -> Iterator[On]:
    """Calls a function of `runs` in a process that has the device."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("the stand-in is written for torch 2.11 and newer: before, what it derives from is final")
    if shutil.which("c++") is None or not (Path(get_path("include")) / "Python.h").exists():
        pytest.skip("the stand-in for an accelerator is compiled: by `c++`, with Python's headers")
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=runs.start) as pool:
        yield lambda function, *given: pool.submit(function, *given).result()


def quiet(name: str) -> dict[str, int]:
    """For what the host waits in a step that decomposes nothing."""
    if name.startswith("Regularized") and "GRNG" not in name:
        return {"item": 1}  # whether torch's own optimizer is to make the step
    return {}


@pytest.mark.parametrize("B", [5, 16])
@pytest.mark.parametrize(("name", "model"), ROWS)
def test_as_on_the_cpu(on: On, name: str, model: str, B: int) -> None:
    """Weights after nine steps, and no wait in those between two decompositions."""
    difference, waited = on(runs.compare, name, model, B)
    assert difference < 1e-9
    each_step = {"GRNG_kalman_kron_exact": {EIGH}}.get(name, set())
    each_step |= {"aten::_unique2"} if model == "transformer" else set()  # which rows of the embedding a batch reads
    for step in (5, 6, 7):
        assert {key: count for key, count in waited[step].items() if key not in each_step} == quiet(name)


def test_waits_of_wide_layers(on: On) -> None:
    """Once where the curvature is measured, for all of them: how much of it is worth keeping."""
    waited = on(runs.wide)
    assert [step.get("copy to the host", 0) for step in waited[1:]] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [sorted(step) for step in waited[5:8]] == [[], ["copy to the host"], []]


@pytest.mark.parametrize("capture", ["hooks", "backpack"])
@pytest.mark.parametrize("method", ["ring", "ekfac", "kalman-vd", "kalman-kron"])
def test_engines(on: On, method: str, capture: str) -> None:
    difference, verified = on(runs.engines, method, capture)
    assert (difference < 1e-9, verified) == (True, {"yes"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ONE_PASS)
def test_autocast_in_a_thread_of_its_own(on: On, method: str, dtype: torch.dtype) -> None:
    same, distance = on(runs.autocast, method, dtype)
    assert same
    assert distance < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("first", "then"), WHERE)
@pytest.mark.parametrize("name", runs.OPTIMIZERS)
def test_checkpoints_move_between_devices(on: On, name: str, first: str, then: str) -> None:
    assert on(runs.moved_on, name, first, then) < 1e-9


@pytest.mark.parametrize(("first", "then"), WHERE)
@pytest.mark.parametrize("when", [0, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_moved_under_its_optimizer(on: On, method: str, when: int, first: str, then: str) -> None:
    """As trainers do: its state goes along."""
    assert on(runs.model_moved, method, when, first, then) < 1e-9


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kalman])
def test_posterior(on: On, method: str) -> None:
    found = on(runs.posterior, method)
    assert len(found) > 3
    assert max(found.values()) < 1e-9


@pytest.mark.parametrize("workload", ["digits-mlp", "pinn-burgers"])
@pytest.mark.parametrize(
    "name",
    ["adamw", "sgd-momentum", "nadamw", "adan", "muon", "soap", "sophia-g", "adamw+gnp", "ring", "reng", "kalman"],
)
def test_benchmark(on: On, name: str, workload: str) -> None:
    """What is measured beside a run, too."""
    ended, rows = on(runs.benchmarked, name, workload)
    assert ended == "finished"
    assert len(rows) == 4
    for expected, found in rows:
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_what_mixes_devices_is_an_error(on: On) -> None:
    """The stand-in is as strict as a GPU: without this, the rows above would prove little."""
    assert on(runs.mixing) == [True, True, False]
