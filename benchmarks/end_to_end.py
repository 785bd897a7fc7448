"""Influence from construction to scores, against the algorithm of torch-influence 0.1.0 (baseline.py).

    python benchmarks/end_to_end.py [--device cpu|cuda] [--problems A,B,C,D,R,T,H] [--quick] [--limit SECONDS] [--tf32]
                                    [--json PATH] [--markdown PATH]

All take turns in one run. Cold: construct the module, solve for one query, score all training examples. Warm: the next
query on the same module. Native ops off: the same once more with plain torch in place of the native ops, warm where
there is a warm one, else cold, unless that took long with them. The baseline keeps nothing, so its cold is its warm.
Where all queries are asked for, the baseline's time is one query's times their number, and marked as extrapolated. So
is that of a large problem, of which the baseline scores some examples only, and multiplies once in place of a whole
solve by conjugate gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
from baseline import Baseline
from cases import QUICK, Case, cases
from workloads import LARGE, WORKLOADS

from torch_influence import BaseInfluenceModule, backend_info
from torch_influence.ops import _native

AT_MOST = 10.0  # seconds of an answer to all queries that is worth asking for again without native ops


@dataclass
class Times:
    """Seconds of one side, one query or several."""

    construct: float
    solve: float
    scores: float
    extra_bytes: int | None

    @property
    def total(self) -> float:
        return self.construct + self.solve + self.scores


# -- measuring -------------------------------------------------------------------------------------------------------


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds until it is there, on a GPU too."""
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - start


def wait() -> None:
    """For the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def native_ops_off() -> Iterator[None]:
    """The references in place of all native ops, as where the library was built without them."""
    loaded = _native._ops
    _native._ops = frozenset()
    try:
        yield
    finally:
        _native._ops = loaded


def with_memory(call: Callable[[], Any], device: str = "cpu") -> tuple[Any, int | None]:
    """The result, and the bytes needed beyond what was there before."""
    results = []
    extra = harness.extra_memory(lambda: results.append(call()), device)
    if not results:  # the system doesn't tell
        results.append(call())
    return results[0], extra


def ours(module: BaseInfluenceModule, case: Case, query: int) -> tuple[Tensor, float, float]:
    """Scores [n, queries], seconds of the solve, seconds of the scores."""
    torch.manual_seed(query)  # LiSSA's draws
    if case.queries == 1:
        stest, solve = clocked(lambda: module.stest([query]))
        scores, seconds = clocked(lambda: module.influences(range(len(case.workload.train)), None, stest=stest))
        return scores[:, None], solve, seconds
    spent = 0.0
    plain = module.stests

    def stests(test_idxs: Any = None) -> Tensor:
        nonlocal spent
        rows, spent = (case.given, 0.0) if case.given is not None else clocked(lambda: plain(test_idxs))
        return rows

    module.stests = stests
    try:
        scores, seconds = clocked(lambda: module.influence_matrix(None, range(case.queries)))
    finally:
        del module.stests
    return scores, spent, seconds - spent


def theirs(case: Case, query: int) -> tuple[Tensor, Times, Baseline]:
    """The baseline on one query."""
    baseline = baseline_of(case)

    def run() -> tuple[Tensor, float, float]:
        torch.manual_seed(query)
        if case.given is not None:
            scores, seconds = clocked(lambda: baseline.scores(case.given[query]))
            return scores, 0.0, seconds
        stest, solve = clocked(lambda: case.solve(baseline, baseline.test_gradient([query])))
        scores, seconds = clocked(lambda: baseline.scores(stest))
        return scores, solve, seconds

    (scores, solve, seconds), extra = with_memory(run, case.device)
    return scores, Times(0.0, solve, seconds, extra), baseline


def baseline_of(case: Case) -> Baseline:
    work = case.workload
    loaders = work.train_loader(), work.test_loader()
    return Baseline(work.model, work.objective, *loaders, work.damp, work.gnh, case.device)


def theirs_of_some(case: Case, module: BaseInfluenceModule) -> tuple[Tensor, Times, Baseline, float | None]:
    """The baseline's scores of the first examples on query 0, its times for all, and the residual of our stest by it.

    A solve by conjugate gradients would be as many products as ours of that query; one is made, of our stest, and the
    scores are those of our stest. A solve by LiSSA is made.
    """
    baseline, n = baseline_of(case), len(case.workload.train)
    torch.manual_seed(0)
    stest = None if case.tolerance is None else module.stests(range(case.queries))[0]

    def run() -> tuple[Tensor, float, float, float | None]:
        torch.manual_seed(0)
        gradient, residual = baseline.test_gradient([0]), None
        if stest is None:
            used, solve = clocked(lambda: case.solve(baseline, gradient))
        else:
            product, solve = clocked(lambda: baseline.product(baseline.theta(), stest))
            used, solve = stest, solve * (1 + int(module.last_report.iterations[0]))
            residual = harness.relative_error(product, gradient.double())
        scores, seconds = clocked(lambda: baseline.scores(used, range(case.sample)))
        return scores, solve, seconds * n / case.sample, residual

    (scores, solve, seconds, residual), extra = with_memory(run, case.device)
    return scores, Times(0.0, solve, seconds, extra), baseline, residual


def path_of(module: BaseInfluenceModule, case: Case) -> str:
    """The way that ``explain()`` names; an error if it is another one than this line is about."""
    plan = module.explain(case.queries)
    if case.path not in plan["curvature"].path:
        raise RuntimeError(f"{case.label}: expected {case.path}, got\n{plan}")
    return f"{plan['curvature'].path}; {plan['scores'].path}"


def cold(case: Case) -> tuple[BaseInfluenceModule, Tensor, Times]:
    """A new module's first answer: query 0, or all of them."""

    def run() -> tuple[BaseInfluenceModule, float, tuple[Tensor, float, float]]:
        module, construct = clocked(case.build)
        return module, construct, ours(module, case, 0)

    (module, construct, (scores, solve, seconds)), extra = with_memory(run, case.device)
    return module, scores, Times(construct, solve, seconds, extra)


