"""How the times of solves and scores grow with examples n, parameters d and queries k, each doubled in turn.

    python benchmarks/scaling.py [--json PATH] [--markdown PATH]

A linear head (softmax) and a perceptron with one hidden layer, Gauss-Newton. Solves are those of a new module that has
read its data; a direct one forms the matrix and factors it. Slopes are fitted to the largest sizes, in log-log: 1 is
proportional. The plot is written beside the table, which shows it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import harness
from all_queries import build, not_asked
from end_to_end import Case, clocked, ours
from workloads import Workload, perceptron, softmax_regression

SOLVERS = ("direct", "cg", "block")
PARTS = (*SOLVERS, "scores")
ROUNDS = 3
STEPS = 6  # sizes of each kind
UPPER = 3  # of them, the largest, that a slope is fitted to
N, K = 1000, 32  # what is held fixed, together with the middle step of d
MIDDLE = 3
SMALLEST_N, SMALLEST_K = 250, 8


def head(n: int, step: int) -> Workload:
    return softmax_regression(n=n, queries=SMALLEST_K << STEPS, features=12 << step)


def net(n: int, step: int) -> Workload:
    return perceptron(n=n, queries=SMALLEST_K << STEPS, features=60, hidden=2 << step)


MODELS = {"softmax head": head, "MLP": net}  # by their width: of the inputs, of the hidden layer


def problems(model: str) -> Iterator[tuple[str, Workload, int]]:
    """(what is doubled, the problem, k)."""
    make = MODELS[model]
    for step in range(STEPS):
        yield "n", make(SMALLEST_N << step, MIDDLE), K
    for step in range(STEPS):
        yield "d", make(N, step), K
    middle = make(N, MIDDLE)
    for step in range(STEPS):
        yield "k", middle, SMALLEST_K << step


def measure(work: Workload, k: int) -> dict[str, Any]:
    """Seconds of every solver and of scores, and how many products the solvers took."""
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    products = {}
    for i in range(ROUNDS):
        rows = torch.randn(k, work.parameters, generator=torch.Generator().manual_seed(i))
        for solver in SOLVERS:
            module = build(work, solver)
            module.hvp(rows[:1])  # reads the data and keeps what it will
            _, spent = clocked(partial(module.inverse_hvp, rows))
            seconds[solver].append(spent)
            products[solver] = module.last_report.products
        case = Case("", work, partial(build, work), not_asked, k, given=rows)
        ours(module, case, 0)
        seconds["scores"].append(ours(module, case, 0)[2])
    return {"seconds": {part: statistics.median(seconds[part]) for part in PARTS}, "products": products}


def slope(points: list[dict[str, Any]], kind: str, part: str) -> float:
    """Of log seconds over log size, by least squares, for the largest sizes."""
    x, y = (
        torch.tensor([math.log(value) for value in values], dtype=torch.float64)
        for values in zip(*((it[kind], it["seconds"][part]) for it in points[-UPPER:]), strict=True)
    )
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


# -- output ----------------------------------------------------------------------------------------------------------


def curves(record: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(model, what is doubled, its points by size)."""
    for model in MODELS:
        for kind in ("n", "d", "k"):
            yield model, kind, [it for it in record["rows"] if (it["model"], it["doubled"]) == (model, kind)]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = []
    for model, kind, points in curves(record):
        sizes = f"{points[0][kind]:,} to {points[-1][kind]:,}"
        last = points[-1]
        found = [f"{slope(points, kind, part):.2f} ({last['seconds'][part]:.3g} s)" for part in PARTS]
        products = [f"{points[0]['products'][s]} to {last['products'][s]}" for s in ("cg", "block")]
        rows.append([model, kind, sizes, *found, *products])
    header = ["model", "doubled", "sizes", *PARTS, "products, cg", "products, block"]
    lines = [
        "# Scaling",
        "",
        harness.where(record),
        "",
        f"Slopes of the {UPPER} largest sizes, and the seconds of the largest. Where not doubled: n = {N:,}, k = {K}.",
        "",
        harness.markdown(header, rows),
        "",
        "![Seconds over n, d and k](scaling.png)",
        "",
        explanation(record),
    ]
    return "\n".join(lines) + "\n"


def explanation(record: dict[str, Any]) -> str:
    """What the slopes come from."""
    points = {(model, kind): some for model, kind, some in curves(record)}

    def of(kind: str, part: str) -> str:
        return " and ".join(f"{slope(points[model, kind], kind, part):.1f}" for model in MODELS)

    def ends(kind: str, solver: str) -> str:
        found = [points[model, kind] for model in MODELS]
        return " and ".join(f"{some[0]['products'][solver]} to {some[-1]['products'][solver]}" for some in found)

    return (
        "Slopes are those of the head and of the MLP. "
        "**n**: a product with the curvature, the forming of the matrix and the scores are passes over the examples, "
        f"so all tend to 1 (cg {of('n', 'cg')}, block {of('n', 'block')}, direct {of('n', 'direct')}, scores "
        f"{of('n', 'scores')}): less while what is done once, as factoring is, still counts, and more where more "
        f"iterations are needed ({ends('n', 'cg')} products by cg). "
        "**d**: a product has about n d multiplications for each row, and iterations depend on the spectrum, not on "
        f"d ({ends('d', 'cg')} products by cg), so cg tends to 1, from below ({of('d', 'cg')}) since what is done "
        "for outputs and activations that do not grow still counts at these sizes; so does block "
        f"({of('d', 'block')}). The matrix takes about n d² and its factor d³: direct has a slope of about 2 "
        f"({of('d', 'direct')}), in the end of 3. Scores, made of the inputs and output gradients of layers, have "
        f"{of('d', 'scores')}: their parts that do not depend on d, such as a backward pass, count most. "
        f"**k**: cg does each row's work ({of('k', 'cg')}). Block shares its space, so more rows need fewer products "
        f"({ends('k', 'block')}), which saves a part of it ({of('k', 'block')}). Direct solves with a factor cost d² "
        f"for each row, little beside making it ({of('k', 'direct')}). Scores take one backward pass for all queries "
        f"({of('k', 'scores')})."
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """A row of panels for each model, a column for each of n, d, k; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(MODELS), 3, figsize=(12, 7.5), sharey="row", layout="constrained")
    names = {"n": "examples n", "d": "parameters d", "k": "queries k"}
    for panel, (model, kind, points) in zip(panels.flat, curves(record), strict=True):
        x = [it[kind] for it in points]
        for part, marker in zip(PARTS, "so^v", strict=True):
            y = [it["seconds"][part] for it in points]
            panel.loglog(x, y, marker=marker, markersize=5, label=f"{part}, slope {slope(points, kind, part):.1f}")
        panel.set_xticks(x, [f"{value:,}" for value in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_title(f"{model}: {names[kind]}")
        panel.legend(fontsize=8, loc="upper left")
    for first in panels[:, 0]:
        first.set_ylabel("seconds")
    figure.suptitle(f"Seconds of solves and scores; slopes of the {UPPER} largest sizes")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.output_options(parser)
    options = parser.parse_args()

    rows = []
    for model in MODELS:
        for kind, work, k in problems(model):
            sizes = {"n": len(work.train), "d": work.parameters, "k": k}
            rows.append({"model": model, "doubled": kind, **sizes, **measure(work, k)})
        print(f"{model} done", file=sys.stderr, flush=True)
    record = {"rounds": ROUNDS, "rows": rows}
    harness.publish(record, report, options)
    if options.markdown:
        plot(record, options.markdown.with_suffix(".png"))


if __name__ == "__main__":
    main()
