"""The parts that iterative solvers share: checks of options, limits of the arithmetic, and how a solve is concluded."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from torch_influence import products, switches
from torch_influence.failures import ConvergenceWarning, NegativeCurvatureWarning, OnFailure, fail
from torch_influence.linop import LinearOperator, as_tensor, aslinearoperator
from torch_influence.solvers._report import SolveReport

Progress: TypeAlias = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
_Solve = TypeVar("_Solve", bound=Callable[..., Any])

# A product of d terms through a network carries some tens of roundings: below this many units of |A||x| + |b| a
# residual is rounding, not lack of iterations.
_ROUNDINGS = 32

LOOKS_EVERY = 16  # iterations between two estimates of how far rounding reaches


def with_quick_products(solve: _Solve) -> _Solve:
    """Lets a public function of A and B multiply as the sessions of modules do, by ``products.py``."""

    @functools.wraps(solve)
    def quick(A: Any, B: Any, *args: Any, **kwargs: Any) -> Any:
        rows = as_tensor(B)
        large = rows.dim() > 0 and rows.shape[-1] >= products.LEAST_SIZE
        on_cpu = rows.is_cpu and rows.dtype == torch.float32
        with switches.quick_products() if large and on_cpu else contextlib.nullcontext():
            return solve(A, B, *args, **kwargs)

    return quick  # type: ignore[return-value]  # it takes what ``solve`` takes


def system(A: Any, B: Any) -> tuple[LinearOperator, Tensor]:
    """Returns the operator and the right-hand sides as rows [k, d]; B may be one vector [d], and an array."""
    rows = right_hand_sides(B)
    return aslinearoperator(A, rows), rows


def right_hand_sides(B: Any) -> Tensor:
    """Returns B as rows [k, d]."""
    rows = as_tensor(B).detach()
    if rows.dim() not in (1, 2):
        raise ValueError(f"B: expected right-hand sides as rows [k, d], or one [d], got shape {list(rows.shape)}")
    if not rows.is_floating_point():
        raise TypeError(f"B: expected floating point numbers, got {rows.dtype}")
    return rows.reshape(-1, rows.shape[-1])


def iteration_limit(rtol: float, atol: float, maxiter: int | None, d: int) -> int:
    """Returns ``maxiter`` or SciPy's default, 10 d; refuses limits that make no sense."""
    limit = 10 * d if maxiter is None else int(maxiter)
    if limit < 1:
        raise ValueError(f"maxiter: expected at least 1, got {maxiter}")
    if not all(isinstance(tolerance, Real | Tensor) for tolerance in (rtol, atol)):
        raise TypeError(f"rtol, atol: expected numbers, got {rtol!r} and {atol!r}")
    if not (rtol >= 0 and atol >= 0):
        raise ValueError(f"rtol, atol: expected tolerances >= 0, got {rtol} and {atol}")
    return limit


def check_budget(error_rtol: float, max_products: int | None, least: int = 1, name: str = "error_rtol") -> None:
    """Refuses an ``error_rtol`` or a ``max_products`` that makes no sense.

    Args:
        error_rtol: a tolerance of the solution's error.
        max_products: how many products may be made; None: any number.
        least: how many are needed.
        name: what the tolerance is called.

    Raises:
        ValueError: a tolerance that is no number >= 0; fewer products than are needed.
        TypeError: a number of products that is no integer.

    Cost:
        none.

    Examples:
        >>> check_budget(1e-2, 3)
    """
    if not isinstance(error_rtol, Real) or not error_rtol >= 0:
        raise ValueError(f"{name}: expected a number >= 0, got {error_rtol!r}")
    if max_products is None:
        return
    if isinstance(max_products, bool) or not isinstance(max_products, int):
        raise TypeError(f"max_products: expected an integer or None, got {max_products!r}")
    if max_products < least:
        raise ValueError(f"max_products: expected at least {least}, got {max_products}")


def units(rows: Tensor) -> Tensor:
    """Computes the largest power of 2 up to each row's largest entry, [k, 1]; 1 where the row is 0 or not finite.

    Division by it changes no digit, except of entries that are too small beside the largest to make a difference.
    """
    if not rows.numel():
        return rows.new_ones(len(rows), 1)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True, dtype=torch.float64)
    power = largest / (2 * torch.frexp(largest).mantissa)
    return torch.where(power.isfinite(), power, 1.0).to(rows.dtype)


