"""InfluenceModule: exact influence by whichever solver costs least, or by one of your own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import data

from torch_influence.curvature import Kind
from torch_influence.failures import OnFailure
from torch_influence.memory import Cache
from torch_influence.objective import BaseObjective
from torch_influence.parameters import Selection
from torch_influence.solvers import Auto, Direct, Solver, named, own_or_ours, refuse_if_too_large
from torch_influence.solving import SolvingModule, check_product_dtype, chosen_curvature

__all__ = ["InfluenceModule"]

_TAKE_M = ("cg", "block", "minres")
_ROUND = ("auto", "cg", "block")  # with product_dtype


class InfluenceModule(SolvingModule):
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
        curvature: "hessian", or "gauss-newton", which is positive semi-definite for convex losses; or a subclass of
            ``torch_influence.curvature.Curvature``.
        gnh: an older spelling of ``curvature="gauss-newton"``.
        solver: "auto", one of the above, or an object: ``solvers.CG(rtol=1e-8, M=Nystrom(50))``, any other Solver of
            ``torch_influence.solvers``, or your own with a method ``solve(operator, rows) -> (x, report)``.
        rtol, atol: a row is solved when |b - Ax| <= max(rtol |b|, atol), for the iterative solvers. These, maxiter and
            M are for solvers by name; an object has its own.
        maxiter: iterations at the most; 10 d by default.
        product_dtype: ``torch.bfloat16`` rounds the operands of the curvature's matrix products to it, inside of the
            iterations; vectors, recurrences and the residuals that solutions are judged by stay in float32. For rtol of
            1e-2 and more, and for machines that multiply bfloat16 faster. It is never chosen by itself; for
            ``solver="cg"``, ``"block"`` or ``"auto"``, which may find that a matrix in float32 costs less.
        M: a preconditioner, for ``solver="cg"``, ``"block"`` or ``"minres"``: ``Nystrom(rank)``, ``Jacobi()`` or what
            they take. What a recipe makes is kept for later solves, until the curvature or damp changes. "auto" makes
            one of its own where many solves of few queries come, and ``explain()`` says so.

    Raises:
        ValueError: an unknown solver or curvature; ``solver="dual"``, and there is no dual system; M with another
            solver; rtol, atol, maxiter, M or product_dtype beside an object; product_dtype with another solver, with
            rtol below 1e-2, or with parameters that are not float32.
        TypeError: a solver that has no ``solve``.
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

    def __init__(
        self,
        model: nn.Module,
        objective: BaseObjective,
        train_loader: data.DataLoader[Any],
        test_loader: data.DataLoader[Any] | None,
        device: torch.device | str,
        damp: float,
        gnh: bool = False,
        solver: str | Solver | Any = "auto",
        *,
        curvature: Kind | None = None,
        rtol: float = 1e-5,
        atol: float = 0.0,
        maxiter: int | None = None,
        M: Any = None,
        product_dtype: torch.dtype | None = None,
        params: Selection = None,
        progress: bool = False,
        cache: Cache = "auto",
        on_failure: OnFailure = "warn",
    ) -> None:
        auto = Auto()
        # The same objects, so that what one keeps serves "auto", too.
        self._by_name: dict[str, Solver] = {"auto": auto, **named(), **auto.candidates}
        del self._by_name["closed form"]
        self.solver = solver
        if isinstance(solver, str) and M is not None and solver not in _TAKE_M:
            raise ValueError(
                f'M: a preconditioner is for solver="cg", "block" or "minres", got solver={solver!r}; name one, '
                "or leave M out"
            )
        if not isinstance(solver, str):
            given = {"rtol": rtol != 1e-5, "atol": atol != 0, "maxiter": maxiter is not None, "M": M is not None}
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"solver, {name}: {name} is for a solver by name; give it to {type(solver).__name__}")
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
        self.curvature = chosen_curvature(curvature, gnh)
        self.rtol = rtol
        self.atol = atol
        self.maxiter = maxiter
        self.M = M
        self.product_dtype = product_dtype
        self._rounded_to()
        if solver == "direct" or isinstance(solver, Direct):
            space, who = self._problem.space, 'InfluenceModule with solver="direct"'
            refuse_if_too_large(space.size, space.dtype, self.device, who)
        self._problem.warn_if_train_loss_is_overridden()

    @property
    def solver(self) -> Any:
        """Which solver is taken: a name, "auto" among them, or an object."""
        return self._chosen

    @solver.setter
    def solver(self, solver: Any) -> None:
        if isinstance(solver, str) and solver not in self._by_name:
            known = ", ".join(map(repr, self._by_name))
            raise ValueError(
                f"solver: expected one of {known}, got {solver!r}; or give an object with solve(operator, rows)"
            )
        self._object = None if isinstance(solver, str) else own_or_ours(solver)
        self._chosen = solver

    @property
    def _solver(self) -> Solver:
        if self._object is not None:
            return self._object
        options = {"rtol": self.rtol, "atol": self.atol, "maxiter": self.maxiter, "M": self.M}
        return self._by_name[self._chosen].with_options(**options)

    def _rounded_to(self) -> torch.dtype | None:
        if self.product_dtype is not None and not (isinstance(self._chosen, str) and self._chosen in _ROUND):
            name = repr(self._chosen) if isinstance(self._chosen, str) else f"a {type(self._chosen).__name__}"
            raise ValueError(
                f'product_dtype, solver: products in {self.product_dtype} are for solver="auto", "cg" or "block", '
                f"got solver={name}"
            )
        return check_product_dtype(self.product_dtype, self._problem.space.dtype, self.rtol)

    def _forget(self) -> None:
        for solver in (*self._by_name.values(), *([] if self._object is None else [self._object])):
            solver.forget()
