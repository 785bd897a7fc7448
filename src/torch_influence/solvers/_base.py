"""What every solver tells of its work and how it warns, and what iterative solvers share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Progress: TypeAlias = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached the tolerance it was asked for."""


class DivergenceWarning(ConvergenceWarning):
    """An iteration grew without bound; its result is not usable."""


class NegativeCurvatureWarning(UserWarning):
    """The matrix is not positive definite: influence is then not that of a minimum."""


@dataclasses.dataclass(frozen=True)
class SolveReport:
    """How a solve went, one entry per right-hand side.

    Attributes:
        method: the solver's name.
        iterations: [k], int64.
        residual: [k], float64, |b - Ax| / |b| computed from its definition at the end; NaN where it is not known.
        converged: [k], bool, residual within the tolerance.
        precision_limit: [k], bool, stopped above the tolerance because the arithmetic reaches no further.
        negative_curvature: [k], bool, p'Ap <= 0 was met on the way.
        products: multiplications by the curvature, each for all rows still at work.
        seconds: wall time.
    """

    method: str
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    precision_limit: Tensor
    negative_curvature: Tensor
    products: int
    seconds: float

    def __str__(self) -> str:
        k = len(self.iterations)
        if k == 0:
            return f"{self.method}: no right-hand sides"
        parts = [f"{self.method}: {int(self.converged.sum())} of {k} converged"]
        if self.precision_limit.any():
            parts.append(f"{int(self.precision_limit.sum())} at the limit of the arithmetic")
        if self.products:
            low, high = int(self.iterations.min()), int(self.iterations.max())
            parts.append(f"{low if low == high else f'{low} to {high}'} iterations, {self.products} products")
        known = self.residual[~self.residual.isnan()]
        if len(known):
            parts.append(f"largest relative residual {float(known.max()):.1e}")
        if self.negative_curvature.any():
            parts.append(f"negative curvature met in {int(self.negative_curvature.sum())}")
        return ", ".join([*parts, f"{self.seconds:.2f} s"])


# -- iterative solvers: their options, the limit of the arithmetic, their warning --------------------------------------

# A product of d terms through a network carries some tens of roundings: below this many units of |A||x| + |b| a
# residual is rounding, not lack of iterations.
_ROUNDINGS = 32


def iteration_limit(rtol: float, atol: float, maxiter: int | None, d: int) -> int:
    """``maxiter`` or SciPy's default, 10 d; refuses limits that make no sense."""
    limit = 10 * d if maxiter is None else int(maxiter)
    if limit < 1:
        raise ValueError(f"maxiter: expected at least 1, got {maxiter}")
    if rtol < 0 or atol < 0:
        raise ValueError(f"rtol, atol: expected tolerances >= 0, got {rtol} and {atol}")
    return limit


def first_guess(x0: Any, rows: Tensor) -> Tensor | None:
    """x0, [d] or [k, d], as a new tensor [k, d] like ``rows``."""
    if x0 is None:
        return None
    guess = torch.as_tensor(x0).to(rows)
    if guess.shape not in (rows.shape, rows.shape[1:]):
        raise ValueError(f"x0: expected shape [{rows.shape[1]}] or {list(rows.shape)}, got {list(guess.shape)}")
    return guess.expand_as(rows).clone()


def norms(a: Tensor) -> Tensor:
    """|a| of each row, float64."""
    return torch.linalg.vector_norm(a, dim=-1, dtype=torch.float64)


def reachable(largest: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """The residual norm [k] below which all is rounding; ``largest`` is a lower bound of |A|, ``size`` is |b|."""
    limit = _ROUNDINGS * torch.finfo(x.dtype).eps * (largest * norms(x) + size)
    return torch.minimum(limit, size)  # x = 0 reaches |b|: worse than that is no limit but a failure


def warn_of_failures(report: SolveReport, rtol: float, limit: int, dtype: torch.dtype) -> None:
    """For solvers that a module's ``inverse_hvp`` calls: the warning points at who called that."""
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
        f"{report.method} did not converge for {int(failed.sum())} of {k} right-hand sides: relative residual "
        f"{worst:.1e} where rtol={rtol:g} was asked for, after {int(report.iterations.max())} iterations; {cure}",
        ConvergenceWarning,
        stacklevel=4,
    )
