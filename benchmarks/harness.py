"""Times several ways of doing one thing, against each other, and against what the machine can do.

Machines differ and are never quiet, so what counts is the ratio of medians of runs that took turns: every round runs
every variant once, starting with another one each time. In the same rounds runs a copy of as many bytes as the op must
move, and beside them a product of matrices: together they say how little time the op could take here (a roofline), and
so which fraction of the possible a variant reaches. Beside that stand the error against float64 and the memory that a
call needs beyond its arguments.

Neither torch.utils.benchmark nor triton.testing.do_bench takes turns: each times one statement, to its end. The first
also warms up anew for each sample, which triples the time of a call that takes a second.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from torch_influence import backend_info

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """A variant's outcome; times in seconds.

    Attributes:
        kind: "native", "torch", or "yardstick": what stands beside them to be compared with.
        ratio: its median over that of the first variant.
        fraction: the least time that the machine could take, over the median; None of the copy, which computes nothing.
        error: against float64; None of a yardstick.
        extra_bytes: None where the system doesn't tell.
    """

    variant: str
    kind: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    fraction: float | None
    error: float | None
    extra_bytes: int | None


@dataclass(frozen=True)
class Measured:
    """An op at one size: what it must do at least, how fast this machine does that, and the variants.

    Attributes:
        bytes: that any implementation must move, its arguments and results once each.
        flops: that any implementation must do.
        bytes_per_second: of a copy that moves as many bytes, in the same rounds.
        flops_per_second: of a float32 product of matrices, just before and after.
    """

    size: str
    bytes: int
    flops: int
    bytes_per_second: float
    flops_per_second: float
    rows: list[Row]


def compare(
    size: str,
    calls: dict[str, Call],
    errors: dict[str, float],
    bytes: int,
    flops: int,
    device: str,
    seconds: float,
    yardsticks: dict[str, Call] | None = None,
) -> Measured:
    """Times the calls in turns for about `seconds`, warm-up aside; ratios are to the first one.

    Args:
        size: What the table calls it.
        calls: One call of each variant, by its name, which starts with "native" if it is the native op.
        errors: How far each lies from float64.
        bytes: That any implementation must move.
        flops: That any implementation must do.
        device: "cpu" or "cuda".
        seconds: Time for all of it.
        yardsticks: Other calls to compare with.
    """
    source = torch.ones(max(bytes // 8, 1), device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    kinds = {name: "native" if name.startswith("native") else "torch" for name in calls}
    calls = calls | (yardsticks or {}) | {COPY: copy}
    gemms = gemm_seconds(device)
    for call in calls.values():
        for _ in range(3):
            call()
    extra = {name: extra_memory(call, device) for name, call in calls.items()}
    samples = samples_in_turns(calls, device, seconds)
    gemms += gemm_seconds(device)

    bytes_per_second = bytes / statistics.median(samples[COPY])
    flops_per_second = 2 * GEMM**3 / statistics.median(gemms)
    least = max(bytes / bytes_per_second, flops / flops_per_second)
    first = statistics.median(next(iter(samples.values())))
    rows = []
    for name, sample in samples.items():
        low, median, high = statistics.quantiles(sample, n=4)
        row = Row(
            variant=name,
            kind=kinds.get(name, "yardstick"),
            median=median,
            quartiles=(low, high),
            ratio=median / first,
            fraction=None if name == COPY else least / median,
            error=errors.get(name),
            extra_bytes=extra[name],
        )
        rows.append(row)
    return Measured(size, bytes, flops, bytes_per_second, flops_per_second, rows)


COPY = "copy of as many bytes"
GEMM = 1024  # rows and columns of the matrices


def gemm_seconds(device: str) -> list[float]:
    """Seconds of some products of float32 matrices, large enough for the machine's full rate; TF32 is not used."""
    a, b = torch.randn(2, GEMM, GEMM, device=device).unbind()
    product = partial(torch.mm, a, b, out=torch.empty_like(a))
    product()
    return [timed(product, 1, device) for _ in range(5)]


def samples_in_turns(calls: dict[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, many times; every round starts with another one."""
    once = {name: timed(call, 1, device) for name, call in calls.items()}
    # A sample of a short call is many calls, so that the clock doesn't count.
    repeats = {name: max(1, round(5e-4 / once[name])) for name in calls}
    round_time = sum(max(once[name] * repeats[name], 1e-5) for name in calls)
    rounds = min(max(round(seconds / round_time), 5), 400)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(timed(calls[name], repeats[name], device) / repeats[name])
    return samples


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


def table(measured: Measured) -> str:
    """The outcome at one size as text."""
    bandwidth, rate = measured.bytes_per_second / 1e9, measured.flops_per_second / 1e9
    lines = [
        f"{measured.size}: {measured.bytes / 1e6:.4g} MB at {bandwidth:.1f} GB/s of a copy, "
        f"{measured.flops / 1e6:.4g} Mflop at {rate:.0f} Gflop/s of a GEMM",
        f"  {'':28}{'median':>10}  {'quartiles':>19}  {'ratio':>7}  {'reached':>7}  {'error':>8}  {'extra MB':>8}",
    ]
    for row in measured.rows:
        low, high = (f"{1e3 * t:.4g}" for t in row.quartiles)
        extra = "?" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}"
        reached = "-" if row.fraction is None else f"{row.fraction:.0%}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        lines.append(
            f"  {row.variant:28}{1e3 * row.median:>7.4g} ms  {f'{low} to {high} ms':>19}  {row.ratio:>6.2f}x"
            f"  {reached:>7}  {error:>8}  {extra:>8}"
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "driver": driver(),
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


def driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout else None


def commit() -> str | None:
    """The commit that is checked out, with a plus if files other than results differ; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", ":!benchmarks/results"], capture_output=True, text=True, check=True
        )
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


def main(op: str, benchmark: Callable[[str, float], Iterator[Measured]]) -> None:
    """The command line of a benchmark: prints its tables, and writes them as JSON if asked to.

    Args:
        op: The op's name.
        benchmark: device, seconds per size -> what was measured at every size.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark of {op}.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per size (default: 4)")
    parser.add_argument("--json", type=Path, help="file that the results are written to")
    options = parser.parse_args()

    info = backend_info()
    if problem := info.cuda if options.device == "cuda" else info.cpu:
        raise SystemExit(f"{op} has no native implementation to measure on {options.device}: {problem}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu_model()}, {info.simd_level}"
    print(f"{op} on {hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("ratio: time over the first row's; reached: the least time that these rates allow, over the time\n")
    results = []
    for measured in benchmark(options.device, options.seconds):
        print(table(measured), flush=True)
        results.append(asdict(measured))
    if options.json:
        record = {"op": op, "device": options.device, "provenance": provenance(), "sizes": results}
        write(options.json, json.dumps(record, indent=1) + "\n")
