"""Several processes on one machine, which meet by a file and give up rather than wait for ever."""

import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(minutes=3)


def together(
    work: Callable[[int, Path], dict[str, Any]], size: int, folder: Path, preload: str
) -> list[dict[str, Any]]:
    """What each process found. `preload` is imported once for all of them, without this process's threads."""
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    if not _loopback():
        pytest.skip("no connection to 127.0.0.1 on this machine")
    mp.get_context("forkserver").set_forkserver_preload([preload])
    mp.start_processes(_process, (work, size, folder), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _loopback() -> bool:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 10):
            return True
    except OSError:
        return False


def _process(rank: int, work: Callable[[int, Path], dict[str, Any]], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)  # no port that somebody else may take
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    torch.save(work(rank, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()