def in_range(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Divides rows [k, d] whose squares are out of range by their ``units``; returns rows and units, None if all are 1.

    Exponents may take a quarter of the dtype's range: then numbers that are smaller by a tolerance or a condition
    number can be squared, too.
    """
    unit = units(rows)
    most = math.frexp(torch.finfo(rows.dtype).max)[1] // 4
    far = torch.frexp(unit.double()).exponent.abs() > most
    if not far.any():
        return rows, None
    unit = torch.where(far, unit, 1.0)
    return rows / unit, unit


def tolerances(rows: Tensor, unit: Tensor | None, rtol: float, atol: float) -> Tensor:
    """Computes max(rtol·|b|, atol) for each row, [k], in the row's unit."""
    relative = rtol * norms(rows)
    return relative.clamp(min=atol) if unit is None else torch.maximum(relative, atol / unit.double().flatten())


def first_guess(x0: Any, rows: Tensor, unit: Tensor | None = None) -> Tensor | None:
    """Returns x0, [d] or [k, d], in the rows' units, as a new tensor [k, d] like ``rows``."""
    if x0 is None:
        return None
    guess = as_tensor(x0).to(rows)
    if guess.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"x0: expected shape [{rows.shape[1]}] or {list(rows.shape)}, got {list(guess.shape)}")
    guess = guess.expand_as(rows).clone()
    guess[(rows == 0).all(dim=1)] = 0.0  # the solution, as in SciPy, whatever the guess
    return guess if unit is None else guess.div_(unit)


def rounding(dtype: torch.dtype) -> float:
    """Bounds the rounding of a product, relative to |A||x|."""
    return _ROUNDINGS * torch.finfo(dtype).eps


def norms(a: Tensor) -> Tensor:
    """Computes |a| of each row in float64."""
    if a.dtype != torch.float64:  # its squares fit into float64
        return torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64)
    unit = units(a)
    return torch.linalg.vector_norm(a / unit, dim=-1) * unit.squeeze(-1)


