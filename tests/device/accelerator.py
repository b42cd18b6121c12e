"""The device of accelerator.cpp, as torch knows one: "standin"."""

import os
import re
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.cpp_extension import load

NAME = "standin"


@cache
def extension() -> Any:
    """Compiled once for each version of torch, and registered in this process. Before its first backward pass: that one
    starts the threads of all devices."""
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja, where it is installed there alone
    name = "grng_accelerator_" + re.sub(r"\W", "_", torch.__version__)
    found = load(name, [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O0"])
    torch.utils.rename_privateuse1_backend(NAME)
    module = ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    module.__dict__.update(functions)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return found


def waits() -> dict[str, int]:
    """How often the host has waited for the device since the last call, by operation."""
    found: dict[str, int] = extension().waits()
    return found
