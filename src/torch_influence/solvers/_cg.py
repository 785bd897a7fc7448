"""Conjugate gradients (Hestenes and Stiefel 1952) on many right-hand sides at once, with SciPy's conventions."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_influence.linop import LinearOperator
from torch_influence.solvers._base import ConvergenceWarning, Progress, SolveReport

# A product of d terms through a network carries some tens of roundings: below this many units of |A||x| + |b| a
# residual is rounding, not lack of iterations.
_ROUNDINGS = 32


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
        iterations + 1 products (2 without an exact zero start); memory 4 k d.
    """
    start = time.perf_counter()
    d = rows.shape[1]
    limit = 10 * d if maxiter is None else int(maxiter)
    if limit < 1:
        raise ValueError(f"maxiter: expected at least 1, got {maxiter}")
    if rtol < 0 or atol < 0:
        raise ValueError(f"rtol, atol: expected tolerances >= 0, got {rtol} and {atol}")
    precondition = _preconditioner(M, rows)
    state = _State(operator, rows, _first_guess(x0, rows), torch.clamp(rtol * _norm(rows), min=atol))
    steps: Iterable[int] = range(limit)
    if progress is not None:
        steps = progress(steps, "conjugate gradients", None)  # no total: it stops long before the limit
    state.settle()
    for _ in steps:
        if not len(state.at_work):
            break
        state.step(precondition)
        if callback is not None:
            for row in state.x[state.at_work]:
                callback(row.cpu().numpy())
        state.settle()
    state.give_up()
    report = state.report(time.perf_counter() - start)
    _warn(report, rtol, limit, rows.dtype)
    return state.x, report


