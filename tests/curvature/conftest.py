import warnings
from collections.abc import Iterator

import pytest
import torch

from grng import GRNGWarning


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Everything is compared in float64, on one thread, each test from the same seed; an unexpected fallback fails."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GRNGWarning)
        yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)
