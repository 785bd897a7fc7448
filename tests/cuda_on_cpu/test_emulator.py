"""The emulator of CUDA's execution notices what is wrong, and runs what is right."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
BLOCK = 64

Run = Callable[..., tuple[str, list[float]]]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / "wrong.so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_INFLUENCE_EMULATE",
        *flags,
    ]
    command += [f"-I{FOLDER}", f"-I{CSRC}", "-x", "c++", str(FOLDER / "wrong.cu"), str(FOLDER / "emulator.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    loaded.emulator_counts.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="module", params=["by hand", "ucontext"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """One for each way to switch from a thread to another."""
    flags = ["-DEMULATOR_UCONTEXT"] if request.param == "ucontext" else []
    return compiled(tmp_path_factory.mktemp("emulator"), *flags)


@pytest.fixture
def run(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a kernel: (name, grid, threads, seed) -> the error, and what it has written."""

    def run(name: str, grid: tuple[int, int, int] = (1, 1, 1), threads: int = BLOCK, seed: str = "0"):
        monkeypatch.setenv("EMULATOR_SEED", seed)
        out = (ctypes.c_double * 1024)()
        error = library.run(name.encode(), *(ctypes.c_uint(size) for size in grid), ctypes.c_int(threads), out)
        return error.decode() if error else "", list(out)

    return run


def line_of(comment: str) -> str:
    """Where the source has this: "wrong.cu:17"."""
    lines = (FOLDER / "wrong.cu").read_text().splitlines()
    return f"wrong.cu:{1 + next(i for i, line in enumerate(lines) if comment in line)}"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("barrier_in_branches", "threads wait at different barriers"),
        ("barrier_after_an_exit", "(a barrier at .* after a thread has ended|a thread ends while others wait at)"),
        ("lanes_that_never_come", "deadlock: a thread waits at .* for others that never come"),
        ("mask_without_its_lane", "a shuffle at .* whose mask 0000ffff lacks the lane that calls it"),
        ("different_shuffles", "lanes of a warp meet in different shuffles"),
        ("too_much_shared_memory", "49160 bytes of shared memory, more than the 49152 that a kernel may have"),
    ],
)
@pytest.mark.parametrize("seed", ["0", "1", "in order"])
def test_what_is_wrong_is_an_error_that_says_where(run: Run, kernel: str, said: str, seed: str) -> None:
    error, _ = run(kernel, seed=seed)
    assert re.search(said, error)
    assert f"{kernel}_kernel" in error
    assert re.search(r"block \(0, 0, 0\), thread \d+", error)
    for comment in {"barrier_in_branches": ("one barrier", "another barrier"),
                    "different_shuffles": ("one shuffle", "another shuffle")}.get(kernel, ()):  # fmt: skip
        assert line_of(f"// {comment}") in error
    assert run("with_a_barrier") == ("", [1.0] * BLOCK + [0.0] * (1024 - BLOCK))  # nothing of it is left


@pytest.mark.parametrize(
    ("grid", "threads"),
    [
        ((1, 1, 1), 1025),
        ((1, 1, 1), 0),
        ((0, 1, 1), 32),
        ((1, 65_536, 1), 32),
        ((1, 1, 65_536), 32),
        ((1 << 31, 1, 1), 32),
    ],
)
def test_a_grid_beyond_the_limits_is_refused(run: Run, grid: tuple[int, int, int], threads: int) -> None:
    error, out = run("indices", grid, threads)
    assert error.startswith("invalid configuration argument")
    assert f"{grid[0]} x {grid[1]} x {grid[2]} blocks of {threads} x 1 x 1 threads" in error
    assert not any(out)


@pytest.mark.parametrize("seed", ["0", "1", "in order"])
def test_every_thread_of_every_block_runs_once(run: Run, seed: str) -> None:
    error, out = run("indices", (3, 2, 4), 33, seed)
    assert not error
    assert out[: 24 * 33] == [1.0 + block for block in range(24) for _ in range(33)]


def test_shared_memory_begins_as_nan_and_is_the_block_s_own(run: Run) -> None:
    """Some thread reads before another has written, in some order; with a barrier none does, in any."""
    read = [run("no_barrier", (4, 1, 1), seed=str(seed)) for seed in range(4)]
    assert any(math.isnan(value) for error, out in read for value in out[: 4 * BLOCK] if not error)
    for seed in range(4):
        error, out = run("with_a_barrier", (4, 1, 1), seed=str(seed))
        assert not error
        assert out[: 4 * BLOCK] == [1.0] * 4 * BLOCK


def test_a_lane_beyond_the_mask_gives_nan(run: Run) -> None:
    error, out = run("from_beyond_the_mask")
    assert not error
    assert all(map(math.isnan, out[:16]))


def test_orders_differ_by_seed_and_repeat_with_it(run: Run, library: ctypes.CDLL) -> None:
    def last(seed: str) -> float:
        library.emulator_restart()
        return run("last_writer", (8, 1, 1), seed=seed)[1][0]

    drawn = [last(str(seed)) for seed in range(8)]
    assert len(set(drawn)) > 4
    assert drawn == [last(str(seed)) for seed in range(8)]
    assert last("in order") == 8 * BLOCK - 1


def test_launches_are_counted_by_kernel(run: Run, library: ctypes.CDLL) -> None:
    def counts() -> dict[str, list[int]]:
        lines = (line.split("\t") for line in library.emulator_counts().decode().splitlines())
        return {name: list(map(int, rest)) for name, *rest in lines}

    before = counts()
    assert "different_shuffles_kernel" in before
    assert len(before) == 11
    run("indices", (3, 2, 1), 40)
    launches, blocks, threads = counts()["indices_kernel"]
    assert launches == before["indices_kernel"][0] + 1
    assert blocks >= 6
    assert threads >= 240


def test_nothing_of_it_is_in_the_package() -> None:
    """The option is for tests: without it no source of this folder is compiled."""
    from torch_influence import backend_info

    if not backend_info().ops:
        pytest.skip("no native ops")
    from torch_influence import _C

    library = Path(_C.__file__).with_name("libtorch_influence.so")
    assert b"emulator" not in library.read_bytes()
    assert "EMULATE" not in os.environ