def warm(module: BaseInfluenceModule, case: Case) -> Times:
    """The same module's next answer: query 1, or all of them again."""
    query = min(1, len(case.workload.test) - 1)
    (_, solve, seconds), extra = with_memory(lambda: ours(module, case, query), case.device)
    return Times(0.0, solve, seconds, extra)


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Takes turns until about ``seconds`` have been used, three rounds at the most; medians of the times."""
    one: list[Times] = []
    first: list[Times] = []
    next_: list[Times] = []
    off: list[Times] = []
    residual, begin = None, time.perf_counter()
    while not one or (len(one) < 3 and (time.perf_counter() - begin) * (1 + 1 / len(one)) < seconds):
        if not case.sample:
            expected, times, baseline = theirs(case, 0)
            one.append(times)
        repeats = 1
        while repeats:  # one of ours costs little once it is fast: a few for each of the baseline's
            module, scores, times = cold(case)
            first.append(times)
            if case.queries == 1:
                next_.append(warm(module, case))
            if case.queries == 1 or times.total < AT_MOST:
                with native_ops_off():
                    off.append(warm(module, case) if case.queries == 1 else cold(case)[2])
            quick = not case.sample and times.total < one[-1].total / 20
            repeats = repeats + 1 if repeats < 3 and quick and times.total < 1 else 0
        report = module.last_report if case.given is None else None
        if case.sample:
            expected, times, baseline, residual = theirs_of_some(case, module)
            one.append(times)
    record: dict[str, Any] = {
        "problem": case.workload.name,
        "title": case.workload.title,
        "parameters": case.workload.parameters,
        "case": case.label,
        "queries": case.queries,
        "damp": case.workload.damp,
        "tolerance": case.tolerance,
        "error": harness.relative_error(scores[: len(expected), 0], expected.double()),
        "residual": residual,
        "path": path_of(module, case),
        "iterations": None if report is None else int(report.iterations.max()),
        "products": None if report is None else report.products,
        "rounds": len(one),
        "cold": median(first),
        "warm": median(next_) if next_ else None,
        "native_off": median(off) if off else None,
        "floor": case.floor() if case.floor else None,
        "baseline": {
            **median(one),
            "iterations": baseline.iterations if case.given is None else None,
            "products": baseline.products,
            "extrapolated_from_queries": None if case.queries == 1 else 1,
            "extrapolated_from_examples": case.sample or None,
        },
    }
    if case.queries > 1:
        for name in ("construct", "solve", "scores", "total"):
            record["baseline"][name] *= case.queries
    return record


def median(times: list[Times]) -> dict[str, Any]:
    """Field by field; the total is the median of the totals. Memory: the largest, of runs that it was measured in."""
    names = ("construct", "solve", "scores", "total")
    return {name: statistics.median(getattr(t, name) for t in times) for name in names} | {
        "extra_bytes": None if None in (extra := [t.extra_bytes for t in times]) else max(extra)
    }


# -- output ----------------------------------------------------------------------------------------------------------

HEADER = [
    "problem", "case", "baseline", "cold", "warm", "native ops off", "cold speedup", "warm speedup", "warm solve",
    "warm scores", "native speedup", "extra MB, baseline", "extra MB, ours", "error", "residual", "rtol",
    "iterations, baseline", "iterations, ours", "products", "over floor", "path",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table from its record."""
    base, first = row["baseline"], row["cold"]
    again = row["warm"]
    compared = again or first
    off = row.get("native_off")  # results of before have none

    def speedup(side: dict[str, Any] | None, field: str) -> str:
        return f"{base[field] / side[field]:.1f}x" if side and base[field] and side[field] else "-"

    def or_dash(value: Any, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    def megabytes(side: dict[str, Any]) -> str:
        return "?" if side["extra_bytes"] is None else f"{side['extra_bytes'] / 1e6:.0f}"

    some = base["extrapolated_from_queries"] or base.get("extrapolated_from_examples")
    extrapolated = " (extrapolated)" if some else ""
    return [
        row["problem"],
        row["case"],
        f"{base['solve']:.3g} + {base['scores']:.3g} s{extrapolated}",
        f"{first['construct']:.2g} + {first['solve']:.3g} + {first['scores']:.3g} s",
        f"{again['solve']:.3g} + {again['scores']:.3g} s" if again else "-",
        f"{off['solve']:.3g} + {off['scores']:.3g} s" if off else "-",
        speedup(first, "total"),
        speedup(again, "total"),
        speedup(compared, "solve"),
        speedup(compared, "scores"),
        f"{off['total'] / compared['total']:.2f}x" if off else "-",
        megabytes(base),
        megabytes(first),
        f"{row['error']:.1e}",
        or_dash(row.get("residual"), ".1e"),
        or_dash(row["tolerance"], "g"),
        or_dash(base["iterations"]),
        or_dash(row["iterations"]),
        or_dash(row["products"]),
        f"{(first['solve'] + first['scores']) / row['floor']:.2f}x" if row["floor"] else "-",
        row["path"],
    ]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    titles = {row["problem"]: f"{row['title']}, d = {row['parameters']:,}, damp {row['damp']:g}" for row in rows}
    lines = [
        "# End to end: influence of all training examples",
        "",
        harness.where(record) + ("; **quick: smaller problems**" if record["quick"] else ""),
        *on_device(record),
        "",
        "Seconds: the baseline's solve + scores, ours cold as construct + solve + scores, warm as solve + scores.",
        "Native ops off: the same package with plain torch in place of its native ops, warm where there is a warm",
        "time, else cold; native speedup: by them, of all that was timed. Where nothing is warm, the speedups of solve",
        "and scores are the cold ones. Error: of our scores against the baseline's, relative 2-norm. Residual:",
        "|b - As| / |b| of our s by the baseline's product, where it did not solve: it scored our s then. Over floor:",
        "solve + scores over the arithmetic's and the traffic's own time.",
        "",
        *(f"- {name}: {title}" for name, title in titles.items()),
        "",
        harness.markdown(HEADER, [cells(row) for row in rows]),
        *(f"\nFailed: {line['problem']} {line['case']}: {line['error']}" for line in record.get("failed", ())),
        *(f"\nNot run, out of time: {line}" for line in record.get("not_run", ())),
    ]
    return "\n".join(lines) + "\n"


def on_device(record: dict[str, Any]) -> list[str]:
    """Of a record that says so, on which device and in what precision it was measured."""
    if "device" not in record:
        return []
    name = f" ({record['gpu']}, TF32 {'allowed' if record['tf32'] else 'off'})" if record["gpu"] else ""
    ops = f"no native ops: {record['no_native_ops']}" if record["no_native_ops"] else "native ops"
    return ["", f"On {record['device']}{name}, {ops}."]


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    problems: list[str]
    device: str
    quick: bool
    limit: float

    @property
    def seconds(self) -> float:
        """For a line, about."""
        return 4.0 if self.quick else 20.0


def run(request: Request) -> dict[str, list[Any]]:
    """Records of all lines, of those that failed, and names of those that the limit left no time for."""
    rows: list[Any] = []
    failed: list[Any] = []
    not_run: list[Any] = []
    begin = time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - begin > request.limit

    def one(name: str, label: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # out of memory, say: the other lines may fit
            failed.append({"problem": name, "case": label, "error": str(error).splitlines()[0]})

    for name in request.problems:
        if late():
            not_run.append(name)
            continue
        sizes = QUICK[name] if request.quick else {}
        make = partial(LARGE[name], device=request.device) if name in LARGE else WORKLOADS[name]
        work = one(name, "making it", lambda make=make, sizes=sizes: make(**sizes))
        if work is None:
            continue
        for case in cases(work, request.quick, request.device):
            if late():
                not_run.append(f"{name} {case.label}")
                continue
            row = one(name, case.label, lambda case=case: measure(case, request.seconds))
            if row is not None:
                rows.append(row)
            print(f"{name} {case.label} {'failed' if row is None else 'done'}", file=sys.stderr, flush=True)
            if request.device == "cuda":
                torch.cuda.empty_cache()
    return {"rows": rows, "failed": failed, "not_run": not_run}


def allow_tf32(allowed: bool) -> None:
    """In matrix products and in convolutions, whose own default is yes; for the baseline, too."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def main(argv: list[str] | None = None) -> None:
    known = {**WORKLOADS, **LARGE}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--problems", help=f"which of {','.join(known)} (default: all; on the CPU those without R,T,H)")
    parser.add_argument("--quick", action="store_true", help="fewer examples: a minute for all")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no line is begun")
    parser.add_argument("--tf32", action="store_true", help="let the GPU round operands to TF32")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    problems = (options.problems or ",".join(known if options.device == "cuda" else WORKLOADS)).split(",")
    if unknown := [name for name in problems if name not in known]:
        parser.error(f"--problems: expected some of {','.join(known)}, got {','.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu where torch finds no CUDA device, got cuda")
    allow_tf32(options.tf32)
    info = backend_info()
    record = {
        "quick": options.quick,
        "device": options.device,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "tf32": options.tf32,
        "no_native_ops": info.cuda if options.device == "cuda" else info.cpu,
        **run(Request(problems, options.device, options.quick, options.limit)),
    }
    harness.publish(record, report, options)
    if record["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