class _State:
    """x and the report's entries for all rows; residual r, direction p and r'Mr for those still at work."""

    def __init__(self, operator: LinearOperator, b: Tensor, x: Tensor | None, tolerance: Tensor) -> None:
        k = len(b)
        self.operator, self.b, self.tolerance = operator, b, tolerance
        self.x = torch.zeros_like(b) if x is None else x
        self.products = 0
        self.iterations = torch.zeros(k, dtype=torch.int64, device=b.device)
        self.residual = _norm(b)
        self.best = torch.full_like(self.residual, torch.inf)  # smallest true residual at a restart
        self.largest = torch.zeros_like(self.residual)  # largest |Ap|/|p| seen, a lower bound of |A|
        self.converged, self.limited, self.negative = (torch.zeros_like(self.residual).bool() for _ in range(3))

        self.at_work = torch.arange(k, device=b.device)
        self.r = b.clone() if x is None else self.true_residual(self.at_work)
        self.verified = torch.ones_like(self.converged)  # whether r is b - Ax by definition, per row at work
        self.p = torch.zeros_like(b)
        self.rho = torch.zeros_like(self.residual)

    def product(self, rows: Tensor) -> Tensor:
        self.products += 1
        return self.operator.product(rows)

    def true_residual(self, which: Tensor) -> Tensor:
        return self.b[which] - self.product(self.x[which])

    def step(self, precondition: Callable[[Tensor], Tensor]) -> None:
        z = precondition(self.r)
        rho = _dot(self.r, z)
        beta = torch.where(self.rho == 0, 0.0, rho / self.rho)  # rho = 0 marks a (re)start: p = z
        self.p = z + _column(beta, z) * self.p
        self.rho = rho
        q = self.product(self.p)
        curvature = _dot(self.p, q)
        self.negative[self.at_work] |= curvature <= 0
        alpha = rho / curvature
        works = alpha.isfinite() & q.isfinite().all(dim=-1)
        if not works.all():  # breakdown: x stays where it is, and the row is judged there
            self.keep(works)
            alpha, q = alpha[works], q[works]
        self.largest[self.at_work] = torch.maximum(self.largest[self.at_work], _norm(q) / _norm(self.p))
        self.x[self.at_work] += _column(alpha, q) * self.p
        self.r -= _column(alpha, q) * q
        self.iterations[self.at_work] += 1
        self.verified = torch.zeros_like(self.verified)

    def settle(self) -> None:
        """Lets go of the rows that are done, judged by their true residual; restarts those that only seemed to be."""
        norm = _norm(self.r)
        done = self.within(norm, self.at_work)
        if not done.any():
            return
        check = done & ~self.verified
        if check.any():
            which = self.at_work[check]
            self.r[check] = self.true_residual(which)
            norm[check] = _norm(self.r[check])
            self.rho[check] = 0.0
            done = self.within(norm, self.at_work)
            self.limited[which] = ~done[check] & ~(norm[check] < 0.5 * self.best[which])
            self.best[which] = norm[check]
        self.residual[self.at_work] = norm
        self.converged[self.at_work] = done
        self.keep(~(done | self.limited[self.at_work]))

    def within(self, norm: Tensor, which: Tensor) -> Tensor:
        return norm.isfinite() & (norm <= self.tolerance[which])  # an infinite b has an infinite tolerance

    def keep(self, which: Tensor) -> None:
        self.at_work, self.verified = self.at_work[which], self.verified[which]
        self.r, self.p, self.rho = self.r[which], self.p[which], self.rho[which]

    def give_up(self) -> None:
        """The true residual of rows that ran out of iterations or broke down."""
        which = (~(self.converged | self.limited)).nonzero().flatten()
        if len(which):
            self.residual[which] = _norm(self.true_residual(which))
            self.converged[which] = self.within(self.residual[which], which)

    def report(self, seconds: float) -> SolveReport:
        size = _norm(self.b)
        unit = torch.finfo(self.b.dtype).eps
        reachable = _ROUNDINGS * unit * (self.largest * _norm(self.x) + size)
        reachable = torch.minimum(reachable, size)  # x = 0 reaches |b|: worse than that is no limit but a failure
        relative = torch.where(size > 0, self.residual / size, self.residual)
        return SolveReport(
            method="conjugate gradients",
            iterations=self.iterations,
            residual=relative,
            converged=self.converged,
            precision_limit=~self.converged & self.residual.isfinite() & (self.residual <= reachable),
            negative_curvature=self.negative,
            products=self.products,
            seconds=seconds,
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot products in float64, so that squares of very small and large entries neither vanish nor overflow."""
    return (a.double() * b.double()).sum(dim=-1)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64)


def _column(scalars: Tensor, like: Tensor) -> Tensor:
    return scalars.to(like.dtype).unsqueeze(-1)


def _first_guess(x0: Any, rows: Tensor) -> Tensor | None:
    if x0 is None:
        return None
    guess = torch.as_tensor(x0).to(rows)
    if guess.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"x0: expected shape [{rows.shape[1]}] or {list(rows.shape)}, got {list(guess.shape)}")
    return guess.expand_as(rows).clone()


def _preconditioner(M: Any, rows: Tensor) -> Callable[[Tensor], Tensor]:
    d = rows.shape[1]
    if M is None:
        return lambda r: r
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


def _warn(report: SolveReport, rtol: float, limit: int, dtype: torch.dtype) -> None:
    usable = report.residual <= torch.finfo(dtype).eps ** 0.5  # half of the digits
    failed = ~(report.converged | report.precision_limit & usable)
    if not failed.any():
        return
    worst = float(report.residual[failed].max())
    k = len(failed)
    if bool(report.negative_curvature[failed].any()):
        cure = "negative curvature was met: the matrix is indefinite; raise damp, or use gnh=True"
    elif int(report.iterations[failed].max()) >= limit:
        cure = "raise maxiter, or raise damp"
    else:
        cure = f"raise damp, loosen rtol, or use more precision than {dtype}"
    warnings.warn(
        f"conjugate gradients did not converge for {int(failed.sum())} of {k} right-hand sides: relative residual "
        f"{worst:.1e} where rtol={rtol:g} was asked for, after {int(report.iterations.max())} iterations; {cure}",
        ConvergenceWarning,
        stacklevel=4,
    )
