"""Conjugate gradients (Hestenes and Stiefel 1952) on many right-hand sides at once, with SciPy's conventions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_influence.failures import OnFailure, check_on_failure
from torch_influence.linop import LinearOperator, as_tensor
from torch_influence.ops import CGScalars, cg_step
from torch_influence.plan import NotPossible
from torch_influence.solvers._base import (
    Progress,
    check_budget,
    conclude,
    first_guess,
    in_range,
    iteration_limit,
    norms,
    rounding,
    system,
    tolerances,
    with_quick_products,
    with_rounding,
)
from torch_influence.solvers._energy import EnergyError
from torch_influence.solvers._lanczos import ROWS_LOOKED_AT, Tridiagonals
from torch_influence.solvers._preconditioners import as_preconditioner, made_once, preconditioned, with_rows
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._rows import RowIteration, StepLog
from torch_influence.solvers._solver import Cost, Krylov, Memo

VERIFIED = 1.2  # how much a residual may exceed what the recurrence says in a row that ends by its error
DIGITS_OF_RITZ = 0.1  # a Lanczos matrix ends where rounding may have changed a step's length or entry by more


@with_quick_products
def cg(
    A: Any,
    B: Any,
    *,
    x0: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    error_rtol: float = 0.0,
    maxiter: int | None = None,
    max_products: int | None = None,
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
        error_rtol: a row is done, too, when the estimate of |x - x*|_A / |x*|_A is within this; see the report's
            ``error``. 0: by its residual alone.
        maxiter: iterations at the most; 10 d by default.
        max_products: products at the most, at least 2, M's among them and one that judges the rows left. Rows that are
            not done by then are warned of.
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
        TypeError: an argument that makes no sense.
        ValueError: likewise; ``max_products`` is less than M takes and 2.
        SolveError: with ``on_failure="raise"``, in place of the warnings.

    Warns:
        ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least half
            of the digits right.
        NegativeCurvatureWarning: p'Ap < 0 beyond rounding, with the smallest Ritz value and the damping that cures it.

    Cost:
        iterations + 1 products (2 without an exact zero start); memory 5 k d. On a GPU the host waits only for
        the iteration before the last, so that the device has work meanwhile: a row's end is noticed one iteration late,
        and one product more is made.

    Source:
        Hestenes and Stiefel (1952), section 3.

    Examples:
        >>> x, report = cg(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3))
        >>> [round(entry, 4) for entry in x.tolist()], report.products
        ([1.0, 0.5, 0.25], 4)
    """
    check_on_failure(on_failure)
    operator, rows = system(A, B)
    limit = iteration_limit(rtol, atol, maxiter, rows.shape[1])
    check_budget(error_rtol, max_products, least=2)
    start = time.perf_counter()
    precondition, made_of = (None, 0) if M is None else as_preconditioner(M, operator.exact, rows)
    if max_products is not None and made_of + 2 > max_products:
        raise ValueError(f"max_products: expected at least {made_of + 2}, as M takes {made_of}, got {max_products}")
    rows, unit = in_range(rows)
    x, report = iterate(
        operator,
        rows,
        first_guess(x0, rows, unit),
        tolerances(rows, unit, rtol, atol),
        limit,
        precondition,
        callback,
        progress,
        truncate=truncate,
        history=history,
        unit=unit,
        error_rtol=error_rtol,
        budget=None if max_products is None else max_products - made_of,
    )
    seconds = time.perf_counter() - start
    method, used = with_rounding(report.method, operator), made_of + report.products
    report = dataclasses.replace(report, method=method, rtol=rtol, products=used, seconds=seconds)
    x, report = conclude(
        x,
        report,
        limit=limit,
        on_failure=on_failure,
        cures=', and minres (solver="minres") takes indefinite matrices',
        preconditioned=M is not None,
        unit=unit,
        budget=max_products,
        product_dtype=operator.product_dtype,
    )
    return x.reshape(as_tensor(B).shape), report


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
    unit: Tensor | None = None,
    error_rtol: float = 0.0,
    budget: int | None = None,
) -> tuple[Tensor, SolveReport]:
    """Runs ``cg`` from the first guess ``x``, which is overwritten, to absolute tolerances [k], without warnings.

    Rows and x stay in their ``unit``; a callback gets iterates without it.
    """
    start = time.perf_counter()
    state = _State(operator, rows, x, tolerance, precondition, truncate, history, error_rtol)
    state.unit, state.budget = unit, budget
    state.run(limit, progress, "conjugate gradients", callback)
    negative = (CGScalars(*state.all_scalars).negative != 0).cpu()
    if negative.any() and not truncate:
        negative &= state.indefinite()
    report = state.report(time.perf_counter() - start, "conjugate gradients", negative, history)
    return state.all_x, dataclasses.replace(report, error=state.errors())