def smallest_residual(largest: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Estimates the norm [k] of b - Ax below which an iteration's own residual means nothing, u (|A||x| + |b|) / 2.

    ``largest`` is a lower bound of |A|, ``size`` is |b|. The rows' own precision is enough for an estimate.
    """
    least = largest * torch.linalg.vector_norm(x, dim=1) + size
    return (0.25 * torch.finfo(x.dtype).eps * least).nan_to_num(0.0, 0.0)


def reachable(largest: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Estimates the residual norm [k] below which all is rounding; ``largest`` is at most |A|, ``size`` is |b|."""
    limit = rounding(x.dtype) * (largest * norms(x) + size)
    return torch.minimum(limit, size)  # x = 0 reaches |b|: worse than that is no limit but a failure


def with_rounding(method: str, operator: LinearOperator) -> str:
    """Adds to the name of a method what its products are rounded to, where that is on purpose."""
    rounded = operator.product_dtype
    return method if rounded == operator.dtype else f"{method}, products in {str(rounded).removeprefix('torch.')}"


def conclude(
    x: Tensor,
    report: SolveReport,
    *,
    limit: int,
    on_failure: OnFailure,
    cures: str = "",
    preconditioned: bool = False,
    takes_indefinite: bool = False,
    least: Tensor | None = None,
    unit: Tensor | None = None,
    budget: int | None = None,
    product_dtype: torch.dtype | None = None,
) -> tuple[Tensor, SolveReport]:
    """Gives the warnings of a solve, and returns x, NaN where it is not known, and the report.

    Args:
        x: [k, d]; written to.
        report: of the solve.
        limit: of the iterations.
        on_failure: "warn", "raise" or "ignore".
        cures: what helps, besides damping, where the matrix is indefinite.
        preconditioned: whether the report's eigenvalues are of M A.
        takes_indefinite: negative curvature is warned of, but is no failure.
        least: [k], on the CPU, the relative residual that any x leaves; 0 where that is not known.
        unit: [k, 1], of the rows that x is a solution of, see ``in_range``; x is brought back from it.
        budget: products that might be made, if they have ended it: that is warned of, and is no failure.
        product_dtype: what products were rounded to on purpose.
    """
    found: list[Warning] = []
    k = len(report.residual)
    lost = torch.zeros(k, dtype=torch.bool, device="cpu")
    if unit is not None and (lost := brought_back(x, unit)).any():
        found.append(out_of_range(report.method, x, lost))
        report = report.without(lost)
    usable = report.residual <= torch.finfo(x.dtype).eps ** 0.5  # half of the digits
    failed = ~(report.converged | report.precision_limit & usable)
    unknown = ~report.residual.isfinite() & ~lost
    if unknown.any():
        x[unknown.to(x.device)] = torch.nan
        found.append(
            ConvergenceWarning(
                f"{report.method} failed for {int(unknown.sum())} of {k} right-hand sides: the right-hand side or a "
                f"product with the curvature is not finite (NaN or infinity in data or parameters, or an overflow of "
                f"{x.dtype}); the solution is NaN there. Look for NaN in the data, scale the loss down, or use float64"
            )
        )
    if report.negative_curvature.any():
        found.append(_negative_curvature(report, k, cures, preconditioned))
    failed &= ~(unknown | lost)
    if least is not None and (hopeless := failed & (least > 0)).any():
        failed &= ~hopeless
        worst = int(torch.where(hopeless, report.residual, -1.0).argmax())
        found.append(
            ConvergenceWarning(
                f"{report.method}: the system is singular, to the rounding of {x.dtype}, and inconsistent for "
                f"{int(hopeless.sum())} of {k} right-hand sides; x is a least-squares solution, its relative residual "
                f"is {float(report.residual[worst]):.3g}, and no x leaves less than {float(least[worst]):.3g}; "
                f"damping (damp > 0) makes it solvable"
            )
        )
    if failed.any() and budget is not None and report.products >= budget:
        found.append(out_of_budget(report, failed, budget))
        if on_failure == "raise" and not (unknown | lost).any():
            on_failure = "warn"
    elif failed.any():
        if not takes_indefinite and bool(report.negative_curvature[failed].any()):
            cure = "raise damp"
        elif product_dtype not in (None, x.dtype):
            cure = f"{product_dtype} is too coarse for products: raise damp, loosen rtol, or leave product_dtype out"
        elif not preconditioned and float(report.residual[failed].max()) > 1 and _is_singular(report, x.dtype):
            cure = f"the matrix is singular, to the rounding of {x.dtype}: raise damp (see module.suggest_damping())"
        elif bool(report.precision_limit[failed].all()) or int(report.iterations[failed].max()) < limit:
            cure = f"{x.dtype} reaches no further: raise damp, loosen rtol, or use more precision"
        else:
            cure = "raise maxiter, or raise damp"
        found.append(
            ConvergenceWarning(
                f"{report.method} did not converge for {int(failed.sum())} of {k} right-hand sides: relative residual "
                f"{float(report.residual[failed].max()):.1e} where rtol={report.rtol:.3g} was asked for"
                f"{f', after {steps} iterations' if (steps := int(report.iterations[failed].max())) else ''}; {cure}"
            )
        )
    if takes_indefinite and on_failure == "raise" and all(isinstance(w, NegativeCurvatureWarning) for w in found):
        on_failure = "warn"
    fail(found, on_failure, x, report)
    return x, report


def out_of_budget(report: SolveReport, failed: Tensor, budget: int) -> ConvergenceWarning:
    """Makes the warning of rows that are not done when all products have been made that might be."""
    error = report.error[failed] if report.error is not None else report.residual.new_full((1,), torch.nan)
    estimated = "not known" if error.isnan().all() else f"{float(error.nan_to_num(0.0).max()):.1e}"
    return ConvergenceWarning(
        f"{report.method} ended at max_products={budget} with {int(failed.sum())} of {len(failed)} right-hand sides "
        f"not within rtol={report.rtol:.3g}: the largest relative residual is "
        f"{float(report.residual[failed].max()):.1e}, and the estimated error of scores, relative to their size, "
        f"{estimated}"
    )


def brought_back(x: Tensor, unit: Tensor) -> Tensor:
    """Multiplies x [k, d] by its units; tells, on the CPU, which rows [k] the dtype can't hold (NaN if too large)."""
    if not x.numel():
        return torch.zeros(len(x), dtype=torch.bool, device="cpu")
    before = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    after = before * unit
    x.mul_(unit)
    too_large = before.isfinite() & ~after.isfinite()
    x.masked_fill_(too_large, torch.nan)
    return (too_large | (before > 0) & (after < torch.finfo(x.dtype).tiny)).flatten().cpu()


def out_of_range(method: str, x: Tensor, lost: Tensor) -> ConvergenceWarning:
    """Makes the warning of the rows that ``brought_back`` tells of."""
    return ConvergenceWarning(
        f"{method}: the solutions for {int(lost.sum())} of {len(lost)} right-hand sides are beyond the range of "
        f"{x.dtype}: NaN where they are too large, and where they are too small (below "
        f"{torch.finfo(x.dtype).tiny:.1e}) digits are lost, or all of them. Scale the query's loss, or use float64"
    )


def _is_singular(report: SolveReport, dtype: torch.dtype) -> bool:
    """Tells whether an eigenvalue that the iteration has seen is zero up to rounding; asked where x = 0 is better."""
    smallest, largest = report.eigenvalues
    return abs(smallest) <= rounding(dtype) * largest


def _negative_curvature(report: SolveReport, k: int, cures: str, preconditioned: bool) -> Warning:
    smallest = report.eigenvalues[0]
    seen, enough = "", "raise damp"
    if smallest < 0 and not preconditioned:
        seen = f", its smallest eigenvalue is {smallest:.3g} or less"
        enough = f"damping larger by at least {-1.1 * smallest:.3g} makes it definite"
    return NegativeCurvatureWarning(
        f"{report.method} met negative curvature in {int(report.negative_curvature.sum())} of {k} right-hand sides: "
        f"the matrix is not positive definite{seen}. Scores are those of a saddle point; {enough}, gnh=True does for "
        f"convex losses{cures}"
    )
