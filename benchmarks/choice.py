"""Whether solver="auto" takes the best solver, on a grid of 15 problems.

    python benchmarks/choice.py [--json PATH] [--markdown PATH]

Each time is that of a new module, from construction to the solutions of k right-hand sides. What counts is the ratio of
the solver that auto names to the fastest one; beside it stands the time of auto itself, which also has to choose.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
from workloads import Workload, logistic_head, perceptron, softmax_regression

from torch_influence import InfluenceModule

SOLVERS = ("direct", "dual", "cg", "block")
ROUNDS = 3
LIMIT = 1.5
HOPELESS = 300  # times the operations of the cheapest: not tried


def problems() -> list[Workload]:
    """Small and large heads and networks, exact and Gauss-Newton; each is asked for 1, 16 and 200 solutions."""
    small = perceptron(n=500, queries=1, features=20, hidden=16, classes=5)
    return [
        logistic_head(n=1800, queries=1, features=2048),
        dataclasses.replace(softmax_regression(n=2000, queries=1, features=50), gnh=False),
        perceptron(n=1000, queries=1, features=60, hidden=40),
        dataclasses.replace(small, gnh=False, rtol=1e-5),
        perceptron(n=100, queries=1),
    ]


def measure(work: Workload, k: int) -> dict[str, Any]:
    """Seconds of every solver, and which of them auto takes."""
    rows = torch.randn(k, work.parameters, generator=torch.Generator().manual_seed(0))

    def module(solver: str) -> InfluenceModule:
        options = work.damp, work.gnh, solver
        return InfluenceModule(work.model, work.objective, work.train_loader(), None, "cpu", *options, rtol=work.rtol)

    def solve(solver: str) -> Tensor:
        return module(solver).inverse_hvp(rows)

    plan = module("auto").explain(k)
    chosen = next(name for name in SOLVERS if name not in dict(plan["solver"].why_not))
    able = []
    auto = module("auto")
    with auto._problem.evaluation.session():
        ranked = auto._solver.ranked(auto._problem.curvature().damped(auto.damp), k)
        operations = {name: cost.operations for name, cost in ranked.items()}
    for name in ("auto", *SOLVERS):  # also what the process does once
        if operations.get(name, 0.0) > HOPELESS * min(operations.values()):
            continue
        try:
            solve(name)
            able.append(name)
        except (MemoryError, ValueError) as why:  # a matrix that does not fit, a curvature without a dual
            print(f"{work.title}: no {name}: {why}", file=sys.stderr)
    found = harness.turns({name: partial(solve, name) for name in able}, ROUNDS)
    seconds = {name: median for name, (median, _) in found.items()}
    best = min(able[1:], key=lambda name: seconds[name])
    return {
        "title": work.title,
        "parameters": work.parameters,
        "gnh": work.gnh,
        "damp": work.damp,
        "rtol": work.rtol,
        "k": k,
        "seconds": seconds,
        "chosen": chosen,
        "best": best,
        "ratio": seconds[chosen] / seconds[best],
        "path": f"{plan['curvature'].path}; {plan['solver'].path}",
        "why_not": dict(plan["solver"].why_not),
    }


HEADER = ["problem", "curvature", "d", "rtol", "k", *SOLVERS, "auto itself", "auto takes", "best", "ratio", "estimate"]


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table from its record."""
    return [
        row["title"],
        "Gauss-Newton" if row["gnh"] else "Hessian",
        f"{row['parameters']:,}",
        f"{row['rtol']:g}",
        str(row["k"]),
        *(f"{1e3 * row['seconds'][name]:.3g} ms" if name in row["seconds"] else "-" for name in (*SOLVERS, "auto")),
        row["chosen"],
        row["best"],
        f"{row['ratio']:.2f}x" + ("" if row["ratio"] <= LIMIT else ", **missed**"),
        "; ".join(f"{name} {why.split(' (')[0]}" for name, why in row["why_not"].items() if "operations" in why),
    ]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    right = sum(row["chosen"] == row["best"] for row in rows)
    within = sum(row["ratio"] <= LIMIT for row in rows)
    lines = [
        '# What solver="auto" takes',
        "",
        harness.where(record),
        "",
        f"From construction to k solutions, medians of {ROUNDS} runs that took turns. Ratio: of the solver that auto",
        f"takes to the fastest. The fastest is taken in {right} of {len(rows)}, one within {LIMIT}x of it in {within}.",
        "Estimate: what auto takes the others to cost.",
        "",
        harness.markdown(HEADER, [cells(row) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.output_options(parser)
    options = parser.parse_args()

    rows = []
    for work in problems():
        for k in (1, 16, 200):
            rows.append(measure(work, k))
            print(f"{work.title}, k = {k} done", file=sys.stderr, flush=True)
    harness.publish({"rounds": ROUNDS, "limit": LIMIT, "rows": rows}, report, options)


if __name__ == "__main__":
    main()
