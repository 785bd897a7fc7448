"""Conjugate gradients (Hestenes and Stiefel 1952) on many right-hand sides at once, with SciPy's conventions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.ops import CGScalars, cg_step
from torch_influence.solvers._base import (
    Progress,
    SolveReport,
    first_guess,
    iteration_limit,
    norms,
    reachable,
    warn_of_failures,
)


def cg(
    operator: LinearOperator,
    rows: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    x0: Any = None,
    M: Any = None,
    callback: Callable[[np.ndarray], object] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``rows`` [k, d]; one product with A per iteration serves all rows.

    A row is done when its true residual is within max(rtol·|b|, atol), SciPy's meaning: when the recurrence says so,
    b - Ax is computed from its definition, and the row goes on from there if rounding had fooled the recurrence, until
    that no longer helps.

    Args:
        operator: A, symmetric positive definite. On p'Ap <= 0 the iteration goes on, as SciPy's does, and reports it.
        rows: [k, d] in the operator's dtype, on its device.
        rtol: relative tolerance.
        atol: absolute tolerance.
        maxiter: iterations at the most; 10 d by default.
        x0: first guess, [d] or [k, d]; zero by default. An array or a tensor.
        M: approximate inverse of A, symmetric positive definite: an array, a sparse matrix, anything with ``matvec``
            or a callable on ndarrays [d]; or a ``LinearOperator`` of this package, which stays on the device.
        callback: called after each iteration with each unfinished row's iterate, an ndarray [d].
        progress: wraps the iterations in a progress bar.

    Returns:
        x [k, d] and the report.

    Raises:
        ValueError: a shape, a tolerance or ``maxiter`` that makes no sense.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right.

    Cost:
        iterations + 1 products (2 without an exact zero start); memory 5 k d. On a GPU an iteration never waits for the
        device, so a row's end is noticed one iteration late, and one product more is made.
    """
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    precondition = None if M is None else _preconditioner(M, rows)
    tolerance = torch.clamp(rtol * norms(rows), min=atol)
    x, report = iterate(operator, rows, first_guess(x0, rows), tolerance, limit, precondition, callback, progress)
    warn_of_failures(report, rtol, limit, rows.dtype)
    return x, report


def iterate(
    operator: LinearOperator,
    rows: Tensor,
    x: Tensor | None,
    tolerance: Tensor,
    limit: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[np.ndarray], object] | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """``cg`` from the first guess ``x``, which is overwritten, to absolute tolerances [k]; nothing is warned of."""
    start = time.perf_counter()
    state = _State(operator, rows, x, tolerance, precondition)
    steps: Iterable[int] = range(limit)
    if progress is not None:
        steps = progress(steps, "conjugate gradients", None)  # no total: it stops long before the limit
    for _ in steps:
        if not len(state.at_work):
            break
        state.step()
        if callback is not None:
            for row in state.stepped():
                callback(row.cpu().numpy())
        if state.some_stopped(wait=callback is not None):
            state.settle()
    if len(state.at_work) and state.some_stopped(wait=True):
        state.settle()
    state.give_up()
    return state.all_x, state.report(time.perf_counter() - start)


