"""Auto: the solver that asks the others what they would cost, and takes the cheapest that fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from torch_influence import memory
from torch_influence.linop import LinearOperator
from torch_influence.plan import NotPossible, Step
from torch_influence.solvers._block import Follow
from torch_influence.solvers._block_cg import BlockCG
from torch_influence.solvers._cg import CG
from torch_influence.solvers._closed_form import ClosedForm
from torch_influence.solvers._direct import Direct
from torch_influence.solvers._dual import DualDirect
from torch_influence.solvers._minres import Minres
from torch_influence.solvers._preconditioners import Nystrom
from torch_influence.solvers._report import SolveReport
from torch_influence.solvers._solver import Cost, Memo, Solved, Solver, row_bytes

# Rows of the preconditioner. On problem C of benchmarks/ it takes single queries from 30 to 12 iterations, and from
# 84 to 32 and 218 to 83 at a tenth and a hundredth of the damping.
_RANK = 50
_FEW = 8  # rows of a solve for which it may pay
_LEAST_SIZE = 8  # times its rank: below that a factored matrix is near
_SAVES = 0.75  # of the iterations at the most are left where it pays


class Past:
    """Remembers what solves of few rows with one operator have taken, and tells whether a preconditioner pays.

    Nyström's approximation costs as much as ``_RANK`` single products, and saves a part of those of each later solve;
    how many solves there will be is not known. It is made when so much has been spent without it as it costs: then all
    together take at most about twice what they would have taken, had that been known (the ski rental problem). It is
    given up where the solves with it have not taken fewer products by a quarter.
    """

    recipe = Nystrom(_RANK)

    def __init__(self) -> None:
        self.plain, self.helped = _Spent(), _Spent()

    def add(self, report: SolveReport, k: int, helped: bool) -> None:
        """Takes note of a solve."""
        if 0 < k <= _FEW:
            spent = self.helped if helped else self.plain
            # Without what M took to make, which is not made again.
            most = int(report.iterations.max())
            spent.solves, spent.iterations, spent.rows = (
                spent.solves + 1,
                spent.iterations + most,
                spent.rows + k * most,
            )

    def pays(self, operator: LinearOperator, k: int) -> bool:
        """Whether the next solve of k rows should have it."""
        return not self.why_not(operator, k)

    def why_not(self, operator: LinearOperator, k: int) -> str:
        """Says why not; empty if it pays."""
        plain, helped = self.plain, self.helped
        if not 0 < k <= _FEW:
            return f"pays for up to {_FEW} right-hand sides at once, in many solves: a block finds what it knows"
        if operator.size < _LEAST_SIZE * _RANK or _RANK * row_bytes(operator) > _may_use(operator):
            return f"its {_RANK} rows would be too many for d = {operator.size:,}, or for the memory"
        if plain.rows < _RANK or plain.solves < 2:
            return f"{plain} so far, and it costs {_RANK}"
        if helped.solves and helped.each > _SAVES * plain.each:
            return f"with it a solve takes {helped.each:.0f} iterations, without {plain.each:.0f}"
        return ""


@dataclasses.dataclass
class _Spent:
    """The solves, their iterations, and these times rows."""

    solves: int = 0
    iterations: int = 0
    rows: int = 0

    @property
    def each(self) -> float:
        """Iterations of a solve."""
        return self.iterations / max(self.solves, 1)

    def __str__(self) -> str:
        return f"{self.solves} solves have multiplied {self.rows} rows"


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

    title, follows = "whichever costs least", True

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
        self._past: Memo[Past] = Memo()

    @property
    def ends_by(self) -> frozenset[str]:
        """Names what all but one of its solvers can end by: the dual system's error is rounding."""
        return CG().ends_by

    def solve(self, operator: LinearOperator, rows: Tensor, *, follow: Follow | None = None, **how: Any) -> Solved:
        """A⁻¹ b for each row b of [k, d], and the report."""
        name = self.chosen(operator.exact, len(rows))
        solver = self.candidates[name]
        if isinstance(solver, CG | BlockCG):
            return self._by_products(solver, operator, rows, follow, how)
        operator = operator.exact  # these alone judge by it
        if isinstance(solver, DualDirect):
            try:
                solver.factor(operator)
            except torch.linalg.LinAlgError as why:  # type: ignore[attr-defined]  # too little damping for it
                solver.refuse(operator, str(why))
                return self.solve(operator, rows, follow=follow, **how)
        return solver.solve(operator, rows, **how)

    def _by_products(
        self, solver: CG | BlockCG, operator: LinearOperator, rows: Tensor, follow: Follow | None, how: dict[str, Any]
    ) -> Solved:
        """Solves by conjugate gradients; with a preconditioner where earlier solves show that it pays."""
        past = self._past.of(operator, Past)
        if solver.M is None and past.pays(operator, len(rows)):
            solver = solver.with_options(M=past.recipe)
        if solver.follows:
            how = how | {"follow": follow}
        x, report = solver.solve(operator, rows, **how)
        past.add(report, len(rows), solver.M is past.recipe)
        return x, report

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """The cost of the solver that would be taken."""
        return self.ranked(operator, k)[self.chosen(operator, k)]

    def describe(self, operator: LinearOperator, k: int) -> Step:
        """The line of the solver that would be taken, and why not the others."""
        taken = self.chosen(operator, k)
        solver, past = self.candidates[taken], self._past.get(operator) or Past()
        because, why_not = "", []
        if isinstance(solver, CG | BlockCG) and solver.M is None and k <= _FEW:
            why_not = [(str(past.recipe), past.why_not(operator, k))] if not past.pays(operator, k) else []
            solver = solver if why_not else solver.with_options(M=past.recipe)
            because = "" if why_not else f"; {past.recipe} costs {_RANK} rows, and {past.plain} without it"
        step, ranked, free = solver.describe(operator, k), self.ranked(operator, k), _may_use(operator)
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
        return Step("solver", step.path + because, step.nbytes, why_not)

    def ranked(self, operator: LinearOperator, k: int) -> dict[str, Cost]:
        """Ranks the solvers that are possible by what they would take for k rows, the best first."""
        found = {}
        in_blocks = any(isinstance(solver, BlockCG) for solver in self.candidates.values())
        for name, solver in self.candidates.items():
            if in_blocks and k > 1 and isinstance(solver, CG) and solver.max_products is not None:
                continue  # as many products of a block get further
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
        self._past.forget()
        for solver in self.candidates.values():
            solver.forget()

    def with_options(self, **options: Any) -> Auto:
        """Returns the same with other options, of those that each solver has."""
        twin = Auto(candidates={name: solver.with_options(**options) for name, solver in self.candidates.items()})
        twin._past = self._past
        return twin


def named(*, rtol: float = 1e-5, atol: float = 0.0, maxiter: int | None = None, M: Any = None) -> dict[str, Solver]:
    """The solvers that ``InfluenceModule`` knows by name, but "auto", which chooses among them."""
    limits: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiter": maxiter}
    return {
        "direct": Direct(),
        "dual": DualDirect(rtol=rtol, atol=atol),
        "cg": CG(**limits, M=M),
        "block": BlockCG(**limits, M=M),
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
