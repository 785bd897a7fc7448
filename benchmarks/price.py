"""Exact scores at the price of an approximation: all queries at several tolerances and budgets, and EK-FAC beside them.

    python benchmarks/price.py [--quick] [--json PATH] [--markdown PATH]

Problem C with all queries and with 64, problem B by a factored matrix and by whatever costs least; each from
construction to scores, in a process that is warm. EK-FAC is kronfluence's, where that is installed (`make bench-peers`
makes build/peers with it). In the same run stands the rate of the best float32 matrix product of the problem's shape:
products by the curvature can't be faster, so that "over five products" says how far a whole answer is from five of
them. Errors and rank correlations are those of some columns against float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
from all_queries import CHECKED, float64_scores
from end_to_end import QUICK, clocked
from workloads import WORKLOADS, Workload

from torch_influence import InfluenceModule

SOME = 64
FIVE = 5  # products, of a block of all queries at rtol 1e-3, with the one that verifies


@dataclasses.dataclass(frozen=True)
class Line:
    """One answer: a problem, so many queries, and how it is asked for; ``limit`` is the goal in seconds, if any."""

    problem: str
    queries: int
    case: str
    module: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: float | None = None


def lines(queries: dict[str, int]) -> list[Line]:
    """What is measured, in order."""
    b, c = queries["B"], queries["C"]
    return [
        Line("C", c, "rtol 1e-3", {"rtol": 1e-3}, limit=28.0),
        Line("C", c, "rtol 1e-2", {"rtol": 1e-2}, limit=20.0),
        Line("C", c, "score_rtol 1e-2", {"rtol": 1e-5}, {"score_rtol": 1e-2}),
        *(Line("C", c, f"max_products {count}", {"rtol": 1e-5}, {"max_products": count}) for count in (1, 2, 3, 4)),
        Line("C", c, "rtol 1e-2, products in bfloat16", {"rtol": 1e-2, "product_dtype": torch.bfloat16}),
        Line("C", min(SOME, c), "rtol 1e-3", {"rtol": 1e-3}, limit=5.0),
        Line("B", b, 'solver="direct"', {"solver": "direct"}, limit=2.5),
        Line("B", b, "rtol 1e-3", {"rtol": 1e-3}),
    ]


def rate_of_products(n: int, f: int, columns: int) -> dict[str, float]:
    """GFLOP/s of [n, f] @ [f, columns] in float32: as torch does it by default, and by oneDNN where it can be had."""
    x, w = torch.randn(n, f), torch.randn(f, columns)
    matmul: Any = torch.backends.mkldnn.matmul
    before, found = matmul.fp32_precision, {}
    for name, precision in (("torch's default", before), ("oneDNN", "bf16")):  # bf16 in name, see docs/choosing.md
        try:
            matmul.fp32_precision = precision
            exact = x[:64].double() @ w.double()
            if harness.relative_error((x @ w)[:64], exact) < 1e-5:
                found[name] = 2e-9 * n * f * columns / min(clocked(lambda: x @ w)[1] for _ in range(10))
        finally:
            matmul.fp32_precision = before
    return found


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of columns."""
    ranks = [t.argsort(dim=0).argsort(dim=0).double() for t in (a, b)]
    one, other = (r - r.mean(dim=0) for r in ranks)
    return (one * other).sum(dim=0) / (one.norm(dim=0) * other.norm(dim=0))


def judged(scores: Tensor, exact: Tensor, checked: list[int]) -> dict[str, float]:
    """The worst relative error of a column, and the mean rank correlation."""
    some = scores[:, checked].double()
    errors = (some - exact).norm(dim=0) / exact.norm(dim=0)
    return {"error": float(errors.max()), "rank": float(spearman(some, exact).mean())}


