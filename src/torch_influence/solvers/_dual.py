"""Solves of A = GᵀG + σI, G [m, d], by the small matrix G Gᵀ, factored once and used for every right-hand side."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.failures import OnFailure
from torch_influence.linop import Damped, Dual, LinearOperator, base_and_shift
from torch_influence.plan import NotPossible
from torch_influence.solvers._base import conclude, norms, reachable
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import SLOWNESS_OF_DENSE, Cost, Memo, Solver


class DualFactor:
    """A⁻¹ b = (b - Gᵀ (σI + G Gᵀ)⁻¹ G b) / σ, by a Cholesky factor of the matrix in the middle.

    The difference cancels where σ is small: an error of a unit of rounding in b becomes one of cond(A) units. So the
    true residual b - A x is solved for again and added, until it is within tolerance or no longer halves.

    Args:
        operator: A, damped; its base is a ``Dual``, whose kernel G Gᵀ serves factors of any damping.

    Attributes:
        sigma: σ, the damping and the multiple of the identity that the base has.

    Raises:
        TypeError: the base is not a Dual.
        ValueError: σ is not positive, or the kernel is not finite.
        torch.linalg.LinAlgError: σ is less than the rounding in the kernel.

    Cost:
        m³/3 multiplications once; per right-hand side and round m², a product with G, with Gᵀ and with A, mostly in
        one or two rounds. Memory 2 m², and m² more for a while.

    Source:
        The matrix inversion lemma (Woodbury 1950); refinement as in Higham, Accuracy and Stability of Numerical
        Algorithms (2002), chapter 12.

    Examples:
        >>> class Ones(Dual):  # the matrix of ones, GᵀG with G = [1, 1]
        ...     rank, multiple, size, dtype, device = 1, 0.0, 2, torch.float64, torch.device("cpu")
        ...     G = torch.ones(1, 2, dtype=torch.float64)
        ...     def push(self, rows):
        ...         return rows @ self.G.mT
        ...     def pull(self, rows):
        ...         return rows @ self.G
        ...     def product(self, rows):
        ...         return self.pull(self.push(rows))
        ...     def assemble(self):
        ...         return self.G @ self.G.mT
        >>> x, report = DualFactor(Ones().damped(1.0)).solve(torch.tensor([[3.0, 0.0]], dtype=torch.float64))
        >>> [round(entry, 4) for entry in x[0].tolist()], report.method
        ([2.0, -1.0], 'dual Cholesky')
    """

    def __init__(self, operator: Damped) -> None:
        if not isinstance(operator.base, Dual):
            raise TypeError(f"operator: expected the base of the damped operator to be a Dual, got {operator.base!r}")
        self.operator, self.dual = operator, operator.base
        self.sigma = self.dual.multiple + operator.shift
        if not self.sigma > 0:
            raise ValueError(
                f"damp: expected one that makes damping plus regulariser positive, got {operator.shift:g} with a "
                f"regulariser of {self.dual.multiple:g}·I"
            )
        kernel = self.dual.kernel
        if not kernel.sum(dtype=torch.float64).isfinite():  # any NaN or infinity shows in it
            raise ValueError(
                "the curvature has entries that are not finite: a derivative of the training loss is NaN or infinite "
                "at these parameters"
            )
        self._largest = self.sigma + (norms(kernel).max() if len(kernel) else norms(kernel).sum())  # at most |A|
        middle = kernel.clone()
        middle.diagonal().add_(self.sigma)
        self._lower, failed = torch.linalg.cholesky_ex(middle)
        if bool(failed):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"damping plus regulariser, {self.sigma:.3g}, is less than the rounding of {kernel.dtype} in the "
                f"curvature, whose largest eigenvalue is at least {float(self._largest):.3g}: raise damp, use more "
                "precision, or another solver"
            )

    def solve(
        self, rows: Tensor, *, rtol: float = 1e-5, atol: float = 0.0, on_failure: OnFailure = "warn"
    ) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], to |b - Ax| <= max(rtol·|b|, atol), and the report.

        Its iterations are rounds of refinement.

        Args:
            rows: [k, d], in the operator's dtype, on its device.
            rtol: relative tolerance.
            atol: absolute tolerance.
            on_failure: "warn", "raise" (a ``SolveError``) or "ignore".

        Returns:
            x [k, d], and the report.

        Warns:
            ConvergenceWarning: some row is neither within tolerance nor at the limit of the arithmetic with at least
                half of the digits right.
        """
        start = time.perf_counter()
        size = norms(rows)
        tolerance = torch.clamp(rtol * size, min=atol)
        x = self._solve(rows)
        left = rows - self.operator.product(x)
        residual, products = norms(left), 1
        iterations = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
        which = (residual > tolerance).nonzero().flatten()
        while len(which):
            guess = x[which].add_(self._solve(left[which]))
            rest = rows[which] - self.operator.product(guess)
            products += 1
            iterations[which.cpu()] += 1
            norm, before = norms(rest), residual[which]
            better = norm < before
            chosen = which[better]
            x[chosen], left[chosen], residual[chosen] = guess[better], rest[better], norm[better]
            which = which[(norm <= 0.5 * before) & (norm > tolerance[which])]
        converged = residual <= tolerance
        limited = ~converged & residual.isfinite() & (residual <= reachable(self._largest, x, size))
        report = SolveReport(
            method="dual Cholesky",
            iterations=iterations,
            residual=torch.where(size > 0, residual / size, residual).cpu(),
            converged=converged.cpu(),
            precision_limit=limited.cpu(),
            negative_curvature=torch.zeros(len(rows), dtype=torch.bool, device="cpu"),
            products=products,
            seconds=time.perf_counter() - start,
            rtol=rtol,
        )
        return conclude(x, report, limit=products, on_failure=on_failure)

    def _solve(self, rows: Tensor) -> Tensor:
        """One round."""
        inner = torch.cholesky_solve(self.dual.push(rows).mT, self._lower).mT
        return (rows - self.dual.pull(inner)).div_(self.sigma)


