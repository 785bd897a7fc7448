"""Solver: a way to solve A x = b as an object, with what it has made of A; and what all of them share."""

from __future__ import annotations

import abc
import copy
import dataclasses
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from torch_influence.failures import ConvergenceWarning, OnFailure, fail
from torch_influence.linop import LinearOperator, base_and_shift
from torch_influence.plan import Step
from torch_influence.solvers._base import norms
from torch_influence.solvers._report import SolveReport

_ENDS = frozenset({"error_rtol", "max_products"})
_Made = TypeVar("_Made")
_Solver = TypeVar("_Solver", bound="Solver")
Solved: TypeAlias = tuple[Tensor, SolveReport | None]

# Weighting, mirroring and the narrow parts of Cholesky run at about half the rate of products with many rows.
SLOWNESS_OF_DENSE = 2
# Per digit of the tolerance, in the problems of benchmarks/: what damped curvature takes. It can't be known before.
_ITERATIONS_PER_DIGIT = 15


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a solve.

    Attributes:
        operations: additions and multiplications, about, at the rate of products with the operator.
        nbytes: of memory.
        note: what the estimate rests on.
    """

    operations: float
    nbytes: int
    note: str


class Solver(abc.ABC):
    """A way to solve A x = b for rows b, with its options, and with what it keeps of A for later solves.

    A subclass has ``solve`` and ``cost``, and says what it is by class attributes. ``InfluenceModule(...,
    solver=MySolver())`` takes it, as it takes any object that has such a ``solve``.

    Attributes:
        title: what it does, in words.
        exact: its answers depend on no tolerance.
        symmetric: it multiplies by one symmetric matrix, to its tolerance, so that scores may be solved for from the
            side of the training examples as well.
        sampled: it looks at minibatches of the data, and its answers are estimates.
        batched: it takes many rows at once.
        follows: ``solve`` takes ``follow``, see ``block_cg``.

    Examples:
        >>> class Diagonal(Solver):
        ...     title, exact = "division by the diagonal", True
        ...     def solve(self, operator, rows, *, on_failure="warn", progress=None):
        ...         return rows / operator.diagonal(), None  # no report: residuals are measured
        ...     def cost(self, operator, k):
        ...         return Cost(k * operator.size, 0, "a division per number")
        >>> from torch_influence.linop import Dense
        >>> Diagonal().solve(Dense(torch.diag(torch.tensor([2.0, 4.0]))), torch.ones(1, 2))[0].tolist()
        [[0.5, 0.25]]
    """

    title: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    sampled: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    @abc.abstractmethod
    def solve(
        self, operator: LinearOperator, rows: Tensor, *, on_failure: OnFailure = "warn", progress: Any = None
    ) -> Solved:
        """Solves for each row b of [k, d].

        Args:
            operator: A; where it was damped a ``Damped``, whose ``base`` and ``shift`` can be read.
            rows: [k, d], of the operator's dtype, on its device.
            on_failure: "warn", "raise" (a ``SolveError``) or "ignore".
            progress: wraps iterations in a progress bar.

        Returns:
            x [k, d], and a report; None in its place lets the caller measure residuals.
        """

    @abc.abstractmethod
    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Estimates a solve for k rows; raises ``NotPossible`` where it can't be done."""

    def describe(self, operator: LinearOperator, k: int) -> Step:
        """The solver's line of ``explain()``, for k rows."""
        cost, title = self.cost(operator, k), self.title or type(self).__name__
        return Step("solver", f"{title}; about {cost.operations:.1e} operations ({cost.note})", cost.nbytes)

    @property
    def ends_by(self) -> frozenset[str]:
        """Which of the options ``error_rtol`` and ``max_products`` it can take; one that is exact ends before both."""
        return _ENDS if self.exact else _ENDS & vars(self).keys()

    def forget(self) -> None:
        """Drops what is kept of operators."""
        for value in vars(self).values():
            if isinstance(value, Memo):
                value.forget()

    def options(self, **others: Any) -> dict[str, Any]:
        """The options that it was made with, and others, or these in their place."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {field.name: getattr(self, field.name) for field in fields if field.init} | others

    def with_options(self: _Solver, **options: Any) -> _Solver:
        """Returns the same solver with other options, of those that it has; what it keeps is shared."""
        twin = copy.copy(self)
        vars(twin).update({name: value for name, value in options.items() if name in vars(self)})
        return twin


@dataclasses.dataclass(kw_only=True, eq=False)
class Krylov(Solver):
    """An iteration with one product for all rows a step, by a function of this package.

    Attributes:
        rtol, atol, maxiter, x0, history: options of the function.
        vectors: how many it keeps for each row.
        work: operations on a row's vectors in a step, divided by d.
    """

    rtol: float = 1e-5
    atol: float = 0.0
    maxiter: int | None = None
    x0: Any = None
    history: bool = False

    vectors: ClassVar[int]
    work: ClassVar[int]

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Guesses: the spectrum is not known."""
        return self._cost(operator, k, iterations(self._loosest, operator.size), self.work)

    @property
    def _loosest(self) -> float:
        """The tolerance that ends it first, about."""
        return max(self.rtol, getattr(self, "error_rtol", 0.0))

    def _cost(self, operator: LinearOperator, k: int, steps: float, work: float) -> Cost:
        if (most := getattr(self, "max_products", None)) is not None:
            steps = min(steps, most)
        nbytes = self.vectors * k * row_bytes(operator)
        return Cost(steps * k * (operator.operations + work * operator.size), nbytes, f"{steps:.0f} products, a guess")


