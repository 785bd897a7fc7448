"""CUDA graphs of whole iterations, against the package's own loops: what replaying would give small models.

    python benchmarks/cuda_graphs.py [--json PATH] [--markdown PATH]

An iteration, a product with a minibatch and ``lissa_step`` or a product with all data and ``cg_step``, is a function
over tensors that stay where they are. It is run as it is, and captured once and replayed. All solve the same system as
the package does, with the same draws. A capture that fails is a line of the table. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import harness
from cases import by_cg, by_lissa, lissa_scale, sampled_scale
from end_to_end import wait
from workloads import Workload, perceptron, softmax_regression

from torch_influence import CGInfluenceModule, LiSSAInfluenceModule
from torch_influence.ops import CGScalars, cg_step, lissa_step

DEPTH = 1000
MAXITER = 200
TARGET = 5.0  # how much faster LiSSA is to be on a small model, for graphs to be worth their place in the package
STEPS = (1, 10)  # iterations a graph
ROUNDS = 5


class LissaIteration:
    """A step of LiSSA on one vector [d]; its minibatches are drawn beforehand, as the package draws them.

    The minibatch's number is on the device, so that each replay takes the next one.
    """

    def __init__(self, module: LiSSAInfluenceModule, work: Workload, vector: Tensor) -> None:
        curvature = module._problem.curvature()
        plain = getattr(curvature, "plain", curvature)
        self.limit = module.depth
        self.draws = torch.tensor(list(plain.batches.draw(self.limit)), device=vector.device)
        self.number = torch.zeros(1, dtype=torch.int64, device=vector.device)
        self.rows, self.h = vector[None], vector[None].clone()
        self.damp, self.scale = module.damp, module.scale
        if plain is curvature:
            data = [t.to(vector.device) for t in work.train.tensors]

            def product(indices: Tensor) -> Tensor:
                batch = [t.index_select(0, indices) for t in data]
                return plain.batch_product(batch, self.h, plain.leaves)
        else:

            def product(indices: Tensor) -> Tensor:
                return curvature.of(indices, len(indices), self.h)

        self.product = product

    def start(self) -> None:
        self.h.copy_(self.rows)
        self.number.zero_()

    def __call__(self) -> None:
        indices = self.draws.index_select(0, self.number).squeeze(0)
        lissa_step(self.h, self.rows, self.product(indices).detach(), self.damp, self.scale)
        self.number.add_(1)

    def done(self) -> bool:
        return False

    def solution(self) -> Tensor:
        return self.h[0] / self.scale


class CGIteration:
    """An iteration of conjugate gradients on one vector [d], from zero; when it is done it changes nothing any more."""

    limit = MAXITER

    def __init__(self, module: CGInfluenceModule, _: Workload, vector: Tensor) -> None:
        self.operator = module._problem.curvature().damped(module.damp)
        self.operator.product(vector[None])  # what is kept is made now
        self.rows = vector[None]
        self.x, self.r, self.p = (torch.zeros_like(self.rows) for _ in range(3))
        self.scalars = torch.zeros(len(CGScalars._fields), 1, dtype=torch.float64, device=vector.device)
        self.tolerance = module.cg_kwargs["rtol"]

    def start(self) -> None:
        self.x.zero_()
        self.r.copy_(self.rows)
        self.p.copy_(self.rows)
        self.scalars.zero_()
        named = CGScalars(*self.scalars)
        named.active.fill_(1.0)
        named.rho.copy_(self.rows.double().square().sum(1))
        named.tolerance.copy_(self.tolerance * named.rho.sqrt())

    def __call__(self) -> None:
        cg_step(self.x, self.r, self.p, self.scalars, q=self.operator.product(self.p).detach())

    def done(self) -> bool:
        return not CGScalars(*self.scalars).active.any()

    def solution(self) -> Tensor:
        return self.x[0].clone()


ITERATIONS = {"LiSSA": LissaIteration, "CG": CGIteration}


def solve(iteration: Any, advance: Callable[[], object], steps: int) -> Tensor:
    """The solution [d]; ``advance`` takes the iteration so many steps further."""
    iteration.start()
    for _ in range(iteration.limit // steps):
        advance()
        if iteration.done():
            break
    return iteration.solution()


def repeated(iteration: Callable[[], None], steps: int) -> Callable[[], None]:
    """So many steps in a call, eagerly."""

    def advance() -> None:
        for _ in range(steps):
            iteration()

    return advance


def captured(iteration: Any, steps: int) -> Callable[[], None]:
    """So many steps in a call, replayed from a graph; on the current stream, where autograd's kept graphs were made."""
    iteration.start()
    repeated(iteration, 3)()  # whatever is made, compiled or probed the first time
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        repeated(iteration, steps)()
    return graph.replay


