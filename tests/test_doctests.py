"""Every example in a docstring is run, and its printed result compared."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import grng


def modules() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages(grng.__path__, "grng.")]
    for name in ("kernels", "baselines", "benchmarks"):
        package = importlib.import_module(f"grng.{name}")
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"grng.{name}.")]
    return ["grng", *sorted(set(found))]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
