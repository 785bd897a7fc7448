"""Runs the contract tests of the ops with their CUDA kernels on the CPU.

    python tests/cuda_on_cpu/run.py            all of them, twice: other orders of threads, and grids cut down
    python tests/cuda_on_cpu/run.py --quick    without the largest shapes: what continuous integration runs
    python tests/cuda_on_cpu/run.py --sanitize small shapes under the address and the thread sanitizer

Builds what is missing in build/emulator, prints what ran of each kernel, and fails where a test fails or where a
variant of a kernel was never launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CSRC = ROOT / "csrc"

# They test the CPU's own instruction sets and memory, look at the sources, or launch nothing.
NOT_OF_KERNELS = "not simd and not memory and not test_kernels and not shapes_are_known and not wrong_arguments"
LARGEST = "not beyond_a_grid and not every_small_size and not inductor and not opcheck and not without_graph_breaks"
SMALL = "test_native_equals_reference and (usual or odd or packs or one_row or turn or move) or test_any_memory_layout"
SMALLER = "test_native_equals_reference and float32 and (usual or packs or odd-) or float32-one_sequence"


def build(kind: str, csrc: Path = CSRC, folder: Path | None = None) -> Path:
    """Returns the library of the emulated ops, built of the sources in ``csrc``; kind: ON, ADDRESS or THREAD."""
    folder = folder or ROOT / "build" / "emulator" / kind.lower()
    torch_include = Path(sysconfig.get_path("platlib")) / "torch" / "include"
    settings = {"EMULATE": kind, "EMULATED_CSRC": csrc, "NATIVE": "ON", "CUDA": "OFF"}
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_INCLUDE_DIR={torch_include}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DTORCH_INFLUENCE_{name}={value}" for name, value in settings.items()]
    tools = os.environ | {"PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=tools)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\n{' '.join(map(str, command))} failed")
    return folder / "tests" / "cuda_on_cpu" / "libemulated.so"


def environment(library: Path, kind: str, **settings: str) -> dict[str, str]:
    """What a process needs in which the kernels of ``library`` run."""
    of_python = {"PYTHONPATH": str(FOLDER), "EMULATED_LIBRARY": str(library), "OMP_NUM_THREADS": "1"}
    of_python |= {"TORCH_INFLUENCE_BACKEND": "native"}  # a library that can't be loaded is an error
    if kind != "ON":
        name = {"ADDRESS": "libasan.so", "THREAD": "libtsan.so"}[kind]
        found = subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        of_python |= {
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Whoever calls the op is not ours to judge: torch's own threads are not instrumented.
            "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
        }
    return os.environ | of_python | settings


Counts = dict[str, list[int]]  # of each kernel the launches, and the most blocks and threads of one


def add(counts: Counts, more: Counts) -> None:
    """Adds the counts of another process, or of another run."""
    for name, (launches, blocks, threads) in more.items():
        before = counts.get(name, [0, 0, 0])
        counts[name] = [before[0] + launches, max(before[1], blocks), max(before[2], threads)]


class Outcome(NamedTuple):
    """Of some tests: whether all passed (None: there were none), what ran of each kernel, and what pytest said."""

    passed: bool | None
    counts: Counts
    said: str


def run_tests(library: Path, kind: str, select: str, workers: int, file: str = "", **settings: str) -> Outcome:
    """Runs those of tests/ops that are selected, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file_of_counts = Path(folder, "counts")
        file_of_counts.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated", "-p", "no:cacheprovider", "-rfE"]
        command += ["--capture=sys"]  # what a sanitizer says as it ends the process isn't lost
        command += ["-W", "ignore::pytest.PytestAssertRewriteWarning", "--no-header", "-k", select, f"tests/ops/{file}"]
        command += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-x", "-p", "no:xdist"]
        settings |= {"EMULATED_COUNTS": str(file_of_counts)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment(library, kind, **settings), capture_output=True, text=True
        )
        passed = {0: True, 5: None}.get(done.returncode, False)  # pytest's 5: no tests
        counts: Counts = {}
        for line in file_of_counts.read_text().splitlines():
            add(counts, json.loads(line))
        return Outcome(passed, counts, done.stdout + done.stderr)


def table(counts: Counts) -> str:
    """The counts by kernel: its variants, launches, and the most blocks and threads of one launch."""
    kernels: dict[str, list[list[int]]] = {}
    for name, count in counts.items():
        kernels.setdefault(name.split("<")[0], []).append(count)
    lines = [f"{'kernel':<20}{'variants':>9}{'launched':>9}{'launches':>10}{'most blocks':>12}{'most threads':>13}"]
    for name, variants in sorted(kernels.items()):
        launched = sum(count[0] > 0 for count in variants)
        launches = sum(count[0] for count in variants)
        blocks, threads = (max(count[which] for count in variants) for which in (1, 2))
        lines.append(f"{name:<20}{len(variants):>9}{launched:>9}{launches:>10}{blocks:>12}{threads:>13}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true")
    what.add_argument("--sanitize", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    if options.sanitize:
        # Threads of the operating system are few here: those that the sanitizer watches are the kernels'.
        runs = [("ADDRESS", SMALL, {"EMULATOR_SEED": "3"}), ("THREAD", SMALLER, {"EMULATOR_SEED": "4"})]
    else:
        select = f"{NOT_OF_KERNELS} and {LARGEST}" if options.quick else NOT_OF_KERNELS
        cut = f"{NOT_OF_KERNELS} and {LARGEST}"  # what is beyond a grid is beyond the one cut down in any case
        runs = [("ON", select, {"EMULATOR_SEED": "1"}), ("ON", cut, {"EMULATOR_SEED": "2", "EMULATOR_GRID": "2,1"})]
    passed = True
    counts: Counts = {}
    for kind, select, settings in runs:
        library = build(kind)
        said = " ".join(f"{name}={value}" for name, value in settings.items())
        print(f"-- {kind.lower()}: {said}", flush=True)
        begin = time.monotonic()
        outcome = run_tests(library, kind, select, options.workers, **settings)
        summary = re.findall(r"^.*(?:passed|failed|error|no tests).*$", outcome.said, re.MULTILINE)
        print(f"   {summary[-1] if summary else 'no summary'}  ({time.monotonic() - begin:.0f} s)", flush=True)
        if not outcome.passed:
            print(outcome.said[-8000:], flush=True)
        passed &= bool(outcome.passed)
        add(counts, outcome.counts)
    print(table(counts))
    missing = sorted(name for name, (launches, *_) in counts.items() if not launches)
    if missing and not options.sanitize:
        print("never launched, so that nothing has tested them:", *missing, sep="\n  ")
        passed = False
    if not counts:
        print("no kernel was launched at all")
        passed = False
    return not passed


if __name__ == "__main__":
    sys.exit(main())
