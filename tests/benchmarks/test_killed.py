"""A training process that is killed (SIGKILL, which nothing can catch) again and again, also while it writes its
checkpoint, ends where one that nobody touched ends."""

import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from grng.benchmarks.bench import Trial
from grng.benchmarks.bench import trial as trial_module

from .bench_tools import run, small_task, untimed

KILLS = 5
LENGTH: dict[str, Any] = {"steps": 24, "evaluate_every": 1}


def train(name: str, checkpoint: Path | None, result: Path) -> None:
    """The run, which writes a checkpoint after every step, and in the end what came of it."""
    torch.set_num_threads(1)
    trial_module.CHECKPOINT_SECONDS = 0.0
    task = small_task(noise=0.1)
    outcome = run(Trial("small", name, {}), task, lambda outcome: None, checkpoint, **LENGTH)
    assert outcome.status == "finished", outcome.message
    torch.save([outcome.continued, untimed(outcome.rows), task.weights[0]], result)


def written(checkpoint: Path) -> int:
    """Which checkpoint is there."""
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


@pytest.mark.parametrize("name", ["ring", "sophia-g"])
def test_killed_while_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0.0)
    train(name, None, tmp_path / "straight")
    folder, moments, kills = tmp_path / "killed", random.Random(0), 0
    folder.mkdir()
    checkpoint, result = folder / "checkpoint.pt", tmp_path / "result"
    processes = multiprocessing.get_context("forkserver")  # which imports once, and never trains itself
    processes.set_forkserver_preload(["grng.benchmarks.bench", "backpack", "torch._dynamo"])
    while not result.exists():
        before = written(checkpoint)
        process = processes.Process(target=train, args=(name, checkpoint, result))
        process.start()
        while kills < KILLS and process.is_alive() and written(checkpoint) == before:
            time.sleep(0.001)
        if kills < KILLS:
            time.sleep(moments.uniform(0, 0.01))  # a step and its checkpoint take about as long
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills == KILLS
    assert not list(folder.iterdir())
    (straight, rows, weights), (continued, others, same) = (torch.load(tmp_path / n) for n in ("straight", "result"))
    assert (straight, continued) == (0, KILLS)
    assert torch.equal(weights, same)
    assert rows == others
