"""LiSSA: the Neumann series of the inverse, one minibatch per term (Agarwal, Bullins and Hazan 2017, section 3)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from torch_influence.linop import Damped, LinearOperator, Sampled
from torch_influence.ops import lissa_step
from torch_influence.solvers._base import Progress
from torch_influence.solvers._report import DivergenceWarning, OnFailure, SolveReport, fail


def lissa(
    operator: LinearOperator,
    rows: Tensor,
    *,
    repeat: int,
    depth: int,
    scale: float,
    generator: torch.Generator | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Estimates A⁻¹ b for each row b of ``rows`` [k, d]; all rows see the same minibatches.

        h₀ = b,   h_t = b + h_{t-1} - A_t h_{t-1} / scale,   A⁻¹ b ≈ mean over repeats of h_depth / scale

    A_t is the damped curvature of minibatch t. The fixed point is A⁻¹b exactly (damping included once); it is
    approached at the rate 1 - λ_min/scale, and only if ``scale`` exceeds half the largest eigenvalue of the A_t.

    Args:
        operator: A, or A.damped(...), whose base can be sampled.
        rows: [k, d] in the operator's dtype, on its device.
        repeat: independent runs that are averaged.
        depth: steps of each run.
        scale: what the curvature is divided by; the largest eigenvalue of a minibatch's damped curvature is safe.
        generator: where minibatches are drawn from; torch's default generator if None.
        callback: called as callback(run, step, h) after each step, with a copy of h: [d] for one row, else [k, d].
        on_failure: "warn", "raise" (a ``SolveError``) or "ignore".
        progress: wraps the steps in a progress bar.

    Returns:
        The estimates [k, d] and the report (the residual of a stochastic estimate is not known: NaN).

    Raises:
        TypeError: an operator that can't be sampled.
        ValueError: repeat, depth or scale out of range.

    Warns:
        DivergenceWarning: a run left the range of finite numbers.

    Cost:
        repeat x depth products with one minibatch; memory 4 k d, whatever the depth.
    """
    start = time.perf_counter()
    base, shift = (operator.base, operator.shift) if isinstance(operator, Damped) else (operator, 0.0)
    if not isinstance(base, Sampled):
        raise TypeError(f"operator: expected one that can be sampled by minibatch, got {type(base).__name__}")
    for name, value in (("repeat", repeat), ("depth", depth)):
        if not value >= 1 or value % 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value}")
    if not scale > 0:
        raise ValueError(f"scale: expected a number > 0, got {scale}")

    k = len(rows)
    total = torch.zeros_like(rows)
    finite = torch.ones(k, dtype=torch.bool, device=rows.device)
    for run in range(repeat):
        h = rows.clone()
        norms = torch.zeros(k, dtype=torch.float64, device=rows.device)
        minibatches = base.sampled(depth, generator)
        steps = minibatches if progress is None else progress(minibatches, f"LiSSA {run + 1}/{repeat}", depth)
        for step, minibatch in enumerate(steps):
            norms = lissa_step(h, rows, minibatch.product(h), shift, scale)
            if callback is not None:
                callback(run, step, h[0].clone() if k == 1 else h.clone())
        total.add_(h, alpha=1.0 / scale)
        finite &= norms.isfinite()
    report = SolveReport(
        method="LiSSA",
        iterations=torch.full((k,), repeat * depth, dtype=torch.int64),
        residual=torch.full((k,), torch.nan, dtype=torch.float64),
        converged=finite.cpu(),
        precision_limit=torch.zeros(k, dtype=torch.bool),
        negative_curvature=torch.zeros(k, dtype=torch.bool),
        products=repeat * depth,
        seconds=time.perf_counter() - start,
    )
    if not bool(finite.all()):
        found = DivergenceWarning(
            f"LiSSA diverged for {int((~finite).sum())} of {k} right-hand sides: the result is not finite. "
            f"scale={scale:g} is below half the largest eigenvalue of a minibatch's curvature; raise scale (try 10 "
            "times as much), or raise damp if the curvature has negative eigenvalues"
        )
        fail([found], on_failure, total.div_(repeat), report)
        return total, report
    return total.div_(repeat), report
