"""Influence from construction to scores, against the algorithm of torch-influence 0.1.0 (baseline.py).

    python benchmarks/end_to_end.py [--problems A,B,C,D] [--quick] [--json PATH] [--markdown PATH]

Both sides take turns in one run. Cold: construct the module, solve for one query, score all training examples. Warm:
the next query on the same module. The baseline keeps nothing, so its cold is its warm. Where all queries are asked for,
the baseline's time is one query's times their number, and marked as extrapolated.
"""

from __future__ import annotations

import argparse
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
from workloads import WORKLOADS, Workload

from torch_influence import (
    AutogradInfluenceModule,
    BaseInfluenceModule,
    CGInfluenceModule,
    LiSSAInfluenceModule,
)

QUICK = {
    "A": {"n": 300, "queries": 20},
    "B": {"n": 500, "queries": 20, "features": 100},
    "C": {"n": 500, "queries": 20, "hidden": 32},
    "D": {"n": 128, "queries": 10},
}


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


@dataclass(frozen=True)
class Case:
    """A line of the table: what is asked of both sides.

    Attributes:
        build: constructs the module.
        solve: the baseline's solve for one query.
        queries: as many queries at once; 1 means one query cold, another one warm.
        tolerance: the relative accuracy that the solver was asked for; None: its error is the rounding of both.
        given: stests [queries, d] to use in place of a solve, on both sides.
        floor: seconds that the arithmetic and the memory traffic of the many queries can't go below, by measurement.
    """

    label: str
    workload: Workload
    build: Callable[[], BaseInfluenceModule]
    solve: Callable[[Baseline, Tensor], Tensor]
    queries: int = 1
    tolerance: float | None = None
    given: Tensor | None = None
    floor: Callable[[], float] | None = None

    @property
    def path(self) -> str:
        return "linear head in closed form" if self.workload.name in "AB" else "double backward"


