"""Solves by an inverse that the operator knows."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from torch_influence.failures import OnFailure
from torch_influence.linop import LinearOperator, base_and_shift
from torch_influence.plan import NotPossible
from torch_influence.solvers._base import conclude, norms, reachable
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import Cost, Memo, Solver


@dataclasses.dataclass(kw_only=True, eq=False)
class ClosedForm(Solver):
    """Multiplies by (A + σI)⁻¹ where the operator knows it: ``LinearOperator.inverse(shift)``.

    Raises:
        ValueError: the operator does not know its inverse; the message says why.

    Cost:
        a product with the inverse, and one with A, by which the residual is measured.

    Examples:
        >>> from torch_influence.linop import LinearOperator, Multiplied
        >>> class Scaled(LinearOperator):  # 2 I
        ...     size, dtype, device = 2, torch.float32, torch.device("cpu")
        ...     def product(self, rows):
        ...         return 2 * rows
        ...     def inverse(self, shift):
        ...         return Multiplied(lambda rows: rows / (2 + shift), torch.ones(1, 2))
        >>> x, report = ClosedForm().solve(Scaled().damped(2.0), torch.ones(1, 2))
        >>> x.tolist()
        [[0.25, 0.25]]
    """

    _inverse: Memo[LinearOperator] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    title, exact = "the operator's own inverse", True

    def solve(
        self, operator: LinearOperator, rows: Tensor, *, on_failure: OnFailure = "warn", progress: Any = None
    ) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        start = time.perf_counter()
        try:
            x = self.inverse(operator).product(rows)
        except NotPossible as why:
            raise ValueError(f"solver: a closed form was asked for, and the operator has none: {why}") from None
        size, residual = norms(rows), norms(rows - operator.product(x))
        rtol = torch.finfo(rows.dtype).eps ** 0.5  # half of the digits
        converged = residual <= rtol * size
        largest = (size / norms(x).clamp(min=torch.finfo(torch.float64).tiny)).max() if len(rows) else size.sum()
        none = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
        report = SolveReport(
            method="closed form",
            iterations=none.long(),
            residual=torch.where(size > 0, residual / size, residual),
            converged=converged,
            precision_limit=~converged & residual.isfinite() & (residual <= reachable(largest, x, size)),
            negative_curvature=none,
            products=1,
            seconds=time.perf_counter() - start,
            rtol=rtol,
        )
        return conclude(x, report, limit=1, on_failure=on_failure)

    def inverse(self, operator: LinearOperator) -> LinearOperator:
        """The inverse, made once for each damping; raises ``NotPossible`` where the operator knows none."""
        base, shift = base_and_shift(operator)
        return self._inverse.of(operator, lambda: base.inverse(shift))

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Two products; raises ``NotPossible`` where the operator knows no inverse."""
        inverse = self.inverse(operator)
        return Cost(k * (inverse.operations + operator.operations), 2 * k * operator.size * 8, "two products")