@dataclasses.dataclass(kw_only=True, eq=False)
class DualDirect(Solver):
    """Solves by the small matrix that the examples' outputs span, factored once; see ``DualFactor``.

    For operators that say how they are GᵀG plus a multiple of the identity: Gauss-Newton curvatures, and Hessians of
    linear heads. The kernel G Gᵀ is made once for an operator, a factor once for each damping.

    Args:
        rtol, atol: a row is solved when |b - Ax| <= max(rtol |b|, atol), by rounds of refinement.

    Raises:
        ValueError: the operator has no such form, or too little damping for it; the message says why.

    Cost:
        that of ``DualFactor``, and of G.

    Examples:
        >>> module = InfluenceModule(
        ...     model,
        ...     objective,
        ...     train_loader,
        ...     test_loader,
        ...     "cpu",
        ...     damp=0.1,
        ...     solver=torch_influence.solvers.DualDirect(),
        ... )
    """

    rtol: float = 1e-5
    atol: float = 0.0
    # A Dual is good for any damping, a factor and a refusal for one.
    _dual: Memo[Dual] = dataclasses.field(default_factory=Memo, init=False, repr=False)
    _factor: Memo[DualFactor] = dataclasses.field(default_factory=Memo, init=False, repr=False)
    _refused: Memo[str] = dataclasses.field(default_factory=Memo, init=False, repr=False)

    title = "dual system of the outputs of all examples, factored once"

    def solve(
        self, operator: LinearOperator, rows: Tensor, *, on_failure: OnFailure = "warn", progress: Any = None
    ) -> tuple[Tensor, SolveReport]:
        """A⁻¹ b for each row b of [k, d], and the report."""
        try:
            return self.factor(operator).solve(rows, **self.options(), on_failure=on_failure)
        except NotPossible as why:
            raise ValueError(f'solver="dual": {why}') from None

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Asks the operator what its dual takes; raises ``NotPossible`` where there is none, as far as is known."""
        if (refused := self._refused.get(operator)) is not None:
            raise NotPossible(refused)
        base, shift = base_and_shift(operator)
        small = base.dual_cost(shift)
        once = 0.0 if self._factor.made else SLOWNESS_OF_DENSE * small.operations
        return Cost(once + small.operations_per_row * k, small.nbytes, "kernel and Cholesky factor")

    def dual(self, operator: LinearOperator) -> Dual:
        """The operator as a Dual, made once; raises ``NotPossible``, and remembers why, where it is none."""
        if (refused := self._refused.get(operator)) is not None:
            raise NotPossible(refused)
        base, shift = base_and_shift(operator)
        try:
            return self._dual.of(base, lambda: base.dual(shift, memory.free_memory(operator.device) / 2))
        except NotPossible as why:
            text = str(why)
            self._refused.of(operator, lambda: text)
            raise

    def factor(self, operator: LinearOperator) -> DualFactor:
        """The factor of the dual system; raises ``NotPossible`` as ``dual`` does."""
        dual, shift = self.dual(operator), base_and_shift(operator)[1]
        return self._factor.of(operator, lambda: DualFactor(dual.damped(shift)))

    def refuse(self, operator: LinearOperator, why: str) -> None:
        """Remembers that the factor could not be made, for this damping."""
        self._refused.of(operator, lambda: why)