def problem(name: str, method: str, device: str) -> tuple[Workload, Any]:
    """A small model's workload and module."""
    work = softmax_regression() if name == "linear head" else perceptron(n=2000, features=100, hidden=32)
    if method == "CG":
        return work, by_cg(work, device)
    scale = lissa_scale(work) if name == "linear head" else sampled_scale(work, device)
    return work, by_lissa(work, {"repeat": 1, "depth": DEPTH, "scale": scale}, device)


def measure(name: str, method: str, device: str) -> list[dict[str, Any]]:
    """The lines of one model and solver; on the CPU the captures fail."""
    work, module = problem(name, method, device)
    vector = module.test_loss_grad([0])

    def packages() -> Tensor:
        torch.manual_seed(0)
        return module.inverse_hvp(vector)

    def waited(call: Callable[[], Tensor]) -> Tensor:
        result = call()
        wait()
        return result

    with module._problem.evaluation.session():
        calls = {"the package": packages}
        failures = {}
        torch.manual_seed(0)
        iteration = ITERATIONS[method](module, work, vector)
        calls["the same iteration, eager"] = partial(solve, iteration, repeated(iteration, STEPS[-1]), STEPS[-1])
        for steps in STEPS:
            variant = f"graph of {steps} iteration{'s' if steps > 1 else ''}"
            try:
                calls[variant] = partial(solve, iteration, captured(iteration, steps), steps)
            except Exception as error:  # which operation can't be captured is what this benchmark is to find out
                failures[variant] = (str(error) or type(error).__name__).splitlines()[0]
        for call in calls.values():
            waited(call)
        outcome = harness.turns({variant: partial(waited, call) for variant, call in calls.items()}, ROUNDS)
    line = {"problem": name, "parameters": work.parameters, "method": method, "failed": None}
    first, expected = outcome["the package"]
    rows = [
        line
        | {
            "variant": variant,
            "median": seconds,
            "speedup": first / seconds,
            "error": harness.relative_error(result, expected.double()),
        }
        for variant, (seconds, result) in outcome.items()
    ]
    nothing = {"median": None, "speedup": None, "error": None}
    return rows + [line | nothing | {"variant": variant, "failed": why} for variant, why in failures.items()]


def report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    if record["needs"]:
        return f"CUDA graphs: nothing measured, {record['needs']}\n"
    cells = [
        [
            f"{row['problem']}, d = {row['parameters']:,}",
            row["method"],
            row["variant"],
            *(
                [f"failed: {row['failed']}", "-", "-"]
                if row["failed"]
                else [f"{1e3 * row['median']:.3g} ms", f"{row['speedup']:.2f}x", f"{row['error']:.1e}"]
            ),
        ]
        for row in record["rows"]
    ]
    best = [row["speedup"] for row in record["rows"] if row["method"] == "LiSSA" and row["variant"].startswith("graph")]
    best = [speedup for speedup in best if speedup]
    verdict = f"reached, {max(best):.1f}x" if best and max(best) >= TARGET else "missed"
    header = ["model", "solver", "variant", "a solve", "speedup", "difference"]
    lines = [
        "# CUDA graphs of whole iterations",
        "",
        f"{record['gpu']}; {harness.where(record)}",
        "",
        "Speedup: over the package's own loop. Difference: of the solution from the package's, relative 2-norm.",
        f"Target, {TARGET:g}x for LiSSA on a small model: {verdict}.",
        "",
        harness.markdown(header, cells),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.output_options(parser)
    options = parser.parse_args(argv)
    record: dict[str, Any] = {"needs": "this needs a CUDA device, and torch finds none", "gpu": None, "rows": []}
    if torch.cuda.is_available():
        record |= {"needs": "", "gpu": torch.cuda.get_device_name()}
        # All on one stream that can be captured: autograd runs a backward where the forward ran.
        with torch.cuda.stream(torch.cuda.Stream()):
            for name in ("linear head", "MLP"):
                for method in ITERATIONS:
                    record["rows"] += measure(name, method, "cuda")
    harness.publish(record, report, options)


if __name__ == "__main__":
    main()
