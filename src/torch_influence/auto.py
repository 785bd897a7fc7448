"""InfluenceModule: exact influence by whichever solver costs least."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import data

from torch_influence.arguments import check_flag
from torch_influence.base import BaseInfluenceModule
from torch_influence.choice import Cost, Problem, costs, reasons
from torch_influence.curvature import dual, dual_cost
from torch_influence.linop import Dual
from torch_influence.modules import preconditioned, refuse_if_too_large
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.plan import Step
from torch_influence.resident import Cache, free_memory
from torch_influence.solvers import DualFactor, Factor, Kept, OnFailure, block_cg, cg, minres

__all__ = ["InfluenceModule"]

_SOLVERS = {
    "direct": "dense matrix, factored once",
    "dual": "dual system of the outputs of all examples, factored once",
    "cg": "conjugate gradients, row by row, one product for all",
    "block": "block conjugate gradients",
    "minres": "MINRES, row by row, one product for all",
}
_TAKE_M = ("cg", "minres")


class InfluenceModule(BaseInfluenceModule):
    """Exact influence: solves A x = b to a tolerance, A = ∇²L(θ) + damp·I, by the solver that costs least.

    ``solver="auto"`` estimates, for the number of right-hand sides at hand, the operations and the memory of each
    solver, and takes the cheapest that fits half of the free memory; ``explain(queries)`` tells which, and why.
    All of them give the same scores, to the tolerance.

    - ``"direct"``: the matrix, factored once and kept for later queries (Cholesky; LU where it is indefinite). For
      some thousands of parameters.
    - ``"dual"``: the Gauss-Newton matrix by the small one that its examples' outputs span, factored once and kept. For
      fewer outputs of all examples than parameters, and a ridge or damping.
    - ``"block"``: block conjugate gradients. For many queries at once.
    - ``"cg"``: conjugate gradients on all rows at once, each on its own. For one or few queries.
    - ``"minres"``: minimal residuals, for a Hessian that is indefinite or singular, as away from a minimum. Only taken
      when named, since what the Hessian is isn't known before; the scores are then those of a saddle point.

    Args:
        model, objective, train_loader, test_loader, device: see BaseInfluenceModule.
        params, progress, cache, on_failure: see BaseInfluenceModule.
        damp: λ >= 0, added once to the curvature: A = ∇²L(θ) + λI.
        gnh: the Gauss-Newton matrix, positive semi-definite for convex losses, in place of the Hessian.
        solver: "auto", or one of the above.
        rtol, atol: a row is solved when |b - Ax| <= max(rtol |b|, atol), for the iterative solvers.
        maxiter: iterations at the most; 10 d by default.
        M: a preconditioner, for ``solver="cg"`` or ``"minres"``: ``Nystrom(rank)``, ``Jacobi()`` or what they take.
            What a recipe makes is kept for later solves, until the curvature or damp changes.

    Raises:
        ValueError: an unknown solver; ``solver="dual"``, and there is no dual system; M with another solver.
        MemoryError: ``solver="direct"``, and the matrices don't fit.

    Warns:
        ConvergenceWarning: a right-hand side did not converge.
        NegativeCurvatureWarning: the matrix is indefinite, as far as the solver has seen.

    Cost:
        that of the solver: ``explain()``.

    Examples:
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
        M: Any = None,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
    ) -> None:
        self.solver = solver
        if M is not None and solver not in _TAKE_M:
            raise ValueError(
                f'M: a preconditioner is for solver="cg" or "minres", got solver={solver!r}; name one, or leave M out'
            )
        super().__init__(
            model,
            objective,
            train_loader,
            test_loader,
            device,
            params=params,
            progress=progress,
            cache=cache,
            on_failure=on_failure,
        )
        self.damp = damp
        self.gnh = check_flag("gnh", gnh)
        self.rtol = rtol
        self.atol = atol
        self.maxiter = maxiter
        self.M = M
        self._kept = Kept()
        self._factor: Factor | None = None
        self._factored_with = damp
        self._dual: Dual | str | None = None  # or why there is none
        self._refused_with = damp
        self._dual_factor: DualFactor | None = None
        if solver == "direct":
            refuse_if_too_large(self._space, self.device, 'InfluenceModule with solver="direct"')
        self._warn_if_train_loss_is_overridden()

    @property
    def solver(self) -> str:
        """Which solver is taken, or "auto"."""
        return self._solver_name

    @solver.setter
    def solver(self, solver: str) -> None:
        if solver != "auto" and solver not in _SOLVERS:
            known = ", ".join(repr(name) for name in ["auto", *_SOLVERS])
            raise ValueError(f"solver: expected one of {known}, got {solver!r}")
        self._solver_name = solver

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """A⁻¹ v for [d] or rows [k, d]."""
        rows = self._as_rows(vec, "vec")
        with self._evaluation.session():
            ranked = self._costs(len(rows)) if self.solver == "auto" else []
            solver = self._taken(ranked)
            if solver == "dual" and self.solver == "auto":
                try:
                    self._current_dual_factor()
                except torch.linalg.LinAlgError as why:  # type: ignore[attr-defined]  # too little damping for it
                    self._dual, self._refused_with = str(why), self.damp
                    solver = self._taken(ranked)
            if solver == "direct":
                x = self._solved(self._current_factor().solve, rows)
            elif solver == "dual":
                options = {"rtol": self.rtol, "atol": self.atol, "on_failure": self.on_failure}
                x = self._solved(self._current_dual_factor().solve, rows, **options)
            else:
                preconditioner = {"M": self._kept.instead_of(self.M, self.damp)} if solver in _TAKE_M else {}
                x = self._solved(
                    {"block": block_cg, "cg": cg, "minres": minres}[solver],
                    self._curvature().damped(self.damp),
                    rows,
                    **preconditioner,
                    rtol=self.rtol,
                    atol=self.atol,
                    maxiter=self.maxiter,
                    on_failure=self.on_failure,
                    progress=self._bar,
                )
        return x.reshape(vec.shape)

    def _solver(self, queries: int) -> Step:
        ranked = self._costs(queries)
        solver = self._taken(ranked)
        taken = next(cost for cost in ranked if cost.solver == solver)
        path = f"{_SOLVERS[solver]}; about {taken.operations:.1e} operations ({taken.note})"
        nbytes = taken.nbytes
        if solver in _TAKE_M:
            path += preconditioned(self.M)
            nbytes += getattr(self.M, "rank", 0) * self._row_bytes
        why_not = reasons(ranked, self._may_use(), solver) if self.solver == "auto" else []
        if self.solver == "auto" and (no_dual := self._why_no_dual()):
            why_not = [*(pair for pair in why_not if pair[0] != "dual"), ("dual", no_dual)]
        return Step("solver", path, nbytes, why_not)

    def _taken(self, ranked: list[Cost]) -> str:
        """The first of these, or the solver that was asked for; the dual system is looked at more closely."""
        solver = ranked[0].solver if self.solver == "auto" else self.solver
        if solver != "dual" or not isinstance(found := self._current_dual(), str):
            return solver
        if self.solver == "dual":
            raise ValueError(f'solver="dual": {found}')
        return next(cost.solver for cost in ranked if cost.solver != "dual")

    def _why_no_dual(self) -> str:
        """Why there is no dual system, as far as it has been looked at."""
        if isinstance(self._dual, str) and self._refused_with == self.damp:
            return self._dual
        cost = dual_cost(self._curvature(), self.damp)
        return cost if isinstance(cost, str) else ""

    def _costs(self, k: int) -> list[Cost]:
        """Estimates what each solver would take for so many rows; the best comes first."""
        operator = self._curvature()
        small = dual_cost(operator, self.damp)
        once = 0.0 if self._dual_factor is not None else 1.0
        return costs(
            Problem(
                d=self._space.size,
                k=max(k, 1),
                rtol=self.rtol,
                product=operator.operations,
                dense=operator.operations_of_dense,
                factored=self._is_factored(),
                dual=None
                if isinstance(small, str)
                else (once * small.operations, small.operations_per_row, small.nbytes),
                element=torch.finfo(self._space.dtype).bits // 8,
                free=self._may_use(),
            )
        )

    def _current_dual(self) -> Dual | str:
        refused = isinstance(self._dual, str) and self._refused_with != self.damp  # another damping may do
        if self._dual is None or refused:
            self._dual = dual(self._curvature(), damp=self.damp, room=self._may_use())
            self._refused_with = self.damp
        return self._dual

    def _current_dual_factor(self) -> DualFactor:
        found = self._current_dual()
        assert isinstance(found, Dual)  # or it would not have been taken
        if self._dual_factor is None or self._dual_factor.operator.shift != self.damp:
            self._dual_factor = None  # before another one is made
            self._dual_factor = DualFactor(found.damped(self.damp))
        return self._dual_factor

    def _may_use(self) -> float:
        return free_memory(self.device) / 2

    def _is_factored(self) -> bool:
        return self._factor is not None and self._factored_with == self.damp

    def _current_factor(self) -> Factor:
        if self._factor is None or not self._is_factored():
            self._factor = None  # before another one is made
            matrix = self._curvature().dense()
            matrix.diagonal().add_(self.damp)
            self._factor, self._factored_with = Factor(matrix, on_failure=self.on_failure), self.damp
        return self._factor

    def _forget(self) -> None:
        super()._forget()
        self._factor = self._dual = self._dual_factor = None
        self._kept.clear()
