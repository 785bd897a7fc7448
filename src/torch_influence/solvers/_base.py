"""What every solver tells of its work, and how it warns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

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
