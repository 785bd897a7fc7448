"""SolvingModule: a module is a curvature and a solver."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.arguments import check_flag
from torch_influence.base import BaseInfluenceModule
from torch_influence.curvature import Kind, check_kind
from torch_influence.linop import LinearOperator
from torch_influence.plan import Step
from torch_influence.solvers import Follow, Solver, check_budget, solved

_SHARE_OF_SUMS = 8  # of the free memory, for sums that are made on the way of a solve

# Where each step of conjugate gradients is rounded to bfloat16, residuals of 500 queries of an MLP stay at 8e-3.
_LEAST_RTOL_OF_ROUNDED = 1e-2


class SolvingModule(BaseInfluenceModule):
    """A module that solves with the curvature by a Solver.

    Attributes:
        product_dtype: what products of the iterations are rounded to, where the module takes that option.
    """

    product_dtype: torch.dtype | None = None

    _along: AlongTheSolve | None = None  # of the next solve
    _asked_for: dict[str, Any] | None = None  # options of the solver, for a call

    @property
    @abc.abstractmethod
    def _solver(self) -> Solver:
        """The solver, with the options that the module has now."""

    @property
    def _solver_of_the_call(self) -> Solver:
        return self._solver.with_options(**self._asked_for) if self._asked_for else self._solver

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
            solver = self._solver_of_the_call
            operator = self._operator(solver)
            options: dict[str, Any] = {"on_failure": problem.on_failure, "progress": problem.bar}
            if self._along is not None and solver.follows:
                options["follow"] = self._along.begin()
            return self._solved(solved, solver, operator, rows, **options).reshape(vec.shape)

    def _stests_and_dots(self, queries: list[int]) -> tuple[Tensor, Tensor | None]:
        problem = self._problem
        nbytes = problem.train.n * len(queries) * problem.row_bytes // problem.space.size
        if nbytes > memory.free_memory(self.device) / _SHARE_OF_SUMS:
            return super()._stests_and_dots(queries)
        self._along = along = AlongTheSolve()
        try:
            return self.stests(queries), along.dots
        finally:
            self._along = None

    @contextlib.contextmanager
    def _asked(self, score_rtol: float | None, max_products: int | None) -> Iterator[None]:
        asked = {"error_rtol": score_rtol, "max_products": max_products}
        options = {name: value for name, value in asked.items() if value is not None}
        check_budget(0.0 if score_rtol is None else score_rtol, max_products, name="score_rtol")
        if refused := sorted(options.keys() - self._solver.ends_by):
            name = "score_rtol" if refused[0] == "error_rtol" else refused[0]
            raise ValueError(
                f"{name}, solver: expected a solver that can end by it, conjugate gradients or block conjugate "
                f"gradients, got {self._solver.title or type(self._solver).__name__}"
            )
        self._asked_for = options
        try:
            yield
        finally:
            self._asked_for = None

    def _solve_step(self, queries: int) -> Step:
        problem, solver = self._problem, self._solver
        return solver.describe(problem.curvature(not solver.sampled).damped(problem.damp), queries)

    def _curvature_step(self) -> Step:
        """Adds what products are rounded to."""
        step, dtype = super()._curvature_step(), self._rounded_to()
        if dtype is None:
            return step
        name = str(dtype).removeprefix("torch.")
        if why := self._problem.rounded(dtype, not self.samples).why_not:
            return dataclasses.replace(step, why_not=[*step.why_not, (f"products in {name}", why)])
        return dataclasses.replace(step, path=f"{step.path}; products in {name}, residuals in float32")

    def _operator(self, solver: Solver) -> LinearOperator:
        """The damped curvature that the solver gets. Inside a session."""
        problem, dtype = self._problem, self._rounded_to()
        if dtype is None:
            return problem.curvature(not solver.sampled).damped(problem.damp)
        return problem.rounded(dtype, not solver.sampled).damped(problem.damp)

    def _rounded_to(self) -> torch.dtype | None:
        """Tells what products are rounded to, None if they are not; refuses what can't be combined with it."""
        return None

    def _forget(self) -> None:
        self._solver.forget()


class AlongTheSolve:
    """Sums up dot products of examples' gradients with the solutions of one solve, while these are being found.

    Attributes:
        dots: ∇ℓᵢ·s_q [n, k]; None where they are not known.
    """

    def __init__(self) -> None:
        self.dots: Tensor | None = None
        self._begun = self._lost = False

    def begin(self) -> Follow:
        """Returns what a solver calls; solutions of a second solve are not those of the first."""
        self._lost |= self._begun
        self._begun = True
        return self._add

    def _add(self, dots: Tensor | None, coefficients: Tensor | None) -> None:
        self._lost |= dots is None
        if self._lost or dots is None or coefficients is None:
            self.dots = None
        elif self.dots is None:
            self.dots = dots @ coefficients.mT
        else:
            self.dots.addmm_(dots, coefficients.mT)


def check_product_dtype(dtype: Any, own: torch.dtype, rtol: float) -> torch.dtype | None:
    """Returns ``product_dtype=``; refuses other dtypes, and a tolerance that products in it don't reach.

    Args:
        dtype: of products, given by the user.
        own: of the rows.
        rtol: of the solves.

    Raises:
        TypeError: no dtype.
        ValueError: another dtype than bfloat16, rows that are not float32, or a tolerance that is too small.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"product_dtype: expected torch.bfloat16 or None, got {dtype!r} of {type(dtype).__name__}")
    if dtype != torch.bfloat16:
        raise ValueError(f"product_dtype: expected torch.bfloat16 or None, got {dtype}")
    if own != torch.float32:
        raise ValueError(f"product_dtype, model: products in {dtype} are of parameters in float32, got {own}")
    if not rtol >= _LEAST_RTOL_OF_ROUNDED:
        raise ValueError(
            f"product_dtype, rtol: products in {dtype} have errors of about 4e-3, with which residuals reach about "
            f"8e-3; give rtol={_LEAST_RTOL_OF_ROUNDED:g} or more, got {rtol:g}"
        )
    return dtype


def chosen_curvature(curvature: Kind | None, gnh: bool) -> Kind:
    """Which curvature is meant by ``curvature=`` and its older spelling ``gnh=``."""
    check_flag("gnh", gnh)
    if curvature is None:
        return "gauss-newton" if gnh else "hessian"
    if gnh and curvature != "gauss-newton":
        raise ValueError(f"curvature, gnh: gnh=True means curvature='gauss-newton', got {curvature!r} beside it")
    return check_kind(curvature)