# -- measuring -------------------------------------------------------------------------------------------------------


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def with_memory(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """The result, and the bytes needed beyond what was there before."""
    results = []
    extra = harness.extra_memory(lambda: results.append(call()), "cpu")
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
    work = case.workload
    baseline = Baseline(work.model, work.objective, work.train_loader(), work.test_loader(), work.damp, work.gnh)

    def run() -> tuple[Tensor, float, float]:
        torch.manual_seed(query)
        if case.given is not None:
            scores, seconds = clocked(lambda: baseline.scores(case.given[query]))
            return scores, 0.0, seconds
        stest, solve = clocked(lambda: case.solve(baseline, baseline.test_gradient([query])))
        scores, seconds = clocked(lambda: baseline.scores(stest))
        return scores, solve, seconds

    (scores, solve, seconds), extra = with_memory(run)
    return scores, Times(0.0, solve, seconds, extra), baseline


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

    (module, construct, (scores, solve, seconds)), extra = with_memory(run)
    return module, scores, Times(construct, solve, seconds, extra)


def warm(module: BaseInfluenceModule, case: Case) -> Times:
    """The same module's next answer: query 1, or all of them again."""
    (_, solve, seconds), extra = with_memory(lambda: ours(module, case, min(1, len(case.workload.test) - 1)))
    return Times(0.0, solve, seconds, extra)


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Takes turns until the baseline has used about ``seconds``, three rounds at the most; medians of the times."""
    one: list[Times] = []
    first: list[Times] = []
    next_: list[Times] = []
    while not one or (len(one) < 3 and sum(t.total for t in one) + one[0].total < seconds):
        expected, times, baseline = theirs(case, 0)
        one.append(times)
        repeats = 1
        while repeats:  # one of ours costs little once it is fast: a few for each of the baseline's
            module, scores, times = cold(case)
            first.append(times)
            if case.queries == 1:
                next_.append(warm(module, case))
            repeats = repeats + 1 if repeats < 3 and times.total < one[0].total / 20 else 0
        error = harness.relative_error(scores[:, 0], expected.double())
    report = module.last_report if case.given is None else None
    record: dict[str, Any] = {
        "problem": case.workload.name,
        "title": case.workload.title,
        "parameters": case.workload.parameters,
        "case": case.label,
        "queries": case.queries,
        "damp": case.workload.damp,
        "tolerance": case.tolerance,
        "error": error,
        "path": path_of(module, case),
        "iterations": None if report is None else int(report.iterations.max()),
        "products": None if report is None else report.products,
        "rounds": len(one),
        "cold": median(first),
        "warm": median(next_) if next_ else None,
        "floor": case.floor() if case.floor else None,
        "baseline": {
            **median(one),
            "iterations": baseline.iterations if case.given is None else None,
            "products": baseline.products,
            "extrapolated_from_queries": None if case.queries == 1 else 1,
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


# -- the table's lines -----------------------------------------------------------------------------------------------


def by_cg(work: Workload) -> CGInfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    return CGInfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, gnh=work.gnh, rtol=work.rtol)


def by_lissa(work: Workload, options: dict[str, Any]) -> LiSSAInfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    options = options | {"gnh": work.gnh, "on_failure": "ignore"}  # the baseline's steps, however few
    return LiSSAInfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, **options)


def directly(work: Workload) -> AutogradInfluenceModule:
    return AutogradInfluenceModule(
        work.model, work.objective, work.train_loader(), work.test_loader(), "cpu", work.damp
    )


def cases(work: Workload, quick: bool) -> Iterator[Case]:
    """The lines of one problem."""

    def solve_cg(baseline: Baseline, vector: Tensor) -> Tensor:
        return baseline.solve_cg(vector, work.rtol)

    many = len(work.test)
    curvature = "Gauss-Newton CG" if work.gnh else "CG"
    yield Case(f"{curvature}, one query", work, partial(by_cg, work), solve_cg, tolerance=work.rtol)
    if work.name == "B":
        options = {"repeat": 1, "depth": 100 if quick else 1000, "scale": lissa_scale(work)}
        build = partial(by_lissa, work, options)

        def solve_lissa(baseline: Baseline, vector: Tensor) -> Tensor:
            return baseline.solve_lissa(vector, **options)

        yield Case("LiSSA, one query", work, build, solve_lissa)
        floor = partial(lissa_floor, work, many, options["depth"])
        yield Case(f"LiSSA, {many} queries", work, build, solve_lissa, queries=many, floor=floor)
        yield Case(f"direct, {many} queries", work, partial(directly, work), solve_cg, many, work.rtol)
    if work.name == "C":
        given = torch.randn(many, work.parameters, generator=torch.Generator().manual_seed(0))
        floor = partial(scores_floor, work, many)
        yield Case(f"scores of {many} stests", work, partial(by_cg, work), solve_cg, many, given=given, floor=floor)


def lissa_scale(work: Workload) -> float:
    """Above the largest eigenvalue of any minibatch's curvature: softmax's is at most ½, times the mean |(x, 1)|²."""
    x = work.train.tensors[0].flatten(1)
    largest = x.square().sum(1).topk(min(64, len(x))).values.mean().item() + 1.0
    return 0.5 * largest + work.objective.l2 + work.damp


def lissa_floor(work: Workload, queries: int, depth: int) -> float:
    """Seconds of two GEMMs per step, features times tangents and back, and of reading or writing 6 k d numbers."""
    x = work.train.tensors[0][:64].flatten(1)
    classes = work.parameters // (x.shape[1] + 1)
    tangents, cotangents = torch.randn(x.shape[1], queries * classes), torch.randn(len(x), queries * classes)
    state = torch.randn(queries, work.parameters)
    copy = torch.empty_like(state)
    gemms = best(lambda: (x @ tangents, x.mT @ cotangents))
    return depth * (gemms + 3 * best(lambda: copy.copy_(state)))


def scores_floor(work: Workload, queries: int) -> float:
    """Seconds of one float32 GEMM [n, d] x [d, queries], by tiles of rows."""
    n, rows = len(work.train), min(500, len(work.train))
    gradients, stests = torch.randn(rows, work.parameters), torch.randn(work.parameters, queries)
    return best(lambda: gradients @ stests) * n / rows


def best(call: Callable[[], object]) -> float:
    call()
    return min(harness.timed(call, 1, "cpu") for _ in range(3))


# -- output ----------------------------------------------------------------------------------------------------------

HEADER = [
    "problem", "case", "baseline", "cold", "warm", "cold speedup", "warm speedup", "warm solve", "warm scores",
    "extra MB, baseline", "extra MB, ours", "error", "rtol", "iterations, baseline", "iterations, ours", "products",
    "over floor", "path",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table from its record."""
    base, first = row["baseline"], row["cold"]
    again = row["warm"]
    compared = again or first

    def speedup(side: dict[str, Any] | None, field: str) -> str:
        return f"{base[field] / side[field]:.1f}x" if side and base[field] and side[field] else "-"

    def or_dash(value: Any, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    def megabytes(side: dict[str, Any]) -> str:
        return "?" if side["extra_bytes"] is None else f"{side['extra_bytes'] / 1e6:.0f}"

    extrapolated = " (extrapolated)" if base["extrapolated_from_queries"] else ""
    return [
        row["problem"],
        row["case"],
        f"{base['solve']:.3g} + {base['scores']:.3g} s{extrapolated}",
        f"{first['construct']:.2g} + {first['solve']:.3g} + {first['scores']:.3g} s",
        f"{again['solve']:.3g} + {again['scores']:.3g} s" if again else "-",
        speedup(first, "total"),
        speedup(again, "total"),
        speedup(compared, "solve"),
        speedup(compared, "scores"),
        megabytes(base),
        megabytes(first),
        f"{row['error']:.1e}",
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
        "",
        "Seconds: the baseline's solve + scores, ours cold as construct + solve + scores, warm as solve + scores.",
        "Where nothing is warm, the speedups of solve and scores are the cold ones. Error: of our scores against the",
        "baseline's, relative 2-norm. Over floor: solve + scores over the arithmetic's and the traffic's own time.",
        "",
        *(f"- {name}: {title}" for name, title in titles.items()),
        "",
        harness.markdown(HEADER, [cells(row) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def run(problems: list[str], quick: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Records of all lines, one after the other."""
    for name in problems:
        work = WORKLOADS[name](**(QUICK[name] if quick else {}))
        for case in cases(work, quick):
            yield measure(case, seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(WORKLOADS), help="which of A,B,C,D (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer examples: a minute for all")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    problems = options.problems.split(",")
    if unknown := [name for name in problems if name not in WORKLOADS]:
        parser.error(f"--problems: expected some of {','.join(WORKLOADS)}, got {','.join(unknown)}")
    torch.set_num_threads(2)

    rows = []
    for row in run(problems, options.quick, seconds=2.0 if options.quick else 15.0):
        rows.append(row)
        print(f"{row['problem']} {row['case']} done", file=sys.stderr, flush=True)
    harness.publish({"quick": options.quick, "rows": rows}, report, options)


if __name__ == "__main__":
    main()
