"""SolvingModule: a module is a curvature and a solver."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from torch_influence.arguments import check_flag
from torch_influence.base import BaseInfluenceModule
from torch_influence.curvature import Kind, check_kind
from torch_influence.plan import Step
from torch_influence.solvers import Solver, solved


class SolvingModule(BaseInfluenceModule):
    """A module that solves with the curvature by a Solver."""

    @property
    @abc.abstractmethod
    def _solver(self) -> Solver:
        """The solver, with the options that the module has now."""

    @property
    def batched(self) -> bool:  # type: ignore[override]
        """Whether the solver takes many rows at once."""
        return self._solver.batched

    @property
    def samples(self) -> bool:  # type: ignore[override]
        """Whether the solver reads a sample of the data."""
        return self._solver.sampled

    @property
    def either_side(self) -> bool:  # type: ignore[override]
        """Whether the solver multiplies by one symmetric matrix, to its tolerance."""
        return self._solver.symmetric

    def inverse_hvp(self, vec: Tensor) -> Tensor:
        """A⁻¹ v for [d] or rows [k, d], by the solver.

        Args:
            vec: v, [d] or [k, d], in the order of ``params_names``.

        Returns:
            A⁻¹ v, of the same shape; by LiSSA an estimate, whose rows share the minibatches.
        """
        problem = self._problem
        rows = problem.as_rows(vec, "vec")
        with self._session():
            solver = self._solver
            operator = problem.curvature(not solver.sampled).damped(problem.damp)
            options: dict[str, Any] = {"on_failure": problem.on_failure, "progress": problem.bar}
            return self._solved(solved, solver, operator, rows, **options).reshape(vec.shape)

    def _solve_step(self, queries: int) -> Step:
        problem, solver = self._problem, self._solver
        return solver.describe(problem.curvature(not solver.sampled).damped(problem.damp), queries)

    def _forget(self) -> None:
        self._solver.forget()


def chosen_curvature(curvature: Kind | None, gnh: bool) -> Kind:
    """Which curvature is meant by ``curvature=`` and its older spelling ``gnh=``."""
    check_flag("gnh", gnh)
    if curvature is None:
        return "gauss-newton" if gnh else "hessian"
    if gnh and curvature != "gauss-newton":
        raise ValueError(f"curvature, gnh: gnh=True means curvature='gauss-newton', got {curvature!r} beside it")
    return check_kind(curvature)
