"""All queries at once: InfluenceModule against row-wise conjugate gradients, the algorithm of 0.1.0, and gradient rows.

    python benchmarks/all_queries.py [--problems A,B,C,D] [--quick] [--json PATH] [--markdown PATH]

On problem C block against row-wise conjugate gradients, which take turns, and all queries from construction to scores;
on A and B all queries against the baseline, whose time is one query's times their number; on D scores of given stests
against per-example gradients. Every line has its target beside it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import harness
from end_to_end import QUICK, Case, Times, cold, median, ours, theirs, with_memory
from workloads import WORKLOADS, Workload

from torch_influence import CGInfluenceModule, InfluenceModule

SOME = 64  # queries of the comparison of block and row-wise conjugate gradients
CHECKED = 8  # columns that are compared with float64
LONGEST = 100  # seconds beyond which row-wise conjugate gradients on all queries are extrapolated
EXAMPLES_AT_ONCE = 256  # in the per-example paths


def side(name: str, times: Times | dict[str, Any], **more: Any) -> dict[str, Any]:
    """One side of a line: what it is, its seconds, its memory, and what is known of its solve."""
    seconds = dataclasses.asdict(times) | {"total": times.total} if isinstance(times, Times) else times
    return {"name": name, "products": None, "residual": None, "extrapolated_from": None} | seconds | more


def times_of(module: InfluenceModule) -> dict[str, Any]:
    """What the last solve tells."""
    report = module.last_report
    assert report is not None
    return {"products": report.products, "residual": float(report.residual.max()), "method": report.method}


def target(what: str, value: float, limit: float, at_least: bool = True) -> dict[str, Any]:
    met = value >= limit if at_least else value <= limit
    return {"what": what, "value": value, "limit": limit, "at_least": at_least, "met": met}


def build(work: Workload, solver: str = "auto") -> InfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    return InfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, work.gnh, solver, rtol=work.rtol)


def path_of(work: Workload, queries: int, solver: str = "auto") -> str:
    """What ``explain()`` says before anything has been solved."""
    plan = build(work, solver).explain(queries)
    return "; ".join(plan[part].path for part in ("curvature", "solver", "scores"))


def not_asked(*_: Any) -> Tensor:
    """The baseline's solve, in cases where the baseline has no part."""
    raise NotImplementedError


# -- the lines -------------------------------------------------------------------------------------------------------


def block_against_rows(work: Workload, queries: int, rounds: int) -> dict[str, Any]:
    """Solves of the same right-hand sides on modules that have read their data."""
    modules = {solver: build(work, solver) for solver in ("block", "cg")}
    rows = torch.stack([modules["cg"].test_loss_grad([i]) for i in range(queries)])
    sides = {}
    for solver, module in modules.items():
        module.hvp(rows[:1])
        extra = harness.extra_memory(partial(module.inverse_hvp, rows), "cpu")
        sides[solver] = {"extra_bytes": extra}
    found = harness.turns({s: partial(m.inverse_hvp, rows) for s, m in modules.items()}, rounds)
    for solver, module in modules.items():
        times = Times(0.0, found[solver][0], 0.0, sides[solver]["extra_bytes"])
        sides[solver] = side(f'solver="{solver}"', times, **times_of(module))
    faster = sides["cg"]["total"] / sides["block"]["total"]
    return {
        "case": f"solve, {queries} queries",
        "queries": queries,
        "rtol": work.rtol,
        "ours": sides["block"],
        "other": sides["cg"],
        "error": harness.relative_error(found["block"][1], found["cg"][1].double()),
        "error_of": "solutions against row-wise",
        "targets": [
            target("faster", faster, 2.5),
            target("true residual", max(sides["block"]["residual"], sides["cg"]["residual"]), work.rtol, False),
        ],
        "path": path_of(work, queries, "block"),
    }


