"""InfluenceModule: exact influence by whichever solver costs least."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence.base import BaseInfluenceModule
from torch_influence.choice import Cost, Problem, costs, reasons
from torch_influence.modules import refuse_if_too_large
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.plan import Step
from torch_influence.resident import Cache, free_memory
from torch_influence.solvers import Factor, block_cg, cg

__all__ = ["InfluenceModule"]

_SOLVERS = {
    "direct": "dense matrix, factored once",
    "cg": "conjugate gradients, row by row, one product for all",
    "block": "block conjugate gradients",
}


class InfluenceModule(BaseInfluenceModule):
    """Exact influence: solves A x = b to a tolerance, A = ∇²L(θ) + damp·I, by the solver that costs least.

    ``solver="auto"`` estimates, for the number of right-hand sides at hand, the operations and the memory of each
    solver, and takes the cheapest that fits half of the free memory; ``explain(queries)`` tells which, and why.
    All of them give the same scores, to the tolerance.

    - ``"direct"``: the matrix, factored once and kept for later queries (Cholesky; LU where it is indefinite). For
      some thousands of parameters.
    - ``"block"``: block conjugate gradients. For many queries at once.
    - ``"cg"``: conjugate gradients on all rows at once, each on its own. For one or few queries.

    Args:
        model, objective, train_loader, test_loader, device, params, progress, cache: see BaseInfluenceModule.
        damp: λ >= 0, added once to the curvature: A = ∇²L(θ) + λI.
        gnh: the Gauss-Newton matrix, positive semi-definite for convex losses, in place of the Hessian.
        solver: "auto", or one of the above.
        rtol, atol: a row is solved when |b - Ax| <= max(rtol |b|, atol), for the iterative solvers.
        maxiter: iterations at the most; 10 d by default.

    Attributes:
        last_report: how the last solve went, a SolveReport.

    Raises:
        ValueError: an unknown solver.
        MemoryError: ``solver="direct"``, and the matrices don't fit.

    Warns:
        ConvergenceWarning: a right-hand side did not converge.
        NegativeCurvatureWarning: the matrix that was factored is indefinite.

    Cost:
        that of the solver: ``explain()``.

    Example:
        >>> module = InfluenceModule(model, objective, train_loader, test_loader, "cpu", damp=1e-3)
        >>> scores = module.influence_matrix()
        >>> print(module.explain(queries=10)["solver"].path)
    """

    batched: ClassVar[bool] = True
    either_side: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        damp: float,
        gnh: bool = False,
        solver: str = "auto",
        *,
        rtol: float = 1e-5,
        atol: float = 0.0,
        maxiter: int | None = None,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
    ) -> None:
        if solver != "auto" and solver not in _SOLVERS:
            known = ", ".join(repr(name) for name in ["auto", *_SOLVERS])
            raise ValueError(f"solver: expected one of {known}, got {solver!r}")
        super().__init__(
            model, objective, train_loader, test_loader, device, params=params, progress=progress, cache=cache
        )
        self.damp = damp
        self.gnh = gnh
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.maxiter = maxiter
        self._factor: Factor | None = None
        self._factored: tuple[Any, float] = (None, 0.0)  # the curvature and the damping that it is a factor of
        if solver == "direct":
            refuse_if_too_large(self._space, self.device, 'InfluenceModule with solver="direct"')
        self._warn_if_train_loss_is_overridden()

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """A⁻¹ v for [d] or rows [k, d]."""
        rows = self._as_rows(vec, "vec")
        with self._evaluation.session():
            solver = self._costs(len(rows))[0].solver if self.solver == "auto" else self.solver
            if solver == "direct":
                x, self.last_report = self._current_factor().solve(rows)
            else:
                iterate = functools.partial(block_cg if solver == "block" else cg, progress=self._bar)
                operator = self._curvature().damped(self.damp)
                x, self.last_report = iterate(operator, rows, rtol=self.rtol, atol=self.atol, maxiter=self.maxiter)
        return x.reshape(vec.shape)

    def _solver(self, queries: int) -> Step:
        ranked = self._costs(queries)
        solver = ranked[0].solver if self.solver == "auto" else self.solver
        taken = next(cost for cost in ranked if cost.solver == solver)
        path = f"{_SOLVERS[solver]}; about {taken.operations:.1e} operations ({taken.note})"
        why_not = reasons(ranked, self._may_use(), solver) if self.solver == "auto" else ()
        return Step("solver", path, taken.nbytes, why_not)

    def _costs(self, k: int) -> list[Cost]:
        """What the solvers would take for so many rows, the best first."""
        operator = self._curvature()
        return costs(
            Problem(
                d=self._space.size,
                k=max(k, 1),
                rtol=self.rtol,
                product=operator.operations,
                dense=operator.operations_of_dense,
                factored=self._is_factored(),
                element=torch.finfo(self._space.dtype).bits // 8,
                free=self._may_use(),
            )
        )

    def _may_use(self) -> float:
        return free_memory(self.device) / 2

    def _is_factored(self) -> bool:
        return self._factor is not None and self._factored == (self._curvature(), self.damp)

    def _current_factor(self) -> Factor:
        if not self._is_factored():
            self._factor = None  # before another one is made
            operator = self._curvature()
            matrix = operator.dense()
            matrix.diagonal().add_(self.damp)
            self._factor, self._factored = Factor(matrix), (operator, self.damp)
        assert self._factor is not None
        return self._factor
