"""Times several ways of doing one thing, against each other.

Machines differ and are never quiet, so what counts is the ratio of medians of runs that took turns: every round runs
every variant once, starting with another one each time. Beside it stand the error against float64, the memory rate that
the smallest possible traffic would mean, and the memory that a call needs beyond its arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from torch_influence import backend_info

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A variant's outcome at one size; times in seconds."""

    variant: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    error: float
    bytes_per_second: float
    extra_bytes: int | None


def compare(calls: dict[str, Call], errors: dict[str, float], traffic: int, device: str, seconds: float) -> list[Row]:
    """Times the calls in turns for about `seconds`; ratios are to the first one.

    Args:
        calls: One call of each variant, by its name.
        errors: How far each lies from float64.
        traffic: Bytes that any implementation must move.
        device: "cpu" or "cuda".
        seconds: Time for all of it, warm-up aside.
    """
    for call in calls.values():
        for _ in range(3):
            call()
    extra = {name: extra_memory(call, device) for name, call in calls.items()}
    once = {name: timed(call, 1, device) for name, call in calls.items()}
    # A sample of a short call is many calls, so that the clock doesn't count.
    repeats = {name: max(1, round(5e-4 / once[name])) for name in calls}
    round_time = sum(max(once[name] * repeats[name], 1e-5) for name in calls)
    rounds = min(max(round(seconds / round_time), 9), 400)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(timed(calls[name], repeats[name], device) / repeats[name])

    first = statistics.median(samples[names[0]])
    rows = []
    for name in names:
        low, median, high = statistics.quantiles(samples[name], n=4)
        rows.append(Row(name, median, (low, high), median / first, errors[name], traffic / median, extra[name]))
    return rows


def timed(call: Call, repeats: int, device: str) -> float:
    """Seconds for `repeats` calls; on a GPU by its own clock."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - begin


def turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, Any]]:
    """(median of the seconds, what the last call returned) of each; every round runs each once, on the CPU."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            results.pop(name, None)  # before it is made again
            start = time.perf_counter()
            results[name] = calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds[name]), results[name]) for name in names}


def extra_memory(call: Call, device: str) -> int | None:
    """Bytes that a call needs at its peak beyond what was there before; None where the system doesn't tell."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # glibc's: else freed memory is used again and counts as none
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except OSError:
        return None


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖, in float64."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def table(title: str, rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        title,
        f"  {'':28}{'median':>10}  {'quartiles':>19}  {'ratio':>7}  {'error':>8}  {'GB/s':>6}  {'extra MB':>8}",
    ]
    for row in rows:
        low, high = (f"{1e3 * t:.4g}" for t in row.quartiles)
        extra = "?" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}"
        lines.append(
            f"  {row.variant:28}{1e3 * row.median:>7.4g} ms  {f'{low} to {high} ms':>19}  {row.ratio:>6.2f}x"
            f"  {row.error:>8.1e}  {row.bytes_per_second / 1e9:>6.1f}  {extra:>8}"
        )
    return "\n".join(lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance() -> dict[str, object]:
    """What a result depends on besides the code: the machine, the versions, the commit, the date (UTC)."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_influence": version("torch-influence"),
        "commit": commit(),
        "csrc_sha256": backend_info().csrc_sha256,
    }


def where(record: dict[str, Any]) -> str:
    """The same in a line of text, of a record that has it as "provenance"."""
    it = record["provenance"]
    return (
        f"{it['cpu']}, {it['threads']} threads, {it['memory_bytes'] / 2**30:.0f} GiB; Python {it['python']}, "
        f"torch {it['torch']}, torch-influence {it['torch_influence']}, commit {it['commit']}; {it['date']}"
    )


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit that is checked out, with a plus sign if files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def write(path: Path, text: str) -> None:
    """Writes a file, its folder first if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ``publish`` reads."""
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    parser.add_argument("--markdown", type=Path, help="file that the table is written to")


def publish(record: dict[str, Any], report: Callable[[dict[str, Any]], str], options: argparse.Namespace) -> None:
    """Prints the report of a record with its provenance, and writes both where the options say."""
    # Through JSON, so that the table shows what the file says.
    record = json.loads(json.dumps({"provenance": provenance(), **record}))
    text = report(record)
    print(text)
    if options.json:
        write(options.json, json.dumps(record, indent=1) + "\n")
    if options.markdown:
        write(options.markdown, text)


def main(op: str, benchmark: Callable[[str, float], list[tuple[str, list[Row]]]]) -> None:
    """The command line of a benchmark: prints its tables, and writes them as JSON if asked to.

    Args:
        op: The op's name.
        benchmark: device, seconds per size -> (size, rows) for every size.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per size")
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    arguments = parser.parse_args()

    info = backend_info()
    problem = info.cuda if arguments.device == "cuda" else info.cpu
    if problem:
        raise SystemExit(f"{op} has no native implementation to measure on {arguments.device}: {problem}")
    where = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{torch.get_num_threads()} threads, {info.simd_level}"
    )
    print(f"{op} on {arguments.device} ({where}), torch {torch.__version__}; ratio: time over the first row's")
    results = []
    for size, rows in benchmark(arguments.device, arguments.seconds):
        print(table(size, rows), flush=True)
        results.append({"size": size, "rows": [asdict(row) for row in rows]})
    if arguments.json:
        record = {
            "op": op,
            "device": arguments.device,
            "where": where,
            **provenance(),
            "results": results,
        }
        write(arguments.json, json.dumps(record, indent=1) + "\n")