def measure(line: Line, work: Workload, rate: float, exact: Tensor, checked: list[int]) -> dict[str, Any]:
    """One answer, from construction to scores."""
    loaders = work.train_loader(), work.test_loader()
    options = {"rtol": work.rtol} | line.module
    if line.module.get("solver") == "direct":
        del options["rtol"]

    def answer() -> tuple[InfluenceModule, Tensor]:
        module = InfluenceModule(work.model, work.objective, *loaders, "cpu", work.damp, work.gnh, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # budgets say that they are spent
            return module, module.influence_matrix(None, range(line.queries), **line.call)

    (module, scores), seconds = clocked(answer)
    found = module.last_report
    assert found is not None
    n, d = len(work.train), work.parameters
    ideal = FIVE * 4e-9 * n * d * line.queries / rate
    return {
        "problem": line.problem,
        "queries": line.queries,
        "case": line.case,
        "seconds": seconds,
        "limit": line.limit,
        "over_five_products": seconds / ideal if line.problem == "C" else None,
        "products": found.products,
        "residual": float(found.residual.max()),
        "estimated": largest(found.error),
        **judged(scores, exact, [i for i in checked if i < line.queries]),
        "method": found.method,
    }


def largest(errors: Tensor | None) -> float | None:
    """The largest estimated error that is known; None where none is."""
    known = torch.empty(0) if errors is None else errors[~errors.isnan()]
    return float(known.max()) if len(known) else None


def by_kronfluence(work: Workload, queries: int, exact: Tensor, checked: list[int]) -> dict[str, Any]:
    """EK-FAC with the same damping, from its preparation to scores."""
    from adapters import kronfluence

    scores, seconds = clocked(partial(kronfluence, work, queries, same=True))
    return {
        "problem": work.name,
        "queries": queries,
        "case": "kronfluence, EK-FAC, same damping",
        "seconds": seconds,
        "limit": None,
        "over_five_products": None,
        "products": None,
        "residual": None,
        "estimated": None,
        **judged(centred(scores), centred(exact), checked),
        "method": "EK-FAC; both centred, as it leaves the regulariser out of gradients",
    }


def centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(dim=0)


def aim(row: dict[str, Any]) -> str:
    """The goal in seconds, and whether it is met."""
    if row["limit"] is None:
        return "-"
    return f"<= {row['limit']:g}: {'met' if row['seconds'] <= row['limit'] else '**missed**'}"


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    header = [
        "problem", "queries", "case", "seconds", "goal", "over five products", "products", "largest residual",
        "estimated error", "error of scores", "rank correlation", "method",
    ]  # fmt: skip

    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            row["problem"],
            str(row["queries"]),
            row["case"],
            f"{row['seconds']:.3g}",
            aim(row),
            cell(row["over_five_products"], ".2f"),
            cell(row["products"], "d"),
            cell(row["residual"], ".1e"),
            cell(row["estimated"], ".1e"),
            f"{row['error']:.1e}",
            f"{row['rank']:.5f}",
            row["method"],
        ]
        for row in record["rows"]
    ]
    rates = "; ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in record["rates"].items())
    lines = [
        "# Exact at the price of the approximation",
        "",
        harness.where(record) + ("; **quick: smaller problems**" if record["quick"] else ""),
        "",
        f"Float32 matrix products of C's shape in this run: {rates}.",
        "",
        "Seconds: from construction to all scores. Over five products: those seconds over five products of all rows",
        "at the best of these rates. Products: multiplications by the curvature; with many rows the last is one",
        "of a few combinations. Estimated error: the report's, of the worst query. Error: the worst of "
        f"{CHECKED} columns against float64.",
        "",
        *(f"- {name}: {title}" for name, title in record["titles"].items()),
        "",
        harness.markdown(header, rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer examples: the goals then mean nothing")
    harness.output_options(parser)
    options = parser.parse_args(argv)
    works = {name: WORKLOADS[name](**(QUICK[name] if options.quick else {})) for name in "BC"}
    rates, rows = measured(works)
    if importlib.util.find_spec("kronfluence"):
        c, checked = works["C"], checked_of(works["C"])
        rows.append(by_kronfluence(c, len(c.test), float64_scores(c, checked), checked))
    record = {"quick": options.quick, "rates": rates, "rows": rows, "titles": {n: w.title for n, w in works.items()}}
    harness.publish(record, report, options)


def checked_of(work: Workload) -> list[int]:
    """The queries whose scores are compared with float64."""
    many = len(work.test)
    return list(range(0, many, max(1, many // CHECKED)))[:CHECKED]


def measured(works: dict[str, Workload]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The rates of matrix products, and all lines."""
    for name, work in works.items():  # what a process does once: threads, self-tests, the choice of products
        measure(Line(name, 2, ""), work, 1.0, float64_scores(work, [0]), [0])
    exact = {name: float64_scores(work, checked_of(work)) for name, work in works.items()}
    c = works["C"]
    rates = rate_of_products(len(c.train), c.train.tensors[0].shape[1], 1280)
    rows = []
    for line in lines({name: len(work.test) for name, work in works.items()}):
        inside = [i for i in checked_of(works[line.problem]) if i < line.queries]
        columns = exact[line.problem][:, : len(inside)]
        rows.append(measure(line, works[line.problem], max(rates.values()), columns, inside))
        print(f"{line.problem} {line.queries} {line.case}: {rows[-1]['seconds']:.3g} s", file=sys.stderr, flush=True)
    return rates, rows


if __name__ == "__main__":
    main()
