"""Direct solves with a dense symmetric matrix, factored once and used for every right-hand side."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.failures import ConvergenceWarning, NegativeCurvatureWarning, OnFailure, check_on_failure, fail
from torch_influence.linop import LinearOperator, as_tensor
from torch_influence.solvers._base import conclude, norms, reachable, rounding, system
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import SLOWNESS_OF_DENSE, Cost, Memo, Solver, row_bytes


def direct(A: Any, B: Any, *, on_failure: OnFailure = "warn") -> tuple[Tensor, SolveReport]:
    """Solves A x = b for each row b of ``B`` [k, d] by a factorisation of the dense matrix; see ``Factor``.

    Args:
        A: symmetric, nonsingular, given as in ``cg``; an operator is made dense by d products.
        B: [k, d] or [d], on A's device.
        on_failure: "warn", "raise" (a ``SolveError``) or "ignore".

    Returns:
        x, of B's shape, and the report.

    Raises:
        TypeError, ValueError: an argument that makes no sense; A is not finite.
        torch.linalg.LinAlgError: A is singular.

    Warns:
        NegativeCurvatureWarning: A is indefinite.
        ConvergenceWarning: A is singular to rounding, or so ill-conditioned that half of the digits of a residual are
            lost; or b is not finite.

    Cost:
        d³/3 multiplications, d² more per right-hand side; memory 2 d².

    Examples:
        >>> x, report = direct(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(3))
        >>> x.tolist(), report.method
        ([1.0, 0.5, 0.25], 'Cholesky')
    """
    operator, rows = system(A, B)
    x, report = Factor(operator.dense(), on_failure=on_failure).solve(rows)
    return x.reshape(as_tensor(B).shape), report


class Factor:
    """A factorisation of a symmetric matrix: Cholesky where it is positive definite, LU with a warning where not.

    Args:
        matrix: [d, d], symmetric.
        on_failure: "warn", "raise" (a ``SolveError``) or "ignore".

    Attributes:
        definite: whether it is positive definite.
        indefinite: whether it has a negative eigenvalue, beyond rounding.
        matrix: as given.

    Raises:
        ValueError: the matrix is not finite.
        torch.linalg.LinAlgError: the matrix is singular.

    Warns:
        NegativeCurvatureWarning: the matrix is indefinite; with the smallest eigenvalue and the damping that cures it.
        ConvergenceWarning: its smallest eigenvalue is zero, to rounding.

    Cost:
        d³/3 multiplications once, d² per right-hand side; memory 2 d².

    Examples:
        >>> factor = Factor(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        >>> x, report = factor.solve(torch.ones(1, 3))
        >>> x.tolist(), factor.definite
        ([[1.0, 0.5, 0.25]], True)
    """

    def __init__(self, matrix: Tensor, *, on_failure: OnFailure = "warn") -> None:
        check_on_failure(on_failure)
        self.on_failure = on_failure
        self.smallest = float("nan")
        self.indefinite = False
        self.matrix = matrix
        if not matrix.sum(dtype=torch.float64).isfinite():  # any NaN or infinity shows in it
            raise ValueError(
                "the curvature matrix has entries that are not finite: a second derivative of the training loss is NaN "
                "or infinite at these parameters"
            )
        lower, failed = torch.linalg.cholesky_ex(matrix)
        self.definite = not bool(failed)
        if self.definite:
            self._factor: tuple[Tensor, ...] = (lower,)
        else:
            del lower
            eigenvalues = torch.linalg.eigvalsh(matrix)
            smallest, size = float(eigenvalues[0]), float(eigenvalues.abs().max())
            self.indefinite = smallest < -rounding(matrix.dtype) * size
            lu, pivots, singular = torch.linalg.lu_factor_ex(matrix)
            if singular:
                raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                    f"the curvature matrix is singular (smallest eigenvalue {smallest:.3g}): add damping, damp > 0"
                )
            self._factor = (lu, pivots)
            self.smallest = smallest
            found: Warning = NegativeCurvatureWarning(
                f"the damped curvature is not positive definite: smallest eigenvalue {smallest:.3g}. Scores are "
                f"those of a saddle point; damping larger by {-1.1 * smallest:.3g} makes it positive definite, "
                "gnh=True (in the iterative modules) does for convex losses"
            )
            if not self.indefinite:
                found = ConvergenceWarning(
                    f"the damped curvature is singular, to the rounding of {matrix.dtype}: smallest eigenvalue "
                    f"{smallest:.3g}, largest {size:.3g}. What its null space adds to a solution is rounding; raise "
                    "damp (module.suggest_damping() finds one)"
                )
            fail([found], on_failure)

    @property
    def method(self) -> str:
        """Which factorisation it is."""
        return "Cholesky" if self.definite else "LU"

    def solve(self, rows: Tensor) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report.

        Args:
            rows: [k, d], in the matrix's dtype, on its device.

        Returns:
            x [k, d], and the report.

        Warns:
            ConvergenceWarning: a residual has lost half of the digits, or b is not finite.
        """
        start = time.perf_counter()
        x = self._solve(rows)
        size = norms(rows)
        residual = norms(rows - x @ self.matrix)
        rtol = torch.finfo(rows.dtype).eps ** 0.5  # half of the digits
        converged = residual <= rtol * size
        limit = reachable(self._largest, x, size)
        report = SolveReport(
            method=self.method,
            iterations=torch.zeros(len(rows), dtype=torch.int64, device="cpu"),
            residual=torch.where(size > 0, residual / size, residual),
            converged=converged,
            precision_limit=~converged & residual.isfinite() & (residual <= limit),
            negative_curvature=torch.full((len(rows),), self.indefinite, device="cpu"),
            products=0,
            seconds=time.perf_counter() - start,
            rtol=rtol,
        )
        known = dataclasses.replace(report, negative_curvature=torch.zeros(len(rows), dtype=torch.bool, device="cpu"))
        conclude(x, known, limit=1, on_failure=self.on_failure)  # the constructor has told of negative curvature
        return x, report

    @functools.cached_property
    def _largest(self) -> Tensor:
        """A lower bound of |A|, in A's own precision: in float64 it would take 40 times as long."""
        rows = torch.linalg.vector_norm(self.matrix, dim=-1)
        return rows.max() if len(rows) else rows.sum()

    def inverse(self) -> Tensor:
        """The inverse itself, [d, d].

        Returns:
            [d, d], a new tensor.
        """
        return self._solve(torch.eye(len(self.matrix), dtype=self.matrix.dtype, device=self.matrix.device))

    def _solve(self, rows: Tensor) -> Tensor:
        if self.definite:
            return torch.cholesky_solve(rows.mT, self._factor[0]).mT.contiguous()
        return torch.linalg.lu_solve(*self._factor, rows.mT).mT.contiguous()


@dataclasses.dataclass(kw_only=True, eq=False)
class Direct(Solver):
    """Solves by a dense matrix, factored once for all solves with one operator; see ``direct`` and ``Factor``.

    Raises:
        MemoryError: the matrix, its damped copy and the factor don't fit; nothing has been computed yet.
        torch.linalg.LinAlgError: the matrix is singular.

    Cost:
        d rows of products and d³/3 once, d² for each right-hand side; memory 3 d².

    Examples:
        >>> from torch_influence.linop import Dense
        >>> x, report = Direct().solve(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), torch.ones(1, 3))
        >>> x.tolist()
        [[1.0, 0.5, 0.25]]
    """

    _factor: Memo[Factor] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    title, exact = "dense matrix, factored once", True

    def solve(
        self, operator: LinearOperator, rows: Tensor, *, on_failure: OnFailure = "warn", progress: Any = None
    ) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        return self.factor(operator, on_failure).solve(rows)

    def factor(self, operator: LinearOperator, on_failure: OnFailure = "warn") -> Factor:
        """The factor of the operator's matrix, made once."""

        def factored() -> Factor:
            refuse_if_too_large(operator.size, operator.dtype, operator.device, "a direct solve")
            return Factor(operator.dense(), on_failure=on_failure)

        factor = self._factor.of(operator, factored)
        factor.on_failure = on_failure
        return factor

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Forming the matrix and a Cholesky factor, unless there is one."""
        d, factor = operator.size, self._factor.get(operator)
        once = 0.0 if factor else SLOWNESS_OF_DENSE * (operator.operations_of_dense + d**3 / 3)
        note = f"factored before by {factor.method}" if factor else "matrix and Cholesky factor"
        return Cost(once + 4.0 * d**2 * k, 3 * d * row_bytes(operator), note)


def refuse_if_too_large(d: int, dtype: torch.dtype, device: torch.device, who: str) -> None:
    """Refuses, before anything is allocated, where the matrix, its damped copy and the factor don't fit."""
    needed, free = 3 * d * d * torch.finfo(dtype).bits // 8, memory.free_memory(device)
    if needed > free:
        raise MemoryError(
            f"{who} needs three {d:,} x {d:,} matrices, {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free on "
            f"{device}: choose fewer parameters with params=, or CGInfluenceModule, whose memory grows with d alone"
        )
