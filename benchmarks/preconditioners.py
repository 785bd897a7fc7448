"""What preconditioners save conjugate gradients, and what they cost: hard problems at little damping.

    python benchmarks/preconditioners.py [--problems A,B,C,D,U] [--json PATH] [--markdown PATH]

All solve the same right-hand sides, test gradients, on a module that has read its data, and take turns. Products are
multiplications by the curvature, each for all the rows still at work; one that makes M has many rows, so rows are
counted, too. B, C and D are smaller than elsewhere, so that two minutes on two cores do. U has features in many units.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import harness
from workloads import WORKLOADS, Classification, Workload, rotated_features, teacher_labels, trained

from torch_influence import CGInfluenceModule
from torch_influence.linop import LinearOperator
from torch_influence.solvers import Jacobi, Nystrom, SolveReport, cg

DAMP, RTOL = 1e-4, 1e-4
RANKS = (20, 100, 300)
MAXITER = 1000
SIZES: dict[str, dict[str, int]] = {
    "A": {},
    "B": {"n": 2000},
    "C": {"n": 500, "features": 200, "hidden": 64},
    "D": {"n": 64},
    "U": {"n": 2000, "features": 200},
}
ROWS = {"A": 8, "B": 8, "C": 8, "D": 2, "U": 8}
ROUNDS = {"A": 3, "B": 3, "C": 3, "D": 1, "U": 3}


class Counted(LinearOperator):
    """Counts products, and the rows in them."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.products, self.rows = operator, 0, 0
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        self.rows += len(rows)
        return self.operator.product(rows)

    def diagonal(self) -> Tensor | None:
        return self.operator.diagonal()


def recipes() -> dict[str, Any]:
    return {"none": None, "Jacobi": Jacobi(), **{f"Nyström, rank {rank}": Nystrom(rank) for rank in RANKS}}


def in_other_units(n: int, queries: int, features: int, classes: int = 10) -> Workload:
    """U: as B, but the features' spectrum decays little, and each is in a unit of its own, from 1 to 1/30."""
    generator = torch.Generator().manual_seed(4)
    x = rotated_features(n + queries, features, decay=0.2, norm=10.0, generator=generator)
    y = teacher_labels(x, classes, generator)
    torch.manual_seed(4)
    model = torch.nn.Linear(features, classes)
    title = f"softmax regression, {n} x {features} in units of 1 to 1/30, {classes} classes"
    objective = Classification(F.cross_entropy, l2=1e-3)
    work = trained("U", title, model, objective, x, y, n, damp=DAMP, gnh=True, rtol=RTOL)
    units = torch.logspace(0, math.log10(30), features)
    with torch.no_grad():
        model.weight /= units  # the same outputs
    train, test = (TensorDataset(data.tensors[0] * units, data.tensors[1]) for data in (work.train, work.test))
    return dataclasses.replace(work, train=train, test=test)


def measure(name: str) -> list[dict[str, Any]]:
    """The lines of one problem: each recipe made and used once a round, and what is made used again."""
    work: Workload = (WORKLOADS | {"U": in_other_units})[name](queries=ROWS[name], **SIZES[name])
    loaders = work.train_loader(), work.test_loader()
    module = CGInfluenceModule(work.model, work.objective, *loaders, "cpu", DAMP, work.gnh)
    rows = torch.stack([module.test_loss_grad([i]) for i in range(ROWS[name])])
    with module._problem.evaluation.session():
        base = module._problem.curvature()
        base.product(rows)  # what is done once

        def solve(M: Any) -> tuple[SolveReport, int, float, Tensor]:
            counted = Counted(base)
            operator = counted.damped(DAMP)
            start = time.perf_counter()
            made = None if M is None else M.of(operator)
            making, products = time.perf_counter() - start, counted.products
            x, report = cg(operator, rows, M=made, rtol=RTOL, maxiter=MAXITER, on_failure="ignore")
            report = dataclasses.replace(report, products=report.products + products)
            return report, counted.rows, making, x

        found = harness.turns({which: partial(solve, M) for which, M in recipes().items()}, ROUNDS[name])
        residuals = {
            which: float(((rows - base.damped(DAMP).product(x)).norm(dim=1) / rows.norm(dim=1)).max())
            for which, (_, (*_, x)) in found.items()
        }
    lines = []
    for which, (seconds, (report, multiplied, making, _)) in found.items():
        lines.append(
            {
                "problem": name,
                "title": work.title,
                "parameters": work.parameters,
                "curvature": "Gauss-Newton" if work.gnh else "Hessian",
                "k": len(rows),
                "rounds": ROUNDS[name],
                "recipe": which,
                "iterations": int(report.iterations.max()),
                "products": report.products,
                "rows": multiplied,
                "seconds": seconds,
                "of_making": making,
                "residual": residuals[which],
                "converged": int(report.converged.sum()),
                "precision_limit": int(report.precision_limit.sum()),
            }
        )
    return lines


HEADER = [
    "problem", "M", "iterations", "products", "of none's", "rows", "of none's", "seconds", "of none's", "to make M",
    "largest residual", "converged",
]  # fmt: skip


def cells(line: dict[str, Any], none: dict[str, Any]) -> list[str]:
    """A line of the table from its record, and from that without preconditioner."""

    def ratio(field: str) -> str:
        return f"{line[field] / none[field]:.2f}x"

    limited = f", {line['precision_limit']} at the limit of the arithmetic" if line["precision_limit"] else ""
    return [
        line["problem"],
        line["recipe"],
        str(line["iterations"]),
        str(line["products"]),
        ratio("products"),
        f"{line['rows']:,}",
        ratio("rows"),
        f"{line['seconds']:.3g} s",
        ratio("seconds"),
        f"{line['of_making']:.2g} s" if line["recipe"] != "none" else "-",
        f"{line['residual']:.1e}",
        f"{line['converged']} of {line['k']}{limited}",
    ]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    none = {row["problem"]: row for row in rows if row["recipe"] == "none"}
    lines = [
        "# Preconditioners",
        "",
        harness.where(record),
        "",
        f"Conjugate gradients to a relative residual of {record['rtol']:g} in at most {record['maxiter']} iterations,",
        f"damp = {record['damp']:g} besides the models' own weight decay of 1e-3. Rows: all that were multiplied by",
        "the curvature. Seconds: medians of runs that took turns, M made anew in each; a module keeps it, so that",
        "later solves take that much less. Residual: true.",
        "",
        *(
            f"- {name}: {row['title']}, {row['curvature']}, d = {row['parameters']:,}, k = {row['k']}, "
            f"{row['rounds']} round{'s' * (row['rounds'] > 1)}"
            for name, row in none.items()
        ),
        "",
        harness.markdown(HEADER, [cells(row, none[row["problem"]]) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default=",".join(SIZES), help="which of A,B,C,D,U (default: all)")
    harness.output_options(parser)
    options = parser.parse_args()
    problems = options.problems.split(",")
    if unknown := [name for name in problems if name not in SIZES]:
        parser.error(f"--problems: expected some of {','.join(SIZES)}, got {','.join(unknown)}")

    rows = []
    for name in problems:
        rows += measure(name)
        print(f"{name} done", file=sys.stderr, flush=True)
    harness.publish({"damp": DAMP, "rtol": RTOL, "maxiter": MAXITER, "rows": rows}, report, options)


if __name__ == "__main__":
    main()