class _State:
    """Of all rows: x and the report's entries. Of those still at work: x, r, p and scalars as ``cg_step`` has them."""

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        x: Tensor | None,
        tolerance: Tensor,
        precondition: Callable[[Tensor], Tensor] | None,
    ) -> None:
        k = len(b)
        self.operator, self.b, self.precondition = operator, b, precondition
        self.products = 0
        self.all_x = torch.zeros_like(b, memory_format=torch.contiguous_format) if x is None else x
        self.residual = norms(b)
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.converged, self.limited = (torch.zeros_like(self.residual).bool() for _ in range(2))
        self.all_scalars = b.new_zeros(len(CGScalars._fields), k, dtype=torch.float64)
        self.row = CGScalars(*self.all_scalars)
        self.tolerance = self.row.tolerance.copy_(tolerance)

        self.at_work = torch.arange(k, device=b.device)
        self.x, self.scalars = self.all_x, self.all_scalars
        self.r = b.clone(memory_format=torch.contiguous_format) if x is None else self.true_residual(self.at_work)
        self.p = torch.empty_like(self.r)
        self.late: tuple[Tensor, torch.cuda.Event] | None = None
        norm = norms(self.r)
        self.converged = self.within(norm, self.at_work)
        self.residual[self.converged] = norm[self.converged]
        self.begin(~self.converged)
        self.keep(~self.converged)

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return self.operator.product(rows).detach()

    def true_residual(self, which: Tensor) -> Tensor:
        return self.b[which] - self.product(self.all_x[which])

    def begin(self, which: Tensor) -> None:
        """(Re)starts the iteration in these rows at work: the next direction is the (preconditioned) residual."""
        self.row.active[which] = 1.0
        self.row.residual[which] = torch.inf  # unknown to the recurrence
        self.row.rho[which] = 0.0
        if self.precondition is None:
            self.p[which] = self.r[which]
            self.row.rho[which] = norms(self.r[which]).square()

    def step(self) -> None:
        preconditioned = self.precondition is not None
        if self.precondition is not None:
            z = self.precondition(self.r).detach()
            cg_step(self.x, self.r, self.p, self.scalars, z=z, preconditioned=preconditioned)
        q = self.product(self.p)
        cg_step(self.x, self.r, self.p, self.scalars, q=q, preconditioned=preconditioned)

    def done(self) -> Tensor:
        """Of the rows at work those whose recurrence is within tolerance, by the step's own comparison."""
        return self.row.residual.isfinite() & (self.row.residual <= self.row.tolerance.square())

    def stepped(self) -> Tensor:
        """The iterates of the last step, without the rows that broke down in it."""
        return self.x[(self.row.active != 0) | self.done()]

    def some_stopped(self, wait: bool) -> bool:
        """Whether some row at work is done or has broken down.

        To tell, the host must wait for the device. A GPU would run dry meanwhile, so unless asked to ``wait`` this
        answers for the step before, whose answer is there, while the device is busy with the last one.
        """
        if wait or not self.x.is_cuda:
            return not bool(self.row.active.all())
        before = self.late
        event = torch.cuda.Event()
        answer = self.row.active.all().to("cpu", non_blocking=True)
        event.record(torch.cuda.current_stream(self.x.device))
        self.late = (answer, event)
        if before is None:
            return False
        before[1].synchronize()
        return not bool(before[0])

    def settle(self) -> None:
        """Lets go of the rows that have stopped.

        Those done are judged by their true residual: what only seemed to be done starts again from there, unless that
        has ceased to help. Those that broke down are judged at the end.
        """
        self.late = None
        self.write_back()
        check = (self.row.active == 0) & self.done()
        if check.any():
            which = self.at_work[check]
            self.r[check] = self.true_residual(which)
            norm = norms(self.r[check])
            done = self.within(norm, which)
            self.residual[which], self.converged[which] = norm, done
            self.limited[which] = ~done & ~(norm < 0.5 * self.best[which])
            self.best[which] = norm
            again = check.clone()
            again[check] = ~(done | self.limited[which])
            self.begin(again)
        self.keep(self.row.active != 0)

    def within(self, norm: Tensor, which: Tensor) -> Tensor:
        return norm.isfinite() & (norm <= self.tolerance[which])  # an infinite b has an infinite tolerance

    def write_back(self) -> None:
        if self.x is not self.all_x:
            self.all_x[self.at_work] = self.x
            self.all_scalars[:, self.at_work] = self.scalars

    def keep(self, which: Tensor) -> None:
        if which.all():
            return
        self.at_work = self.at_work[which]
        self.x, self.r, self.p, self.scalars = self.x[which], self.r[which], self.p[which], self.scalars[:, which]
        self.row = CGScalars(*self.scalars)

    def give_up(self) -> None:
        """The true residual of rows that ran out of iterations or broke down."""
        self.write_back()
        which = (~(self.converged | self.limited)).nonzero().flatten()
        if len(which):
            self.residual[which] = norms(self.true_residual(which))
            self.converged[which] = self.within(self.residual[which], which)

    def report(self, seconds: float) -> SolveReport:
        size = norms(self.b)
        scalars = CGScalars(*self.all_scalars)
        limit = reachable(scalars.largest.sqrt(), self.all_x, size)
        relative = torch.where(size > 0, self.residual / size, self.residual)
        return SolveReport(
            method="conjugate gradients",
            iterations=scalars.iterations.long(),
            residual=relative,
            converged=self.converged,
            precision_limit=~self.converged & self.residual.isfinite() & (self.residual <= limit),
            negative_curvature=scalars.negative != 0,
            products=self.products,
            seconds=seconds,
        )


def _preconditioner(M: Any, rows: Tensor) -> Callable[[Tensor], Tensor]:
    d = rows.shape[1]
    if isinstance(M, LinearOperator):
        return M.product
    if isinstance(M, np.ndarray | Tensor):
        matrix = torch.as_tensor(M).to(rows)
        if matrix.shape != (d, d):
            raise ValueError(f"M: expected shape [{d}, {d}], got {list(matrix.shape)}")
        return lambda r: r @ matrix.mT
    if hasattr(M, "shape") and tuple(M.shape) != (d, d):
        raise ValueError(f"M: expected shape [{d}, {d}], got {list(M.shape)}")
    if hasattr(M, "matvec"):
        apply = M.matvec
    elif hasattr(M, "dot"):
        apply = M.dot
    elif callable(M):
        apply = M
    else:
        raise TypeError(f"M: expected an array, sparse matrix, linear operator or callable, got {type(M).__name__}")

    def on_host(r: Tensor) -> Tensor:
        answers = [np.asarray(apply(row)) for row in r.cpu().numpy()]
        return torch.as_tensor(np.stack(answers)).to(r).reshape(r.shape)

    return on_host