class Memo(Generic[_Made]):
    """Keeps the last thing that was made for an operator, until one is made for another, or with something else.

    An operator is told by its identity and its shift: curvatures are made anew whenever anything has changed.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drops it."""
        self._base: weakref.ref[LinearOperator] | None = None
        self._shift = math.nan
        self._of: Any = None
        self._made: _Made | None = None

    @property
    def made(self) -> bool:
        """Whether there is one for any operator."""
        return self._base is not None

    def has(self, operator: LinearOperator, of: Any = None) -> bool:
        """Whether there is one for this operator, made of this very thing."""
        base, shift = base_and_shift(operator)
        return self._base is not None and self._base() is base and self._shift == shift and self._of is of

    def get(self, operator: LinearOperator, of: Any = None) -> _Made | None:
        """Returns what was made for this operator; None if nothing was."""
        return self._made if self.has(operator, of) else None

    def of(self, operator: LinearOperator, make: Callable[[], _Made], of: Any = None) -> _Made:
        """Returns what was made for this operator, or makes it now, after what was made for another is dropped."""
        if not self.has(operator, of):
            self.forget()
            made = make()
            base, shift = base_and_shift(operator)
            self._base, self._shift, self._of, self._made = weakref.ref(base), shift, of, made
        return self._made  # type: ignore[return-value]  # it may be a None that was made

    def __reduce__(self) -> Any:
        return type(self), ()


def iterations(rtol: float, d: int) -> float:
    """How many products with one row conjugate gradients may take: a guess, since nothing is known of the spectrum."""
    digits = -math.log10(min(max(rtol, 1e-16), 0.1))
    return min(_ITERATIONS_PER_DIGIT * digits, float(d)) + 1


def row_bytes(operator: LinearOperator) -> int:
    """Bytes of a row."""
    return operator.size * torch.finfo(operator.dtype).bits // 8


class Own(Solver):
    """A user's object with a method ``solve(operator, rows)``, which returns x, or x and a report.

    What a Solver has beside that is taken from the object where it is there.
    """

    def __init__(self, own: Any) -> None:
        if isinstance(own, type) or not callable(getattr(own, "solve", None)):
            hint = "; give an instance, not the class" if isinstance(own, type) else ""
            raise TypeError(
                f"solver: expected a name, or an object with solve(operator, rows), got {own!r} of "
                f"{type(own).__name__}{hint}"
            )
        self.own = own
        facts = {
            fact: bool(getattr(own, fact, fact == "batched")) for fact in ("exact", "symmetric", "sampled", "batched")
        }
        vars(self).update(facts, title=str(getattr(own, "title", "") or type(own).__name__))

    def solve(self, operator: LinearOperator, rows: Tensor, **how: Any) -> Solved:
        """Checks what the object returns."""
        takes = inspect.signature(self.own.solve).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values()):
            how = {name: value for name, value in how.items() if name in takes}
        found = self.own.solve(operator, rows, **how)
        x, report = found if isinstance(found, tuple) else (found, None)
        if not isinstance(x, Tensor) or x.shape != rows.shape:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{self.title}.solve: expected it to return rows {list(rows.shape)}, got {got}")
        return x, report

    def cost(self, operator: LinearOperator, k: int) -> Cost:
        """Asks the object, if it says that."""
        return self.own.cost(operator, k) if hasattr(self.own, "cost") else Cost(math.nan, k * row_bytes(operator), "")

    def describe(self, operator: LinearOperator, k: int) -> Step:
        """Asks the object, or describes it by its cost."""
        if hasattr(self.own, "describe"):
            return self.own.describe(operator, k)
        if hasattr(self.own, "cost"):
            return super().describe(operator, k)
        return Step("solver", self.title, self.cost(operator, k).nbytes)

    def forget(self) -> None:
        """Passes it on."""
        if hasattr(self.own, "forget"):
            self.own.forget()


def solved(solver: Solver, operator: LinearOperator, rows: Tensor, **how: Any) -> tuple[Tensor, SolveReport]:
    """A solver's answer and its report, measured where it makes none.

    Of failures of somebody else's solver the user is told here; those of this package tell by themselves.
    """
    x, report = solver.solve(operator, rows, **how)
    report = measured(operator, rows, x, solver.title or type(solver).__name__) if report is None else report
    failed = ~(report.converged | report.precision_limit)
    if isinstance(solver, Own) and failed.any():
        worst = float(report.residual[failed].nan_to_num(math.inf).max())
        text = f"{solver.title} did not converge for {int(failed.sum())} of {len(rows)} right-hand sides"
        found = ConvergenceWarning(f"{text}: |b - Ax| / |b| is {worst:.1e}")
        fail([found], how.get("on_failure", "warn"), x, report)
    return x, report


def measured(operator: LinearOperator, rows: Tensor, x: Tensor, method: str) -> SolveReport:
    """A report of residuals |b - A x| / |b| from their definition; a row converged if x is better than nothing, 0."""
    size, residual = norms(rows), norms(rows - operator.product(x))
    none = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    return SolveReport(
        method=method,
        iterations=none.long(),
        residual=torch.where(size > 0, residual / size, residual),
        converged=residual <= size,
        precision_limit=none,
        negative_curvature=none,
        products=1,
        seconds=0.0,
    )


def own_or_ours(solver: Any) -> Solver:
    """A solver of this package as it is, anybody else's as an ``Own``."""
    return solver if type(solver).__module__.startswith("torch_influence.") else Own(solver)
