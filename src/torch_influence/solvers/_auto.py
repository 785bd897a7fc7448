"""Auto: the solver that asks the others what they would cost, and takes the cheapest that fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.linop import LinearOperator
from torch_influence.plan import NotPossible, Step
from torch_influence.solvers._block_cg import BlockCG
from torch_influence.solvers._cg import CG
from torch_influence.solvers._closed_form import ClosedForm
from torch_influence.solvers._direct import Direct
from torch_influence.solvers._dual import DualDirect
from torch_influence.solvers._minres import Minres
from torch_influence.solvers._solver import Cost, Solved, Solver


class Auto(Solver):
    """Solves by that of several solvers which costs least, for the operator and the number of rows at hand.

    Each estimates its operations and its memory; the cheapest that fits half of the free memory is taken. What a solver
    has made already (a factor) is not counted again.

    Args:
        rtol, atol, maxiter: of the solvers that have them.
        candidates: the solvers to choose from, by name; by default those of ``InfluenceModule``'s ``solver=`` but
            MINRES, which solves what no other does at a price that would be paid for nothing elsewhere.

    Cost:
        that of the solver taken; ``describe`` tells it, and what the others would take.

    Examples:
        >>> from torch_influence.linop import Dense
        >>> x, report = Auto().solve(Dense(torch.diag(torch.tensor([1.0, 2.0, 4.0]))), torch.ones(1, 3))
        >>> x.tolist(), report.method
        ([[1.0, 0.5, 0.25]], 'Cholesky')
    """

    title = "whichever costs least"

    def __init__(
        self,
        *,
        rtol: float = 1e-5,
        atol: float = 0.0,
        maxiter: int | None = None,
        candidates: dict[str, Solver] | None = None,
    ) -> None:
        if candidates is None:
            candidates = {"closed form": ClosedForm(), **named(rtol=rtol, atol=atol, maxiter=maxiter)}
            del candidates["minres"]
        self.candidates = candidates

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> Solved:
        """A⁻¹ b for each row b of [k, d], and the report."""
        solver = self.candidates[self.chosen(operator.exact, len(rows))]
        if not isinstance(solver, CG | BlockCG):  # these alone judge by the exact operator
            operator = operator.exact
        if isinstance(solver, DualDirect):
            try:
                solver.factor(operator)
            except torch.linalg.LinAlgError as why:  # type: ignore[attr-defined]  # too little damping for it
                solver.refuse(operator, str(why))
                return self.solve(operator, rows, **how)
        return solver.solve(operator, rows, **how)

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """The cost of the solver that would be taken."""
        return self.ranked(operator, k)[self.chosen(operator, k)]

    def describe(self, operator: LinearOperator, k: int) -> Step:
        """The line of the solver that would be taken, and why not the others."""
        taken = self.chosen(operator, k)
        step, ranked, free = self.candidates[taken].describe(operator, k), self.ranked(operator, k), _may_use(operator)
        why_not = []
        for name, cost in ranked.items():
            ratio = cost.operations / ranked[taken].operations
            why = f"{ratio:,.{1 if ratio < 10 else 0}f}x the operations ({cost.note})"
            if cost.nbytes > free:
                why = f"needs {cost.nbytes / 1e9:.2g} GB, and {free / 1e9:.2g} GB may be used"
            if name != taken:
                why_not.append((name, why))
        for name, solver in self.candidates.items():
            if name not in ranked and not isinstance(solver, ClosedForm):  # most operators know no inverse
                why_not.append((name, _why_not(solver, operator, k)))
        return Step("solver", step.path, step.nbytes, why_not)

    def ranked(self, operator: LinearOperator, k: int) -> dict[str, Cost]:
        """Ranks the solvers that are possible by what they would take for k rows, the best first."""
        found = {}
        for name, solver in self.candidates.items():
            try:
                found[name] = solver.cost(operator, max(k, 1))
            except NotPossible:
                continue
        free = _may_use(operator)
        order = sorted(found, key=lambda name: (found[name].nbytes > free, found[name].operations))
        return {name: found[name] for name in order}

    def chosen(self, operator: LinearOperator, k: int) -> str:
        """The name of the solver that is taken for k rows; a dual system is looked at more closely before."""
        for name in self.ranked(operator, k):
            solver = self.candidates[name]
            if isinstance(solver, DualDirect):
                try:
                    solver.dual(operator)
                except NotPossible:
                    continue
            return name
        raise ValueError("candidates: expected at least one solver that can solve any system, got none")

    def forget(self) -> None:
        """Drops what they keep of operators."""
        for solver in self.candidates.values():
            solver.forget()

    def with_options(self, **options: Any) -> Auto:
        """Returns the same with other options, of those that each solver has."""
        return Auto(candidates={name: solver.with_options(**options) for name, solver in self.candidates.items()})


def named(*, rtol: float = 1e-5, atol: float = 0.0, maxiter: int | None = None, M: Any = None) -> dict[str, Solver]:
    """The solvers that ``InfluenceModule`` knows by name, but "auto", which chooses among them."""
    limits: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiter": maxiter}
    return {
        "direct": Direct(),
        "dual": DualDirect(rtol=rtol, atol=atol),
        "cg": CG(**limits, M=M),
        "block": BlockCG(**limits),
        "minres": Minres(**limits, M=M),
    }


def _may_use(operator: LinearOperator) -> float:
    return memory.free_memory(operator.device) / 2


def _why_not(solver: Solver, operator: LinearOperator, k: int) -> str:
    try:
        solver.cost(operator, k)
    except NotPossible as why:
        return str(why)
    return ""