def all_against_rows(work: Workload, some: dict[str, Any]) -> dict[str, Any]:
    """From construction to scores of all queries; row-wise by ``some`` of them, where all would take long."""
    many = len(work.test)
    case = Case("", work, partial(build, work), not_asked, many)
    module, scores, times = cold(case)
    auto = side('solver="auto"', times, **times_of(module))
    factor = many / some["queries"]
    other = some["other"]
    if other["solve"] * factor > LONGEST:
        solve = other["solve"] * factor
        by_rows = Times(times.construct, solve, times.scores, other["extra_bytes"])
        rows = side('solver="cg"', by_rows, extrapolated_from=some["queries"], products=other["products"])
    else:
        plain, _, by_rows = cold(dataclasses.replace(case, build=partial(build, work, "cg")))
        rows = side('solver="cg"', by_rows, **times_of(plain))
    checked = list(range(0, many, max(1, many // CHECKED)))[:CHECKED]
    exact = float64_scores(work, checked)
    error = max(harness.relative_error(scores[:, i], column) for i, column in zip(checked, exact.mT, strict=True))
    return {
        "case": f"all, {many} queries",
        "queries": many,
        "rtol": work.rtol,
        "ours": auto,
        "other": rows,
        "error": error,
        "error_of": f"worst of {len(checked)} columns against float64",
        "targets": [
            target("seconds", auto["total"], 60, False),
            target("faster", rows["total"] / auto["total"], 200 / 60),
            target("error", error, 2e-3, False),
        ],
        "path": path_of(work, many),
    }


def float64_scores(work: Workload, queries: list[int]) -> Tensor:
    """Scores [n, queries] of the same model and data in float64, solved to 1e-10."""
    train, test = (TensorDataset(data.tensors[0].double(), data.tensors[1]) for data in (work.train, work.test))
    exact = dataclasses.replace(work, model=copy.deepcopy(work.model).double(), train=train, test=test)
    loaders = exact.train_loader(), exact.test_loader()
    module = CGInfluenceModule(exact.model, exact.objective, *loaders, "cpu", work.damp, gnh=work.gnh, rtol=1e-10)
    return module.influence_matrix(None, queries)


def all_against_baseline(work: Workload, wanted: float, rounds: int) -> dict[str, Any]:
    """From construction to scores of all queries, against one query of the baseline times their number."""
    many = len(work.test)
    case = Case("", work, partial(build, work), lambda baseline, v: baseline.solve_cg(v, work.rtol), many)
    first, once = [], []
    for _ in range(rounds):
        expected, times, baseline = theirs(case, 0)
        once.append(times)
        module, scores, times = cold(case)
        first.append(times)
    single = median(once)
    for part in ("solve", "scores", "total"):
        single[part] *= many
    auto = side('solver="auto"', median(first), **times_of(module))
    other = side("baseline", single, products=baseline.products, extrapolated_from=1)
    return {
        "case": f"all, {many} queries",
        "queries": many,
        "rtol": work.rtol,
        "ours": auto,
        "other": other,
        "error": harness.relative_error(scores[:, 0], expected.double()),
        "error_of": "column 0 against the baseline's",
        "targets": [target("faster", other["total"] / auto["total"], wanted)],
        "path": path_of(work, many),
    }


def scores_against_rows(work: Workload, queries: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Scores of given stests, against per-example gradients: some at once, and all of them held."""
    n, d = len(work.train), work.parameters
    stests = torch.randn(queries, d, generator=torch.Generator().manual_seed(0))
    module = build(work)
    case = Case("", work, partial(build, work), not_asked, queries, given=stests)
    calls: dict[str, Callable[[], Tensor]] = {
        "captured": lambda: ours(module, case, 0)[0],
        f"rows, {EXAMPLES_AT_ONCE} at once": lambda: by_gradients(work, stests, held=False),
        f"rows, all {n} held": lambda: by_gradients(work, stests, held=True),
    }
    extra = {}
    for name, call in calls.items():
        call()  # what is read and verified once
        extra[name] = with_memory(call)[1]
    found = harness.turns(calls, rounds)
    path = module.explain(queries)["scores"].path
    sides = {name: side(name, Times(0.0, 0.0, seconds, extra[name])) for name, (seconds, _) in found.items()}
    captured, scores = sides["captured"], found["captured"][1]
    for name in list(calls)[1:]:
        targets = [target("faster", sides[name]["total"] / captured["total"], 1)]
        if captured["extra_bytes"] is not None and sides[name]["extra_bytes"] is not None:
            targets.append(target("less memory", sides[name]["extra_bytes"] / max(captured["extra_bytes"], 1), 20))
        yield {
            "case": f"scores, {queries} queries",
            "queries": queries,
            "rtol": None,
            "ours": captured,
            "other": sides[name],
            "gradients_bytes": 4 * n * d,
            "error": harness.relative_error(scores, found[name][1].double()),
            "error_of": "scores against those of rows",
            "targets": targets,
            "path": path,
        }


def by_gradients(work: Workload, stests: Tensor, held: bool) -> Tensor:
    """Scores [n, k] from rows of per-example gradients by vmap: all at once, or thrown away as they are used."""
    params = {name: p.detach() for name, p in work.model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        flat = torch.cat([p.reshape(-1) for p in params.values()])
        bound = partial(torch.func.functional_call, work.model, params)
        return work.objective.train_loss(bound, flat, (x[None], y[None]))

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    n, (x, y) = len(work.train), work.train.tensors
    scores = torch.empty(n, len(stests))
    everything = torch.empty(n if held else 0, work.parameters)
    for first in range(0, n, EXAMPLES_AT_ONCE):
        part = slice(first, first + EXAMPLES_AT_ONCE)
        rows = torch.cat([g.flatten(1) for g in gradient(params, x[part], y[part]).values()], dim=1)
        if held:
            everything[part] = rows
        else:
            scores[part] = rows @ stests.mT
    return (torch.mm(everything, stests.mT, out=scores) if held else scores).div_(n)


# -- output ----------------------------------------------------------------------------------------------------------

HEADER = [
    "problem", "case", "ours", "against", "construct + solve + scores", "against", "faster", "targets", "extra MB",
    "against", "error", "products", "against", "largest residual", "against", "path",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table from its record."""
    both = row["ours"], row["other"]

    def seconds(it: dict[str, Any]) -> str:
        marked = f" (extrapolated from {it['extrapolated_from']})" if it["extrapolated_from"] else ""
        return f"{it['construct']:.2g} + {it['solve']:.3g} + {it['scores']:.3g} s{marked}"

    def each(field: str, form: str, scale: float = 1) -> list[str]:
        return ["-" if it[field] is None else format(it[field] / scale, form) for it in both]

    def aim(it: dict[str, Any]) -> str:
        sign = ">=" if it["at_least"] else "<="
        return f"{it['what']} {it['value']:.3g} {sign} {it['limit']:g}: {'met' if it['met'] else '**missed**'}"

    return [
        row["problem"],
        row["case"],
        both[0]["name"],
        both[1]["name"],
        *map(seconds, both),
        f"{both[1]['total'] / both[0]['total']:.3g}x",
        "; ".join(map(aim, row["targets"])),
        *each("extra_bytes", ".0f", 1e6),
        f"{row['error']:.1e} ({row['error_of']})",
        *each("products", ".0f"),
        *each("residual", ".1e"),
        row["path"],
    ]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    titles = {row["problem"]: row for row in rows}
    lines = [
        "# All queries at once",
        "",
        harness.where(record) + ("; **quick: smaller problems**" if record["quick"] else ""),
        "",
        "Extra MB: the peak beyond what there was before; where times are extrapolated, that of the queries that they",
        "are extrapolated from. Products: multiplications by the curvature, each for all the rows still at work; the",
        "baseline's are those of one query. Residual: the largest of the true |b - Ax| / |b|.",
        "",
        *(
            f"- {name}: {row['title']}, d = {row['parameters']:,}, rtol {row['tolerance']:g}"
            for name, row in titles.items()
        ),
        "",
        harness.markdown(HEADER, [cells(row) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def lines_of(work: Workload, quick: bool) -> Iterator[dict[str, Any]]:
    """The lines of one problem."""
    if work.name == "C":
        some = block_against_rows(work, min(SOME, len(work.test)), rounds=1 if quick else 2)
        yield some
        yield all_against_rows(work, some)
    elif work.name == "D":
        yield from scores_against_rows(work, len(work.test), rounds=3)
    else:
        yield all_against_baseline(work, {"A": 2000, "B": 800}[work.name], rounds=1 if quick else 3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(WORKLOADS), help="which of A,B,C,D (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer examples: the targets then mean nothing")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    problems = options.problems.split(",")
    if unknown := [name for name in problems if name not in WORKLOADS]:
        parser.error(f"--problems: expected some of {','.join(WORKLOADS)}, got {','.join(unknown)}")

    rows = []
    for name in problems:
        work = WORKLOADS[name](**(QUICK[name] if options.quick else {}))
        about = {"problem": name, "title": work.title, "parameters": work.parameters, "tolerance": work.rtol}
        for row in lines_of(work, options.quick):
            rows.append(about | row)
            print(f"{name} {row['case']} done", file=sys.stderr, flush=True)
    harness.publish({"quick": options.quick, "rows": rows}, report, options)


if __name__ == "__main__":
    main()