class _State(RowIteration[CGScalars]):
    """The state of the rows at work: x, r, p and scalars as ``cg_step`` has them."""

    vectors = ("r", "p")

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        x: Tensor | None,
        tolerance: Tensor,
        precondition: Callable[[Tensor], Tensor] | None,
        truncate: bool = False,
        history: bool = False,
        error_rtol: float = 0.0,
    ) -> None:
        scalars = b.new_zeros(len(CGScalars._fields), len(b), dtype=torch.float64)
        log = _Log(len(b), b.dtype, CGScalars, preconditioned=precondition is not None)
        super().__init__(operator, b, x, tolerance, log, scalars)
        self.indefinite = log.indefinite
        self.precondition, self.truncate, self.history = precondition, truncate, history
        self.r, self.p = torch.empty_like(self.all_x), torch.empty_like(self.all_x)
        self.error_rtol = error_rtol
        self.energy = EnergyError(self.first.square(), operator.least or 0.0) if error_rtol else None
        self.start()

    def begin(self, which: Tensor, r: Tensor) -> None:
        """(Re)starts rows with the (preconditioned) residual as their next direction."""
        self.r[which] = r
        self.row.active[which] = 1.0
        self.row.residual[which] = torch.inf  # unknown to the recurrence
        self.row.rho[which] = 0.0
        if self.precondition is None:
            self.p[which] = r
            self.row.rho[which] = norms(r).square()
        self.log.start(self.at_work[which], self.row.rho[which])
        if self.energy is not None:
            self.energy.restart(self.at_work[which], norms(r).square())

    def step(self) -> None:
        preconditioned = self.precondition is not None
        if self.precondition is not None:
            z = self.precondition(self.r).detach()
            cg_step(self.x, self.r, self.p, self.scalars, z=z, preconditioned=preconditioned)
        q = self.product(self.p)
        if self.truncate:
            self.stop_at_negative_curvature(q)
        cg_step(self.x, self.r, self.p, self.scalars, q=q, preconditioned=preconditioned)
        if self.energy is not None:
            self.end_by_error(self.energy)
        self.record(self.history)

    def end_by_error(self, energy: EnergyError) -> None:
        """Takes note of a step's gain, and calls the rows done whose estimated error is small enough."""
        gain, squares = torch.zeros_like(energy.gained), torch.ones_like(energy.gained)
        gain[self.at_work] = self.row.alpha.square() * self.row.curvature
        squares[self.at_work] = self.row.residual
        at_work = torch.zeros_like(self.converged)
        at_work[self.at_work] = True
        energy.step(gain, squares, at_work & squares.isfinite())
        near = (self.row.active != 0) & (energy.relative[self.at_work] <= self.error_rtol)
        loose = VERIFIED * self.row.residual.sqrt()
        for tolerance in (self.tolerance, self.aim):
            tolerance[self.at_work] = torch.where(near, loose, tolerance[self.at_work])
        self.row.tolerance.copy_(torch.where(near, loose, self.row.tolerance))
        self.row.active.masked_fill_(near, 0.0)

    def errors(self) -> Tensor:
        """Estimates |x - x*|_A / |x*|_A, [k]; NaN where that is not known."""
        if self.energy is not None:
            return self.energy.relative
        least = self.operator.least
        if least is None or not least > 0:
            return torch.full_like(self.residual, torch.nan)
        left, size = self.residual.square() / least, (self.all_x.double() * self.b.double()).sum(dim=1).clamp(min=0)
        return torch.where(size + left > 0, (left / (size + left)).sqrt(), torch.nan)

    def stop_at_negative_curvature(self, q: Tensor) -> None:
        """Stops rows before the step that would follow a direction of negative curvature."""
        stop = (self.row.active != 0) & ((self.p.double() * q.double()).sum(dim=1) <= 0)
        self.row.active.masked_fill_(stop, 0.0)
        self.row.negative.masked_fill_(stop, 1.0)
        self.row.residual.masked_fill_(stop, torch.inf)  # not done: it is judged at the end

    def done(self) -> Tensor:
        return self.row.residual.isfinite() & (self.row.residual <= self.row.tolerance.square())

    def largest(self, row: CGScalars) -> Tensor:
        return row.largest.sqrt()

    def broken(self, row: CGScalars) -> Tensor:
        return ~(row.curvature.isfinite() & self.first.isfinite())


