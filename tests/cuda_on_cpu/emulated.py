"""The ops with their CUDA kernels run on the CPU, for a pytest with this folder on its PYTHONPATH and `-p emulated`.

EMULATED_LIBRARY names the library, EMULATED_COUNTS a file that gets a line for what each process has launched.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

LIBRARY = os.environ["EMULATED_LIBRARY"]


def take_the_place_of_the_library() -> None:
    """Makes the package load the emulated ops as if they were its own."""
    load = torch.ops.load_library
    torch.ops.load_library = lambda path: load(LIBRARY if Path(path).name == "libtorch_influence.so" else path)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    library.emulator_counts.restype = ctypes.c_char_p
    return library


def counts() -> dict[str, list[int]]:
    """What this process has launched of each kernel: launches, and the most blocks and threads of one of them."""
    lines = (line.split("\t") for line in _library().emulator_counts().decode().splitlines())
    return {name: [int(count) for count in rest] for name, *rest in lines}


def pytest_runtest_setup(item: Any) -> None:
    """Draws the same orders in a test whatever ran before it."""
    _library().emulator_restart()


def pytest_sessionfinish() -> None:
    """Appends this process's counts to those of others."""
    with Path(os.environ["EMULATED_COUNTS"]).open("a") as file:
        file.write(json.dumps(counts()) + "\n")
