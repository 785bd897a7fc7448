"""The lines of the end-to-end benchmark: what is asked of this package, and of the baseline."""

from __future__ import annotations

import sys
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
from workloads import LARGE, Workload

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
    "R": {"n": 96, "queries": 3, "side": 16, "widths": (8, 16), "blocks": 1},
    "T": {"n": 96, "queries": 3, "vocabulary": 300, "width": 16, "heads": 2, "length": 8},
    "H": {"n": 2000, "queries": 10, "features": 64},
}
SAMPLE = 200  # examples of a large problem that the baseline scores
MAXITER = 60  # of a large problem's conjugate gradients


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
        device: where all of it runs; the baseline's conjugate gradients are on the host.
        sample: how many examples the baseline scores, multiplying once in place of a solve by conjugate gradients; 0:
            it does everything.
    """

    label: str
    workload: Workload
    build: Callable[[], BaseInfluenceModule]
    solve: Callable[[Baseline, Tensor], Tensor]
    queries: int = 1
    tolerance: float | None = None
    given: Tensor | None = None
    floor: Callable[[], float] | None = None
    device: str = "cpu"
    sample: int = 0

    @property
    def path(self) -> str:
        if self.workload.linear:
            return "linear head in closed form"
        return "by rules of its layers" if self.workload.gnh else "double backward"


def by_cg(work: Workload, device: str = "cpu") -> CGInfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    options = {"maxiter": MAXITER} if work.name in LARGE else {}
    options = {"gnh": work.gnh, "rtol": work.rtol, **options}
    return CGInfluenceModule(work.model, work.objective, *loaders, device, work.damp, **options)


def by_lissa(work: Workload, options: dict[str, Any], device: str = "cpu") -> LiSSAInfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    options = options | {"gnh": work.gnh, "on_failure": "ignore"}  # the baseline's steps, however few
    return LiSSAInfluenceModule(work.model, work.objective, *loaders, device, work.damp, **options)


def directly(work: Workload, device: str = "cpu") -> AutogradInfluenceModule:
    loaders = work.train_loader(), work.test_loader()
    return AutogradInfluenceModule(work.model, work.objective, *loaders, device, work.damp)


def cases(work: Workload, quick: bool, device: str = "cpu") -> Iterator[Case]:
    """The lines of one problem."""

    def solve_cg(baseline: Baseline, vector: Tensor) -> Tensor:
        return baseline.solve_cg(vector, work.rtol, MAXITER if work.name in LARGE else None)

    def solve_lissa(baseline: Baseline, vector: Tensor) -> Tensor:
        return baseline.solve_lissa(vector, **options)

    many = len(work.test)
    sample = 0 if quick or work.name not in LARGE else SAMPLE
    case = partial(Case, device=device, sample=sample)
    cg = partial(by_cg, work, device)
    curvature = "Gauss-Newton CG" if work.gnh else "CG"
    yield case(f"{curvature}, one query", work, cg, solve_cg, tolerance=work.rtol)
    if work.name == "B":
        options = {"repeat": 1, "depth": 100 if quick else 1000, "scale": lissa_scale(work)}
        build = partial(by_lissa, work, options, device)
        yield case("LiSSA, one query", work, build, solve_lissa)
        floor = partial(lissa_floor, work, many, options["depth"], device)
        yield case(f"LiSSA, {many} queries", work, build, solve_lissa, queries=many, floor=floor)
        direct = partial(directly, work, device)
        yield case(f"direct, {many} queries", work, direct, solve_cg, queries=many, tolerance=work.rtol)
    if work.name == "C":
        given = torch.randn(many, work.parameters, generator=torch.Generator().manual_seed(0)).to(device)
        floor = partial(scores_floor, work, many, device)
        yield case(f"scores of {many} stests", work, cg, solve_cg, queries=many, given=given, floor=floor)
    if work.name in "RT":
        options = {"repeat": 1, "depth": 20 if quick else 100, "scale": sampled_scale(work, device)}
        yield case("LiSSA, one query", work, partial(by_lissa, work, options, device), solve_lissa)
    if work.name == "H":
        yield case(f"{curvature}, {many} queries", work, cg, solve_cg, queries=many, tolerance=work.rtol)


def lissa_scale(work: Workload) -> float:
    """Above the largest eigenvalue of any minibatch's curvature: softmax's is at most ½, times the mean |(x, 1)|²."""
    x = work.train.tensors[0].flatten(1)
    largest = x.square().sum(1).topk(min(64, len(x))).values.mean().item() + 1.0
    return 0.5 * largest + work.objective.l2 + work.damp


def sampled_scale(work: Workload, device: str) -> float:
    """Twice what the package finds by itself, as the baseline needs one that is given."""
    module = by_lissa(work, {"repeat": 1, "depth": 1}, device)
    module.stest([0])
    return 2 * module._lissa._auto_scale._made.scale(work.damp)


def lissa_floor(work: Workload, queries: int, depth: int, device: str) -> float:
    """Seconds of two GEMMs per step, features times tangents and back, and of reading or writing 6 k d numbers."""
    x = work.train.tensors[0][:64].flatten(1).to(device)
    classes = work.parameters // (x.shape[1] + 1)
    tangents = torch.randn(x.shape[1], queries * classes, device=device)
    cotangents = torch.randn(len(x), queries * classes, device=device)
    state = torch.randn(queries, work.parameters, device=device)
    copy = torch.empty_like(state)
    gemms = best(lambda: (x @ tangents, x.mT @ cotangents), device)
    return depth * (gemms + 3 * best(lambda: copy.copy_(state), device))


def scores_floor(work: Workload, queries: int, device: str) -> float:
    """Seconds of one float32 GEMM [n, d] x [d, queries], by tiles of rows."""
    n, rows = len(work.train), min(500, len(work.train))
    gradients = torch.randn(rows, work.parameters, device=device)
    stests = torch.randn(work.parameters, queries, device=device)
    return best(lambda: gradients @ stests, device) * n / rows


def best(call: Callable[[], object], device: str) -> float:
    call()
    return min(harness.timed(call, 1, device) for _ in range(3))