class _Log(StepLog[CGScalars]):
    def residuals(self, values: CGScalars) -> Tensor:
        return values.residual.sqrt()

    def extremes(self) -> tuple[float, float]:
        if not self.steps:
            return float("nan"), float("nan")
        stepped, alpha, beta, quotients = self._quotients()
        known = ~quotients.isnan().any(dim=0)
        if not known.any():
            return float("nan"), float("nan")
        furthest = torch.where(known, quotients.amax(dim=0) - quotients.amin(dim=0), -1.0)
        few = furthest.argsort(descending=True)[: min(ROWS_LOOKED_AT, int(known.sum()))]
        smallest, largest = self._matrices(stepped[:, few], alpha[:, few], beta[:, few], quotients[:, few])
        seen = torch.cat([quotients[:, known].flatten(), smallest, largest])
        return float(seen.min()), float(seen.max())

    def indefinite(self) -> Tensor:
        """Tells which rows [k] have met p'Ap < 0, beyond rounding."""
        if not self.steps:
            return torch.zeros(self.k, dtype=torch.bool, device="cpu")
        quotients = self._quotients()[-1]
        return quotients.amin(dim=0) < -rounding(self.dtype) * quotients.abs().amax(dim=0)

    def _quotients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes which steps were taken, α, β and the Rayleigh quotients of the directions: [m, k], β [m - 1, k].

        β is 0 where a row started again. Steps that a row did not take repeat its first quotient.
        """
        stepped, values = self.unpack()
        m = len(stepped)
        rho = values.rho if self.preconditioned else torch.cat([values.rho[:1], values.rho[:-1]])
        for at, which, value in self.starts:
            if at < m and not self.preconditioned:
                rho[at, which.cpu()] = value.cpu()
        linked = stepped[:-1] & stepped[1:] & ~self.begins()[1:m]
        beta = torch.where(linked, rho[1:] / rho[:-1], 0.0)
        alpha = torch.where(stepped, values.alpha, 1.0)
        # r is orthogonal to the last p, so |p|² = |r|² + β² |last p|²; with M that is in the norm of its inverse.
        square = rho.clone()
        for j in range(1, m):
            square[j] += beta[j - 1].square() * square[j - 1]
        quotients = rho / alpha / square
        first = quotients.gather(0, stepped.int().argmax(dim=0, keepdim=True))
        return stepped, alpha, beta, torch.where(stepped, quotients, first)

    def _matrices(self, stepped: Tensor, alpha: Tensor, beta: Tensor, quotients: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the smallest and the largest eigenvalue of each Lanczos matrix, [k].

        Its entries come from 1/α and β/α (Golub and Van Loan, section 11.3.5). Where A is indefinite or singular, p'Ap
        near zero may have cancelled all digits of an entry: the matrix ends before that.
        """
        pivots, carried = 1 / alpha, beta / alpha[:-1]
        size = pivots.abs()
        size[1:] += carried.abs()
        norm, noise = quotients.abs().amax(dim=0), rounding(self.dtype)
        lost = (noise * size > DIGITS_OF_RITZ * norm) | (noise * norm > DIGITS_OF_RITZ * quotients.abs())
        sound = stepped & ~lost.cummax(dim=0).values
        pivots[1:] += carried
        first = quotients.gather(0, stepped.int().argmax(dim=0, keepdim=True))
        diagonal = torch.where(sound, pivots, first)
        squares = torch.where(sound[1:], (carried / alpha[:-1]).clamp(min=0), 0.0)
        return Tridiagonals(diagonal, squares).extremes_of_each()


@dataclasses.dataclass(kw_only=True, eq=False)
class CG(Krylov):
    """Solves by conjugate gradients, each row on its own, one product an iteration for all of them; see ``cg``.

    Args:
        rtol, atol, error_rtol, maxiter, max_products, M, x0, callback, truncate, history: those of ``cg``. What a
            recipe M makes is kept for later solves with the same operator.

    Cost:
        one product an iteration, however many rows; memory 5 k d, and that of M.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> from torch_influence.solvers import Jacobi
        >>> x, report = CG(M=Jacobi()).solve(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), torch.ones(1, 3))
        >>> [round(entry, 4) for entry in x[0].tolist()], report.iterations.tolist()
        ([1.0, 0.5, 0.25], [1])
    """

    error_rtol: float = 0.0
    max_products: int | None = None
    M: Any = None
    callback: Callable[[np.ndarray], object] | None = None
    truncate: bool = False
    _made: Memo[LinearOperator] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    vectors, work = 5, 12

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        return cg(operator, rows, **self.options(M=made_once(self.M, operator.exact, self._made)), **how)

    @property
    def title(self) -> str:  # type: ignore[override]
        """The way, in words."""
        return "conjugate gradients, all rows at once" + preconditioned(self.M)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Adds what M keeps; raises ``NotPossible`` where no product is left to judge with."""
        if self.max_products == 1:
            raise NotPossible("one of its products judges the rows, and max_products=1 leaves none beside")
        return with_rows(super().cost(operator, k), self.M, operator)
