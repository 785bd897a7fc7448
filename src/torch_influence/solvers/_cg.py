"""Conjugate gradients (Hestenes and Stiefel 1952) on many right-hand sides at once, with SciPy's conventions."""

from __future__ import annotations

import dataclasses
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
    conclude,
    first_guess,
    iteration_limit,
    norms,
    reachable,
    rounding,
    smallest_residual,
    system,
)
from torch_influence.solvers._lanczos import Tridiagonals
from torch_influence.solvers._preconditioners import as_preconditioner
from torch_influence.solvers._report import OnFailure, SolveReport, check_on_failure

LOOKS_EVERY = 16  # iterations, at how far rounding reaches
DIGITS_OF_RITZ = 0.1  # where rounding may have changed a step's length or its entry by more, it ends


def cg(
    A: Any,
    B: Any,
    *,
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    M: Any = None,
    callback: Callable[[np.ndarray], object] | None = None,
    truncate: bool = False,
    history: bool = False,
    on_failure: OnFailure = "warn",
    progress: Progress | None = None,
) -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``B`` [k, d]; one product with A per iteration serves all rows.

    A row is done when its true residual is within max(rtol·|b|, atol), SciPy's meaning: when the recurrence says so,
    b - Ax is computed from its definition and replaces the recurrence's residual; if rounding had fooled it the row
    goes on from there, until that no longer helps. Then it is at the limit of the arithmetic, about u (|A||x| + |b|).

    Args:
        A: symmetric positive definite: a matrix, a LinearOperator, an object with ``@`` on columns, a callable on rows
            (see ``linop.aslinearoperator``). On p'Ap < 0 the iteration goes on, as SciPy's does, and warns: the answer
            is often good, and is judged by its true residual.
        B: [k, d] or [d], on A's device.
        x0: first guess, [d] or [k, d]; zero by default. An array or a tensor.
        rtol: relative tolerance.
        atol: absolute tolerance.
        maxiter: iterations at the most; 10 d by default.
        M: approximate inverse of A, symmetric positive definite: an array, a sparse matrix, anything with ``matvec``
            or a callable on ndarrays [d]; a ``LinearOperator`` of this package, which stays on the device; or
            ``Jacobi()`` or ``Nystrom(rank)``, made of A on the spot; the report counts the products for it, too.
        callback: called after each iteration with each unfinished row's iterate, an ndarray [d].
        truncate: at p'Ap <= 0 a row stops where it is, in place of going on (Steihaug 1983).
        history: keep the residuals of every iteration in the report.
        on_failure: "warn", "raise" (a ``SolveError``, which has the solution and the report) or "ignore".
        progress: wraps the iterations in a progress bar.

    Returns:
        x, of B's shape, and the report. x is NaN in rows of which nothing is known: b or a product is not finite.

    Raises:
        TypeError, ValueError: an argument that makes no sense.
        SolveError: with ``on_failure="raise"``, in place of the warnings.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right.
        NegativeCurvatureWarning: p'Ap < 0 beyond rounding, with the smallest Ritz value and the damping that cures it.

    Cost:
        iterations + 1 products (2 without an exact zero start); memory 5 k d. On a GPU an iteration never waits for the
        device, so a row's end is noticed one iteration late, and one product more is made.

    Source:
        Hestenes and Stiefel (1952), section 3.

    Example:
        >>> x, report = cg(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3))
        >>> x.tolist(), report.products
        ([1.0, 0.5, 0.25], 4)
    """
    check_on_failure(on_failure)
    operator, rows = system(A, B)
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    start = time.perf_counter()
    precondition, made_of = (None, 0) if M is None else as_preconditioner(M, operator, rows)
    tolerance = torch.clamp(rtol * norms(rows), min=atol)
    x, report = iterate(
        operator,
        rows,
        first_guess(x0, rows),
        tolerance,
        limit,
        precondition,
        callback,
        progress,
        truncate=truncate,
        history=history,
    )
    seconds = time.perf_counter() - start
    report = dataclasses.replace(report, rtol=rtol, products=made_of + report.products, seconds=seconds)
    conclude(
        x,
        report,
        limit=limit,
        on_failure=on_failure,
        cures=', and minres (solver="minres") takes indefinite matrices',
        preconditioned=M is not None,
    )
    return x.reshape(torch.as_tensor(B).shape), report


def iterate(
    operator: LinearOperator,
    rows: Tensor,
    x: Tensor | None,
    tolerance: Tensor,
    limit: int,
    precondition: Callable[[Tensor], Tensor] | None = None,
    callback: Callable[[np.ndarray], object] | None = None,
    progress: Progress | None = None,
    *,
    truncate: bool = False,
    history: bool = False,
) -> tuple[Tensor, SolveReport]:
    """``cg`` from the first guess ``x``, which is overwritten, to absolute tolerances [k]; nothing is warned of."""
    start = time.perf_counter()
    state = _State(operator, rows, x, tolerance, precondition, truncate, history)
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
        truncate: bool = False,
        history: bool = False,
    ) -> None:
        k = len(b)
        self.operator, self.b, self.precondition = operator, b, precondition
        self.truncate, self.history = truncate, history
        self.log = _Log(k, b.dtype, preconditioned=precondition is not None)
        self.products = self.steps = 0
        self.all_x = torch.zeros_like(b, memory_format=torch.contiguous_format) if x is None else x
        self.residual = norms(b)
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.converged, self.limited = (torch.zeros_like(self.residual).bool() for _ in range(2))
        self.all_scalars = b.new_zeros(len(CGScalars._fields), k, dtype=torch.float64)
        self.row = CGScalars(*self.all_scalars)
        self.tolerance = tolerance
        self.aim = self.row.tolerance.copy_(tolerance).clone()  # of the recurrence

        self.at_work = torch.arange(k, device=b.device)
        self.x, self.scalars = self.all_x, self.all_scalars
        self.r = b.clone(memory_format=torch.contiguous_format) if x is None else self.true_residual(self.at_work)
        self.p = torch.empty_like(self.r)
        self.late: tuple[Tensor, torch.cuda.Event] | None = None
        norm = norms(self.r)
        self.first = norm
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
        self.log.start(self.at_work[which], self.row.rho[which])

    def step(self) -> None:
        preconditioned = self.precondition is not None
        if self.precondition is not None:
            z = self.precondition(self.r).detach()
            cg_step(self.x, self.r, self.p, self.scalars, z=z, preconditioned=preconditioned)
        q = self.product(self.p)
        if self.truncate:
            self.stop_at_negative_curvature(q)
        cg_step(self.x, self.r, self.p, self.scalars, q=q, preconditioned=preconditioned)
        self.steps += 1
        if self.steps % LOOKS_EVERY == 0:
            self.aim_no_lower_than_rounding()
        if self.history or len(self.log) <= self.b.shape[1]:  # d steps exhaust the space: there is no more to be seen
            self.log.step(self.at_work, self.scalars)

    def aim_no_lower_than_rounding(self) -> None:
        """What the recurrence says below a rounding of b - Ax has no meaning: a row that gets there is judged."""
        floor = smallest_residual(self.row.largest.sqrt(), self.x, self.b[self.at_work])
        self.row.tolerance.copy_(torch.maximum(self.aim[self.at_work], floor))

    def stop_at_negative_curvature(self, q: Tensor) -> None:
        """Takes rows off before the step that would follow a direction of negative curvature."""
        stop = (self.row.active != 0) & ((self.p.double() * q.double()).sum(dim=1) <= 0)
        self.row.active.masked_fill_(stop, 0.0)
        self.row.negative.masked_fill_(stop, 1.0)
        self.row.residual.masked_fill_(stop, torch.inf)  # not done: it is judged at the end

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
        has ceased to help. (To replace the residual and keep the direction, earlier and by the criterion of van der
        Vorst and Ye, takes 3 to 15 % more products near the limit of float32 and float64.) Those that broke down are
        judged at the end.
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
            self.aim[self.at_work[again]] *= 0.5  # or what rounding took from it this time would be missing again
            self.row.tolerance[again] = self.aim[self.at_work[again]]
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
        """The true residual of rows that ran out of iterations or broke down; none where a product was not finite."""
        self.write_back()
        row = CGScalars(*self.all_scalars)
        unknown = ~self.converged & ~(row.curvature.isfinite() & self.first.isfinite())
        self.residual[unknown] = torch.nan
        which = (~(self.converged | self.limited | unknown)).nonzero().flatten()
        if len(which):
            self.residual[which] = norms(self.true_residual(which))
            self.converged[which] = self.within(self.residual[which], which)

    def report(self, seconds: float) -> SolveReport:
        size = norms(self.b)
        scalars = CGScalars(*self.all_scalars)
        limit = reachable(scalars.largest.sqrt(), self.all_x, size)
        relative = torch.where(size > 0, self.residual / size, self.residual)
        negative = (scalars.negative != 0).cpu()
        if negative.any() and not self.truncate:
            negative &= self.log.indefinite()
        return SolveReport(
            method="conjugate gradients",
            iterations=scalars.iterations.long(),
            residual=relative,
            converged=self.converged,
            precision_limit=~self.converged & self.residual.isfinite() & (self.residual <= limit),
            negative_curvature=negative,
            products=self.products,
            seconds=seconds,
            history=self.log.history(self.first, size) if self.history else None,
            krylov=self.log,
        )


class _Log:
    """The scalars of every step, on the device until they are asked for, since an iteration must not wait for them."""

    def __init__(self, k: int, dtype: torch.dtype, preconditioned: bool) -> None:
        self.k, self.dtype, self.preconditioned = k, dtype, preconditioned
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.starts: list[tuple[int, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.steps)

    def start(self, which: Tensor, rho: Tensor) -> None:
        self.starts.append((len(self.steps), which, rho))

    def step(self, which: Tensor, scalars: Tensor) -> None:
        self.steps.append((which, scalars.clone()))

    def history(self, first: Tensor, size: Tensor) -> Tensor:
        first, size = first.cpu(), size.cpu()
        norms = first[None]
        if self.steps:
            stepped, values = self._unpack()
            norms = torch.cat([norms, torch.where(stepped, values.residual.sqrt(), torch.nan)])
        return torch.where(size > 0, norms / size, norms)

    def extremes(self) -> tuple[float, float]:
        seen = torch.cat([part.flatten() for part in self._of_each()])
        seen = seen[~seen.isnan()]
        if not len(seen):
            return float("nan"), float("nan")
        return float(seen.min()), float(seen.max())

    def indefinite(self) -> Tensor:
        """The rows that met p'Ap < 0, beyond rounding: [k]."""
        quotients, _, _ = self._of_each()
        if not quotients.numel():  # no step was taken
            return torch.zeros(self.k, dtype=torch.bool)
        return quotients.amin(dim=0) < -rounding(self.dtype) * quotients.abs().amax(dim=0)

    def _of_each(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rayleigh quotients of the directions, [m, k]; the smallest and the largest value of each Lanczos matrix.

        The matrix has 1/α and β/α of the steps (Golub and Van Loan, section 11.3.5); where a row started anew, another
        block begins. Where A is indefinite or singular, p'Ap near zero may have cancelled all digits of an entry: the
        matrix ends before that. Steps that a row did not take repeat its first entry.
        """
        none = torch.empty(0, 0, dtype=torch.float64)
        if not self.steps:
            return none, none, none
        stepped, values = self._unpack()
        m = len(stepped)
        begins = torch.zeros(m + 1, self.k, dtype=torch.bool)
        rho = values.rho if self.preconditioned else torch.cat([values.rho[:1], values.rho[:-1]])
        for at, which, value in self.starts:
            begins[min(at, m), which.cpu()] = True
            if at < m and not self.preconditioned:
                rho[at, which.cpu()] = value.cpu()
        linked = stepped[:-1] & stepped[1:] & ~begins[1:m]
        beta = torch.where(linked, rho[1:] / rho[:-1], 0.0)
        alpha = torch.where(stepped, values.alpha, 1.0)

        # r is orthogonal to the last p, so |p|² = |r|² + β² |last p|²; with M that is in the norm of its inverse.
        square = rho.clone()
        for j in range(1, m):
            square[j] += beta[j - 1].square() * square[j - 1]
        first = stepped.int().argmax(dim=0, keepdim=True)
        quotients = rho / alpha / square
        quotients = torch.where(stepped, quotients, quotients.gather(0, first))

        pivots, carried = 1 / alpha, beta / alpha[:-1]
        size = pivots.abs()
        size[1:] += carried.abs()
        norm, noise = quotients.abs().amax(dim=0), rounding(self.dtype)
        lost = (noise * size > DIGITS_OF_RITZ * norm) | (noise * norm > DIGITS_OF_RITZ * quotients.abs())
        sound = stepped & ~lost.cummax(dim=0).values
        diagonal = pivots
        diagonal[1:] += carried
        diagonal = torch.where(sound, diagonal, quotients.gather(0, first))
        squares = torch.where(sound[1:], (carried / alpha[:-1]).clamp(min=0), 0.0)
        some = stepped.any(dim=0)
        smallest, largest = Tridiagonals(diagonal[:, some], squares[:, some]).extremes_of_each()
        return quotients, smallest, largest

    def _unpack(self) -> tuple[Tensor, CGScalars]:
        """Which rows took each step, [m, k], and the scalars after it, [m, k] each, of those that did."""
        every = torch.zeros(len(self.steps), len(CGScalars._fields), self.k, dtype=torch.float64)
        for entry, (which, scalars) in zip(every, self.steps, strict=True):
            entry[:, which.cpu()] = scalars.cpu()
        values = CGScalars(*every.unbind(1))
        before = torch.cat([torch.zeros(1, self.k, dtype=torch.float64), values.iterations.cummax(dim=0).values])[:-1]
        return values.iterations > before, values
