"""Products in the precision of their operands, whatever the user's passes are made in."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


class _Exact:
    """Full precision of the process's matrix products, while any thread asks for it."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = Lock(), 0, list[str]()

    def begin(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = [matmul.fp32_precision for matmul in MATMULS]
                for matmul in MATMULS:
                    matmul.fp32_precision = "ieee"
            self.users += 1

    def end(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for matmul, value in zip(MATMULS, self.before, strict=True):
                    matmul.fp32_precision = value


_exact = _Exact()  # as torch's settings are the process's


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 matrices are multiplied in float32: TF32, oneDNN's bfloat16 and autocast are off; afterwards all
    is as it was. A factor that is accumulated in lower precision need not be positive definite.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision(torch.device("cpu")):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    _exact.begin()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _exact.end()
